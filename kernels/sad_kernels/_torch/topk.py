"""A top-k teacher's rows in the torch path: K + 1 outcomes, the ids and everything else.

The student's share of everything else comes from its own sum over the columns outside K, relative
to their own maximum. Taking ``1 - sum_K q`` instead would cancel: in fp32 it is 11 % off at 1e-6.
And a sum relative to the row's maximum underflows where the student is sure of an id: at e^-104 the
divergence would be infinite. Only with ``tail="zero"``, where the rest's own maximum decides
nothing, is the row's taken in its place.

So the K columns of a row are taken out of its blocks and are K separate numbers. What is left has
one exponential per column, for CE and divergence, and one factor per row in the gradient; the
gradient at the ids is formed apart and written over.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._divergence import teacher_outcomes, value_and_gradient
from sad_kernels.objective import Tail


class IdColumns(NamedTuple):
    """Where the ids of some rows are in a block of logits, [rows, K] each.

    An id that lies elsewhere stands for one of its row that is here, or, in a row of which none is
    here, for the first column: so that all are written at once, no matter in which order.
    """

    column: Tensor
    k: Tensor | None  # which of the ids is in that column; None: all are here
    here: Tensor  # bool
    some: Tensor  # [rows, 1] bool, whether any is here

    def put_(self, x: Tensor, values: Tensor | float) -> Tensor:
        """Write values, [rows, K] or one, into ``x`` where the ids are; return ``x``."""
        if not isinstance(values, Tensor):
            values = x.new_full((), values)
        elif self.k is not None:
            values = values.gather(1, self.k)
        if self.k is not None:
            values = values.where(self.some, x[:, :1])
        return x.scatter_(1, self.column, values.expand_as(self.column))

    def at(self, rows: slice) -> IdColumns:
        """Those of some of the rows, as views."""
        k = None if self.k is None else self.k[rows]
        return IdColumns(self.column[rows], k, self.here[rows], self.some[rows])


class TopKGradient(NamedTuple):
    """The gradient ``dD/dz`` of the bare divergence, times T, by the student's logits."""

    inside: Tensor  # [n, K], in the columns of the ids
    outside: Tensor  # [n], times exp((s - rest_maximum) / T) in all other columns


class TopKRows:
    """The ids of n rows, and the student's logits there, collected while tiles pass by."""

    def __init__(self, ids: Tensor, log_probs: Tensor, tail: Tail, vocab: int, like: Tensor):
        self.log_probs = log_probs.to(like.dtype)
        # Foreign and repeated ids poison their row; padding and foreign ids get the id -1.
        self.ids = ids.long()
        self.poisoned = torch.zeros_like(ids[:, 0], dtype=torch.bool)  # [n]
        self.all_known = _all_lie_in(self.ids, 0, vocab) and _all_are_finite(self.log_probs)
        if not self.all_known:
            present = self.log_probs != -torch.inf  # [n, K]; -inf marks padding
            known = (ids >= 0) & (ids < vocab) & self.log_probs.isfinite()
            self.ids = self.ids.where(present & known, -1)
            self.poisoned = (present & ~known).any(1)
        self.poisoned = self.poisoned | self._has_repeated_ids()
        log_p, log_p_rest = teacher_outcomes(self.log_probs, tail, vocab)
        self.log_p = torch.cat((log_p, log_p_rest[:, None]), 1)  # [n, K + 1]
        self.vocab = vocab
        # Padding alone, and no rest: there is nothing to compare with.
        self.has_teacher = (self.log_p != -torch.inf).any(1, keepdim=True)  # [n, 1]
        self.rest_has_mass = tail == "bucket"
        self.logits = torch.full_like(self.log_probs, -torch.inf)

    def _has_repeated_ids(self) -> Tensor:  # [n]
        ordered = _sorted(self.ids)
        return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)

    def columns_of(self, rows: slice, columns: slice) -> IdColumns:
        """Where in a block the ids are."""
        if columns.start == 0 and columns.stop == self.vocab:
            return self.in_whole_rows.at(rows)
        return self._columns_of(self.ids[rows], columns.start, columns.stop)

    @cached_property
    def in_whole_rows(self) -> IdColumns:
        """Where the ids are in a block of all columns."""
        if not self.all_known:
            return self._columns_of(self.ids, 0, self.vocab)
        here = torch.ones((), dtype=torch.bool, device=self.ids.device).expand_as(self.ids)
        return IdColumns(self.ids, None, here, here[:, :1])

    def _columns_of(self, ids: Tensor, start: int, stop: int) -> IdColumns:
        column = ids - start
        here = (column >= 0) & (column < stop - start)
        column.masked_fill_(~here, -1)
        last, of_last = column.max(1, keepdim=True)
        k = torch.arange(column.shape[1], device=column.device).where(here, of_last)
        torch.where(here, column, last.clamp(min=0), out=column)
        return IdColumns(column, k, here, last >= 0)

    def note_logits(self, rows: slice, columns: slice, s: Tensor) -> IdColumns:
        """Keep the student's logits at the ids of this block; return where they are."""
        at, logits = self.columns_of(rows, columns), self.logits[rows]
        if at.k is None:
            torch.gather(s, 1, at.column, out=logits)
        else:
            torch.where(at.here, s.gather(1, at.column), logits, out=logits)
        return at

    def below(self, maximum: Tensor, rows: slice, at: IdColumns) -> Tensor:  # [rows, K]
        """``s - maximum`` at the ids that are here, -inf for the others."""
        below = self.logits[rows] - maximum[:, None]
        return below if at.k is None else below.where(at.here, -torch.inf)

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
        at_ids = (self.logits[rows] - maximum[:, None]).div_(temperature)
        below = (rest_maximum - maximum).div_(temperature)
        total = rest * below.exp() + at_ids.exp().sum(1)
        log_q = torch.cat((at_ids, (below + rest.log())[:, None]), 1).sub_(total.log()[:, None])
        value, gradient = value_and_gradient(*comparison, self.log_p[rows], log_q)

        if not self.all_known:
            has_teacher = self.has_teacher[rows]
            value = value.where(has_teacher.squeeze(1), 0)
            gradient = gradient.where(has_teacher, 0)
        value = value.where(total.isfinite() & ~self.poisoned[rows], torch.nan)

        # The gradient of a column outside K is its share q_v / q_rest of the rest's.
        outside = (gradient[:, -1] / rest).where(rest > 0, 0)
        return value, TopKGradient(gradient[:, :-1], outside)


def _all_lie_in(ids: Tensor, start: int, stop: int) -> bool:
    """Whether all ids are those of columns from ``start`` up to ``stop``."""
    if not ids.numel():
        return True
    lowest, highest = ids.aminmax()
    return bool(lowest >= start) and bool(highest < stop)


def _all_are_finite(x: Tensor) -> bool:
    if not x.numel():
        return True
    lowest, highest = x.aminmax()  # NaN if any is
    return bool(lowest.isfinite()) and bool(highest.isfinite())


def _sorted(ids: Tensor) -> Tensor:
    """Each row in rising order. On a CPU by NumPy, which takes a tenth of the time of ``sort``: it
    does not keep where each id was."""
    if ids.device.type != "cpu":
        return ids.sort(1).values
    ordered = ids.clone()
    ordered.numpy().sort(1)  # in the tensor's own memory
    return ordered
