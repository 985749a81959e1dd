"""What vLLM and SGLang say of a text: the most likely ids after each of its tokens, checked.

Both give one entry per token of the text; the first is null, for nothing comes before it. Entry i
is the distribution of token i *given the tokens before it*, so that the target of input i lies in
entry i + 1:

======  ==========================================================================================
vllm    ``prompt_logprobs``: ``{id: {"logprob", "rank", "decoded_token"}}``, the K most likely ids
        and the text's own token, which may be one of them or come on top
sglang  ``meta_info.input_top_logprobs``: K of ``[logprob, id, text]``;
        ``meta_info.input_token_logprobs``: the own tokens, in the same form
======  ==========================================================================================

Log-probabilities are those at temperature 1, over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sad.errors import UnfitError, first_difference, quoted

EXCESS = 1e-3
"""By how much probabilities may sum to more than 1: servers compute them from 16 bits."""


class Answer(NamedTuple):
    """The K most likely ids after each token of a text of n tokens but the last one."""

    ids: Tensor  # int64 [n - 1, K], by falling probability
    log_probs: Tensor  # float64 [n - 1, K]

    @property
    def tail(self) -> Tensor:
        """Mass of all other ids, float64 [n - 1]."""
        return (1 - self.log_probs.exp().sum(1)).clamp(0, 1)


def read_vllm(entries: Any, tokens: Sequence[int], k: int | None, vocab: int, where: str) -> Answer:
    """The answer in vLLM's ``prompt_logprobs`` of a text, ``tokens``; ``where`` opens messages.

    ``k`` ids were asked for; with None as many are taken as every position has. Raises
    ``UnfitError`` for entries that are not those of this text and k, and for ids outside the
    ``vocab`` ids of the tokenizer.
    """
    positions = []
    for place, entry in _entries(entries, tokens, "prompt_logprobs", where):
        try:
            found = sorted((one["rank"], one["logprob"], int(i)) for i, one in entry.items())
            ranks = [int(rank) for rank, _, _ in found]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise _wrong(where, place, "be ids with rank and logprob", entry) from None
        own = tokens[place]
        if all(one != own for _, _, one in found):
            found_ids = [one for _, _, one in found]
            raise _wrong(where, place, f"hold the text's own token, {own}", found_ids)
        if k is not None and len(found) not in (k, k + 1):
            raise _wrong(where, place, f"hold {k} ids, or {k + 1} with the text's own", len(found))
        if len(set(ranks)) < len(ranks):  # the own token comes on top, and ties with one of them
            found = [one for one in found if one[2] != own]
            ranks = [int(rank) for rank, _, _ in found]
        count = next((i for i, rank in enumerate(ranks) if rank != i + 1), len(ranks))
        if count < (k or 1):
            raise _wrong(where, place, f"have the ranks 1 to {k or 1}", ranks)
        positions.append([(value, one) for _, value, one in found[:count]])
    return _answer(positions, k, vocab, where)


def read_sglang(meta: Any, tokens: Sequence[int], k: int | None, vocab: int, where: str) -> Answer:
    """As ``read_vllm``, of SGLang's ``meta_info``."""
    if not isinstance(meta, dict):
        raise UnfitError(f"{where} must have a meta_info, got {quoted(meta)}; {_REMEDY}")
    own = meta.get("input_token_logprobs")
    if own is not None:
        try:
            found = [int(one[1]) for one in own]
        except (IndexError, TypeError, ValueError):
            raise UnfitError(
                f"{where} must have the text's tokens in input_token_logprobs, got {quoted(own)}; "
                f"{_REMEDY}"
            ) from None
        if found != list(tokens):
            differs = first_difference(found, tokens)
            raise UnfitError(
                f"{where} must be of the text that was sent, got other tokens from place {differs} "
                f"on, {len(found)} in all where {len(tokens)} were sent; {_REMEDY}"
            )
    positions = []
    for place, entry in _entries(
        meta.get("input_top_logprobs"), tokens, "input_top_logprobs", where
    ):
        try:
            found = [(value, int(one)) for value, one, *_ in entry]
        except (TypeError, ValueError):
            raise _wrong(where, place, "be a list of [logprob, id, text]", entry) from None
        if (k is not None and len(found) != k) or not found:
            raise _wrong(where, place, f"hold {k or 'some'} ids", len(found))
        positions.append(found)
    return _answer(positions, k, vocab, where)


def own_of_vllm(entries: Any, tokens: Sequence[int], where: str) -> Tensor:
    """The log-probability of each token of a text but the first, float64 [n - 1], in vLLM's
    ``prompt_logprobs``; ``where`` opens messages.

    Raises ``UnfitError`` for entries that are not those of this text, and for no log-probabilities.
    """
    values = []
    for place, entry in _entries(entries, tokens, "prompt_logprobs", where):
        own = entry.get(str(tokens[place])) if isinstance(entry, dict) else None
        if not isinstance(own, dict) or "logprob" not in own:
            raise _wrong(where, place, f"hold the text's own token, {tokens[place]}", entry)
        values.append(own["logprob"])
    return _log_probs(values, where)


