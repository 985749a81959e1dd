"""What tells targets that fit their text from others: shifted by a token, or of other ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast

from sad.errors import UnfitError
from sad.teachers.foreign.base import ForeignDocument

SHIFTS = (0, -1, 1, 2)
"""Tokens by which targets may be off: the right one, and three wrong ones."""
FACTOR = 1.5
"""By how much the right shift must be better than each of the others."""

SAMPLES = 64
"""Documents that are decoded and encoded again."""
SAME = 0.5
"""Share of them that must come back as they were. Generated tokens, and text that was cut, need
not; with another tokenizer hardly any does."""


class ShiftTest:
    """Share of positions whose next token is among the teacher's ids, at each of ``SHIFTS``."""

    def __init__(self) -> None:
        self._hits = [0] * len(SHIFTS)
        self._positions = 0

    def add(self, document: ForeignDocument) -> None:
        """Count the positions of a document that have targets."""
        tokens = torch.tensor(document.tokens)
        ids, log_probs = document.targets
        used = ~log_probs.isneginf()
        # Positions at which the token of every shift is in the document.
        at = torch.arange(len(tokens) - 1 - max(SHIFTS))
        at = at[used[at].any(1)] if len(at) else at
        self._positions += len(at)
        for i, shift in enumerate(SHIFTS):
            found = (ids[at] == tokens[at + 1 + shift, None]) & used[at]
            self._hits[i] += int(found.any(1).sum())

    def require_right(self, path: object) -> list[float]:
        """The shares; ``UnfitError`` unless the right shift has by far the largest."""
        shares = [hits / max(self._positions, 1) for hits in self._hits]
        right, *wrong = shares
        if not right or right < FACTOR * max(wrong):
            best = SHIFTS[max(range(len(SHIFTS)), key=lambda i: shares[i])]
            shown = ", ".join(
                f"{share:.3f} at {shift:+d}" for share, shift in zip(shares, SHIFTS, strict=True)
            )
            raise UnfitError(
                f"the targets in {path} must be those of the next token, which must be among the "
                f"ids {FACTOR} times as often as at any wrong shift, got shares of {shown} (best "
                f"at {best:+d}); shift them, or name their own text and tokenizer"
            )
        return shares


def require_same_ids(
    documents: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerFast, path: object
) -> None:
    """Decode documents and encode them again; ``UnfitError`` unless most come back as they were."""
    same = 0
    for tokens in documents:
        text = tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        same += tokenizer(text, add_special_tokens=False)["input_ids"] == list(tokens)
    if documents and same < SAME * len(documents):
        raise UnfitError(
            f"the tokens in {path} must be those of the tokenizer, got {same} of "
            f"{len(documents)} documents that are the same decoded and encoded again; name the "
            "teacher's tokenizer"
        )
