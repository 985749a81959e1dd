"""Rows that are compared by outcomes in the torch path: sums of exponentials over columns.

A block holds whole rows here, since every outcome may have columns anywhere. With ``e_v`` the
exponentials of its logits relative to the row's maximum, over T, and ``E(o)`` their sums over the
columns of each outcome, ``d = sum_o E(o)``, and the same for the teacher,

    z(o) = p(o)/q(o) - 1 = (E_t(o) - E(o) - E_t(o) (d_t - d)/d_t) / E(o)
    KD = sum_o p(o) log(1 + z(o)),    dKD/ds_v = -e_v/d z(o) / T

All comes from differences of sums, so that errors of the exponentials cancel where both sides
nearly agree, and equal sides give exactly 0. Where a sum of the student's underflows
beside a teacher that has mass there, which no ordinary row does, the row is done again with sums
relative to each outcome's own maximum.

Memory beyond a block of either side's logits: the slope, and four numbers for each of its rows and
outcomes.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._divergence import value_and_gradient, zero_nan_
from sad_kernels._rows import LossSpec, RowTargets
from sad_kernels._torch.reductions import row_sum
from sad_kernels._torch.scratch import Scratch
from sad_kernels._torch.topk import TopKRows

FAR = {torch.float32: 80.0, torch.float64: 690.0}
"""Nats of log p/q from which the student's sum may have underflowed."""
LOWEST = {torch.float32: 2.0**-24 - 1, torch.float64: 2.0**-53 - 1}
"""Of p/q - 1, so that its logarithm is finite: from there on p is nothing beside q."""
NEVER = -1e30  # log p/q of an outcome to which the teacher gives nothing, and 0 times it is 0


class Compared(NamedTuple):
    """The comparison of some rows, [n] each."""

    value: Tensor  # the bare divergence; NaN where either side has no distribution
    total: Tensor  # d
    teacher_total: Tensor  # d_t; 0 beside a top-k teacher
    slope: Tensor | None  # [n, V] dKD/ds_v times T, if asked for