def own_of_sglang(meta: Any, tokens: Sequence[int], where: str) -> Tensor:
    """As ``own_of_vllm``, in ``input_token_logprobs`` of SGLang's ``meta_info``."""
    own = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
    try:
        found = [(value, int(one)) for value, one, *_ in own or ()]
    except (TypeError, ValueError):
        found = []
    if [one for _, one in found] != list(tokens):
        raise UnfitError(
            f"{where} must have the text's tokens in input_token_logprobs, {len(tokens)} of them, "
            f"got {quoted(own)}; {_REMEDY}"
        )
    if found and found[0][0] is not None:
        raise _wrong(where, 0, "be null, for nothing comes before it", found[0][0])
    return _log_probs([value for value, _ in found[1:]], where)


def _log_probs(values: list[Any], where: str) -> Tensor:
    try:
        found = torch.tensor([float(value) for value in values], dtype=torch.float64)
    except (TypeError, ValueError):
        raise UnfitError(f"{where} must hold numbers as log-probabilities; {_REMEDY}") from None
    right = found.isfinite() & (found <= EXCESS)
    if not bool(right.all()):
        place = int((~right).nonzero()[0])
        raise _wrong(where, place + 1, "hold finite log-probabilities", values[place])
    return found.clamp(max=0.0)


def checked_answer(ids: Tensor, log_probs: Tensor, vocab: int, where: str) -> Answer:
    """An answer of these ids [n, K] and log-probabilities; slots of -inf hold nothing.

    Raises ``UnfitError`` for NaN, ids that are outside the vocabulary or occur twice, rising
    log-probabilities and such that sum to more than 1.
    """
    log_probs = log_probs.double()
    used = ~log_probs.isneginf()
    ids = torch.where(used, ids.long(), 0)

    def refuse(wrong: Tensor, expectation: str, values: Tensor) -> None:
        if bool(wrong.any()):
            place = int(wrong.flatten(1).any(1).nonzero()[0])
            raise _wrong(where, place + 1, expectation, values[place].tolist())

    refuse(log_probs.isnan() | log_probs.isposinf(), "hold finite log-probabilities", log_probs)
    refuse((ids < 0) | (ids >= vocab), f"hold ids of the tokenizer, below {vocab:,}", ids)
    alone = torch.where(used, ids, -1 - torch.arange(ids.shape[1])).sort(1).values
    refuse(alone[:, 1:] == alone[:, :-1], "hold each id once", ids)
    rising = log_probs[:, 1:] > log_probs[:, :-1] + EXCESS
    refuse(rising, "hold ids by falling log-probability", log_probs)
    total = log_probs.exp().sum(1, keepdim=True)
    refuse(total > 1 + EXCESS, "hold log-probabilities, which sum to at most 1", total)
    return Answer(ids, log_probs)


_REMEDY = "check version and kind of the program that answered"


def _entries(entries: Any, tokens: Sequence[int], name: str, where: str) -> list[tuple[int, Any]]:
    """The entries of all tokens but the first, with their places."""
    if not isinstance(entries, list) or len(entries) != len(tokens):
        got = f"{len(entries)}" if isinstance(entries, list) else quoted(entries)
        raise UnfitError(
            f"{where} must have {name} with one entry per token, {len(tokens)}, got {got}; "
            "start vLLM with --no-enable-prefix-caching, SGLang with logprob_start_len 0"
        )
    if entries and entries[0] is not None:
        raise _wrong(where, 0, "be null, for nothing comes before it", entries[0])
    return list(enumerate(entries))[1:]


def _answer(
    positions: list[list[tuple[Any, int]]], k: int | None, vocab: int, where: str
) -> Answer:
    """The answer of positions with at least k ids each, by falling probability."""
    kept = min(map(len, positions), default=1) if k is None else k
    try:
        values = [[float(value) for value, _ in one[:kept]] for one in positions]
    except (TypeError, ValueError):
        raise UnfitError(f"{where} must hold numbers as log-probabilities; {_REMEDY}") from None
    log_probs = torch.tensor(values, dtype=torch.float64).reshape(-1, kept)
    log_probs = log_probs.masked_fill(log_probs.isneginf(), torch.nan)  # no server says -inf
    largest = 2**62  # of what torch holds; refused as outside the vocabulary
    ids = [[max(min(one, largest), -1) for _, one in position[:kept]] for position in positions]
    return checked_answer(
        torch.tensor(ids, dtype=torch.int64).reshape(-1, kept), log_probs, vocab, where
    )


def _wrong(where: str, place: int, expectation: str, got: object) -> UnfitError:
    return UnfitError(f"{where}, token {place}, must {expectation}, got {quoted(got)}; {_REMEDY}")
