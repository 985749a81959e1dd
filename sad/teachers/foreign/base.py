"""A document of somebody's file: its tokens, and a teacher's distribution after each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sad.errors import UnfitError, quoted
from sad.teachers.cache.answers import Answer, checked_answer

Row = Mapping[str, Any]
"""A record of a file, as JSON or a table gives it."""


class ForeignDocument(NamedTuple):
    """n tokens; of the targets row i, of n - 1, is the distribution of token i + 1."""

    tokens: list[int]
    targets: Answer
    """Slots of -inf hold nothing; a row of them alone is no target."""
    learned: list[bool] | None = None
    """Which of the tokens are; None for all."""


class Context(NamedTuple):
    """What records are read with."""

    tokenizer: PreTrainedTokenizerFast
    vocab: int
    """Ids that the tokenizer can produce."""
    folder: Any
    """Where the files lie, for what lies beside them."""


def token_ids(value: Any, name: str, where: str) -> list[int]:
    """A list of ids in a record, which must have at least two of them."""
    value = as_list(value)
    if not isinstance(value, list) or len(value) < 2 or any(type(one) is not int for one in value):
        raise UnfitError(
            f"{where} must have {name}, a list of at least 2 token ids, got {quoted(value)}; "
            "correct the file, or name its format with --import_format"
        )
    return value


def as_list(value: Any) -> Any:
    """An array as a list; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def matrix(value: Any, rows: int, name: str, where: str) -> Tensor:
    """A list of lists of numbers as float64 [n - 1, K] for n = ``rows`` tokens: one list per token,
    or per token but the last, for which there is nothing to predict."""
    try:
        found = torch.tensor(
            [[float(one) for one in row] for row in as_list(value)], dtype=torch.float64
        )
    except (TypeError, ValueError):
        raise UnfitError(
            f"{where} must have {name}, lists of numbers of one length, got {quoted(value)}; "
            "correct the file"
        ) from None
    if found.ndim != 2 or len(found) not in (rows, rows - 1) or not found.shape[1]:
        raise UnfitError(
            f"{where} must have {name} for each of its {rows} tokens, got {len(found)}; correct "
            "the file"
        )
    return found[: rows - 1]


def sorted_answer(ids: Tensor, log_probs: Tensor, vocab: int, where: str) -> Answer:
    """The targets of ids that come in any order; raises as ``checked_answer``."""
    log_probs, order = log_probs.sort(dim=1, descending=True, stable=True)
    return checked_answer(ids.gather(1, order).long(), log_probs, vocab, where)


def field(record: Row, name: str, where: str) -> Any:
    """A field that a record must have."""
    if record.get(name) is None:
        found = quoted(sorted(map(str, record)))
        raise UnfitError(f"{where} must have the field {name}, got {found}; correct the file")
    return record[name]


def first_of(value: Any) -> Any:
    """The only entry of a list; everything else as it is."""
    return value[0] if isinstance(value, Sequence) and len(value) == 1 else value