class OutcomeRows:
    """Compares blocks of whole rows by outcomes."""

    def __init__(
        self, spec: LossSpec, targets: RowTargets, topk: TopKRows | None, scratch: Scratch
    ) -> None:
        assert targets.outcomes is not None and targets.teacher_outcomes is not None
        self.count, self.temperature = spec.num_outcomes, spec.objective.temperature
        self.student = targets.outcomes[: spec.vocab].long()
        self.teacher = targets.teacher_outcomes[: spec.teacher_columns].long()
        self.topk, self.scratch = topk, scratch

    @cached_property
    def log_columns(self) -> Tensor:  # [V]
        """The logarithm of how many columns each column's outcome has."""
        counts = torch.bincount(self.student, minlength=self.count)
        return counts[self.student].to(self.scratch.dtype).log()

    def compare(
        self, rows: slice, x: Tensor, hot: Tensor, hot_t: Tensor | None, with_slope: bool
    ) -> Compared:
        """Compare some rows: ``x = s - m``, ``hot = exp(x / T)``, ``hot_t`` the teacher's."""
        if hot_t is None:
            return self._with_topk(rows, x, hot, with_slope)
        E, E_t = self._sums("E", hot, self.student), self._sums("E_t", hot_t, self.teacher)
        d, d_t = row_sum(E), row_sum(E_t)
        z = torch.sub(E_t, E, out=self._like("z", E))
        B = row_sum(z)
        # p/q - 1, from d (p - q) = E_t - E - E_t (d_t - d)/d_t
        z.addcmul_(E_t, (B / d_t).neg_()[:, None]).div_(E)
        z.nan_to_num_(0.0, math.inf).clamp_(min=LOWEST[z.dtype])
        g = torch.log1p(z, out=self._like("g", E))
        far = (g.amax(1) > FAR[g.dtype]).nonzero().squeeze(1)
        value = row_sum(g.mul_(E_t)) / d_t
        slope = self._slope(hot, z, d) if with_slope else None
        if len(far):
            log_p = E_t[far].log() - d_t[far, None].log()
            log_q = self._log_sums(x[far]) - d[far, None].log()
            value[far] = zero_nan_(log_p.exp() * (log_p - log_q)).sum(1)
            if slope is not None:
                slope[far] = self._exact_slope(x[far], hot[far], d[far], log_p, log_q)
        return Compared(value + 0 * (d.log() + d_t.log()), d, d_t, slope)

    def _with_topk(self, rows: slice, x: Tensor, hot: Tensor, with_slope: bool) -> Compared:
        """The same beside a top-k teacher, whose ids are outcomes: K + 1 of them."""
        assert self.topk is not None
        # One more column, without mass, for ids that are none.
        E = self._sums("E", hot, self.student, self.count + 1)
        d, log_p = row_sum(E), self.topk.log_p[rows]
        ids = self.topk.ids[rows]
        ids = ids.where(ids >= 0, self.count)
        at_ids = E.gather(1, ids)
        rest = row_sum(E.scatter_(1, ids, 0))
        log_q = torch.cat((at_ids, rest[:, None]), 1).log_().sub_(d.log()[:, None])

        far = (log_p - log_q > FAR[log_q.dtype]).any(1).nonzero().squeeze(1)
        if len(far):
            L = torch.nn.functional.pad(self._log_sums(x[far]), (0, 1), value=-math.inf)
            inside = L.gather(1, ids[far])
            outside = L.scatter_(1, ids[far], -math.inf).logsumexp(1, keepdim=True)
            log_q[far] = torch.cat((inside, outside), 1).sub_(d[far, None].log())
        value, _ = value_and_gradient("forward_kl", 0.5, log_p, log_q)
        has_teacher = self.topk.has_teacher[rows]
        value = value.where(has_teacher.squeeze(1), 0)
        value = value.where(d.isfinite() & (d > 0) & ~self.topk.poisoned[rows], torch.nan)

        slope = None
        if with_slope:
            g = self._spread(log_p - log_q, ids, "g")
            z = g.nan_to_num_(0.0, math.inf, NEVER).mul_(has_teacher).expm1_()
            slope = self._slope(hot, z, d)
            if len(far):
                wide = (
                    self._spread(y[far], ids[far], name)[:, :-1]
                    for y, name in ((log_p, "g"), (log_q, "z"))
                )
                slope[far] = self._exact_slope(x[far], hot[far], d[far], *wide)
        return Compared(value, d, torch.zeros_like(d), slope)

    def choices(self, best: Tensor, teacher_best: Tensor) -> tuple[Tensor, Tensor]:
        """The outcomes of both sides' likeliest columns; what is below 0, of no column, stays."""
        ours = best.where(best < 0, self.student[best.clamp(min=0)])
        if self.topk is not None:
            return ours, teacher_best
        theirs = self.teacher[teacher_best.clamp(min=0)]
        return ours, teacher_best.where(teacher_best < 0, theirs)

    # --- of one block -----------------------------------------------------------------------------

    def _like(self, name: str, x: Tensor) -> Tensor:
        return self.scratch.like(f"outcomes {name}", x.shape)

    def _sums(self, name: str, hot: Tensor, table: Tensor, width: int = 0) -> Tensor:
        """The sums over the columns of each outcome, [n, count]: row by row, in a fixed order."""
        shape = hot.shape[0], width or self.count
        sums = self.scratch.like(f"outcomes {name}", shape).zero_()
        return sums.scatter_add_(1, table.expand_as(hot), hot)

    def _spread(self, y: Tensor, ids: Tensor, name: str) -> Tensor:  # [n, K + 1] -> [n, count + 1]
        """Numbers of the ids and of the rest as numbers of every outcome."""
        shape = len(y), self.count + 1
        wide = self.scratch.like(f"outcomes {name}", shape).copy_(y[:, -1:])
        return wide.scatter_(1, ids, y[:, :-1])

    def _slope(self, hot: Tensor, z: Tensor, d: Tensor) -> Tensor:  # [n, V]
        """``q_v (1 - p(o)/q(o))``, of ``z = p/q - 1``, which is overwritten."""
        factor = z.div_(-d[:, None])
        slope = torch.index_select(factor, 1, self.student, out=self._like("slope", hot))
        return slope.mul_(hot)

    # --- of rows in which a sum of the student's underflows ---------------------------------------

    def _log_sums(self, x: Tensor) -> Tensor:  # [n, V] -> [n, count]
        """``log E`` from sums relative to each outcome's maximum; -inf where it has no mass."""
        a, index = x / self.temperature, self.student.expand_as(x)
        top = a.new_full((len(a), self.count), -math.inf).scatter_reduce_(1, index, a, "amax")
        shares = zero_nan_(a.sub_(top.gather(1, index))).exp_()
        return top + torch.zeros_like(top).scatter_add_(1, index, shares).log_()

    def _exact_slope(
        self, x: Tensor, hot: Tensor, d: Tensor, log_p: Tensor, log_q: Tensor
    ) -> Tensor:
        """``q_v - p(o) q_v / q(o)`` from logarithms; columns that are all at -inf share alike."""
        index = self.student.expand_as(x)
        log_share = x / self.temperature - d.log()[:, None] - log_q.gather(1, index)
        log_share = log_share.where(~log_share.isnan(), -self.log_columns)
        return hot / d[:, None] - (log_p.gather(1, index) + log_share).exp()
