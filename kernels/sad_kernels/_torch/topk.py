"""A top-k teacher's rows in the torch path: K + 1 outcomes, the ids and everything else.

The student's share of everything else comes from its own sum over the columns outside K, relative
to their own maximum. Taking ``1 - sum_K q`` instead would cancel: in fp32 it is 11 % off at 1e-6.
And a sum relative to the row's maximum underflows where the student is sure of an id: at e^-104 the
divergence would be infinite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._divergence import teacher_outcomes, value_and_gradient
from sad_kernels.objective import Tail

Positions = tuple[Tensor, Tensor, Tensor]


class TopKGradient(NamedTuple):
    """The gradient ``dD/dz`` of the bare divergence, times T, by the student's logits."""

    inside: Tensor  # [n, K], in the columns of the ids
    outside: Tensor  # [n], times exp((s - rest_maximum) / T) in all other columns


class TopKRows:
    """The ids of n rows, and the student's logits there, collected while tiles pass by."""

    def __init__(self, ids: Tensor, log_probs: Tensor, tail: Tail, vocab: int, like: Tensor):
        self.log_probs = log_probs.to(like.dtype)
        self.present = self.log_probs != -torch.inf  # [n, K]; -inf marks padding
        # Foreign and repeated ids poison their row; padding and foreign ids get the id -1.
        known = (ids >= 0) & (ids < vocab) & self.log_probs.isfinite()
        self.ids = ids.long().where(self.present & known, -1)
        self.poisoned = (self.present & ~known).any(1) | self._has_repeated_ids()  # [n]
        self.tail, self.vocab = tail, vocab
        self.logits = torch.zeros_like(self.log_probs)

    def _has_repeated_ids(self) -> Tensor:  # [n]
        ordered = self.ids.sort(1).values
        return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)

    def positions(self, rows: slice, columns: slice) -> Positions:
        """The ids that lie in a tile: indices of its rows, of K, of its columns."""
        ids = self.ids[rows]
        row, k = ((ids >= columns.start) & (ids < columns.stop)).nonzero(as_tuple=True)
        return row, k, ids[row, k] - columns.start

    def note_logits(self, rows: slice, columns: slice, s: Tensor) -> Positions:
        """Keep the student's logits at the ids of this tile; return where they are."""
        row, k, column = self.positions(rows, columns)
        self.logits[rows][row, k] = s[row, column]
        return row, k, column

    def argmax(self) -> Tensor:  # [n]
        """The id with the highest log-probability."""
        best = self.log_probs.argmax(1, keepdim=True)
        return self.ids.gather(1, best).squeeze(1)

    def compare(
        self,
        rows: slice,
        comparison: tuple[str, float],  # a divergence and its beta
        temperature: float,
        maximum: Tensor,
        rest_maximum: Tensor,
        rest: Tensor,
    ) -> tuple[Tensor, TopKGradient]:
        """Return the bare divergence of some rows, and its gradient.

        ``maximum`` is the student's over all columns, ``rest_maximum`` the one over those outside
        K, and ``rest`` the sum of ``exp((s - rest_maximum) / T)`` over these.
        """
        # log q of the K ids and of the rest, relative to the student's maximum.
        at_ids = (self.logits[rows] - maximum[:, None]) / temperature
        at_ids = at_ids.where(self.present[rows], -torch.inf)
        below = (rest_maximum - maximum) / temperature
        total = rest * below.exp() + at_ids.exp().sum(1)
        log_q = torch.cat((at_ids, (below + rest.log())[:, None]), 1) - total.log()[:, None]

        log_p, log_p_rest = teacher_outcomes(self.log_probs[rows], self.tail, self.vocab)
        log_p = torch.cat((log_p, log_p_rest[:, None]), 1)
        value, gradient = value_and_gradient(*comparison, log_p, log_q)

        # Padding alone, and no rest: there is nothing to compare with.
        no_teacher = (log_p == -torch.inf).all(1)
        value = value.masked_fill(no_teacher, 0)
        gradient = gradient.masked_fill(no_teacher[:, None], 0)
        value = value.where(total.isfinite() & ~self.poisoned[rows], torch.nan)

        # The gradient of a column outside K is its share q_v / q_rest of the rest's.
        outside = (gradient[:, -1] / rest).where(rest > 0, 0)
        return value, TopKGradient(gradient[:, :-1], outside)
