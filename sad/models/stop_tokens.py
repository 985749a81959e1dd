"""Tokens at which an exported student stops generating."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_stop_tokens(
    model: PreTrainedModel, end_tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Let ``model`` stop at every token that ended what it is trained on; return a line about it.

    A base model that learns conversations would write on past the end of its turn. The line is
    empty if it stops there already. Nothing is removed.
    """
    generation = model.generation_config
    if generation is None:
        return ""
    known = generation.eos_token_id
    stops = [] if known is None else list(known) if isinstance(known, list | tuple) else [known]
    missing = [token for token in end_tokens if token not in stops]
    if not missing:
        return ""
    stops += missing
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in missing)
    return f"{names} added to those of the student, which is trained to end there"
