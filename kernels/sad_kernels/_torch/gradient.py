"""The gradient of a row's loss with respect to its logits, block by block.

    g = up [ ce_weight w (C q1 - a) + 2 z_loss w lse q1 + kd_weight w_kd (scale / T) G ]

with ``up`` the row's upstream gradient, ``w`` and ``w_kd`` the token's weights, ``a_v`` what CE
weights class v by and C its sum, ``scale`` the factor on the divergence (T^2 or 1), and ``G`` the
gradient of the bare divergence, times T:

    forward KL    q - p = (e^(x/T) - e^(y/T) + e^(x/T) B/d) / d_t  if B > -d/2
                        = (e^(x/T) - e^(y/T) + e^(y/T) B/d_t) / d  otherwise
    reverse KL    q ((k - y + x)/T - A'/(T d))
    any other     q (phi - phi_y) - q sum_u q_u (phi_u - phi_y)        see ``_divergence.py``

with ``x, y, k, d, d_t, A', B`` of ``statistics.py``: no logarithm, and differences of numbers that
are exact. The parts are added in the dtype of the arithmetic, fp32 at least, and rounded once,
where ``g`` is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sad_kernels._divergence import zero_nan_
from sad_kernels._rows import LossSpec, RowTargets
from sad_kernels._torch.scratch import Scratch
from sad_kernels._torch.statistics import (
    Block,
    Comparison,
    LabelColumns,
    RowSums,
    Shifted,
    from_best,
    label_shares,
    log_ratio,
    plain_weights,
    slopes,
)
from sad_kernels._torch.topk import IdColumns, TopKRows

Parts = list[tuple[Tensor, Tensor | float]]
"""Summands of a gradient: a tensor [rows, columns], and its factor, one for each row or for all."""


class RowGradient:
    """``g`` of the blocks that made the statistics, in any order."""

    def __init__(
        self,
        spec: LossSpec,
        targets: RowTargets,
        upstream: Tensor,  # [n]
        topk: TopKRows | None,
        inside: Tensor | None,  # [n, K] of a TopKGradient
        scratch: Scratch,
    ) -> None:
        objective = spec.objective
        self.spec, self.targets, self.topk, self.inside = spec, targets, topk, inside
        self.temperature, self.scratch = objective.temperature, scratch
        self.has_ce = objective.ce_weight > 0 and (
            targets.labels is not None or targets.soft is not None
        )
        self.has_z = objective.z_loss > 0
        self.labels = LabelColumns(targets.labels)

        # A label outside the vocabulary has a loss of NaN, and so a gradient of NaN.
        if targets.labels is not None:
            outside = (targets.labels < 0) | (targets.labels >= spec.vocab)
            upstream = upstream.masked_fill(outside, torch.nan)
        weighted = upstream
        if targets.token_weights is not None:
            weighted = upstream * targets.token_weights
        self.ce, self.z = weighted * objective.ce_weight, weighted * (2 * objective.z_loss)
        self.label_share = self.ce * label_shares(spec, targets, weighted)
        self.kd = upstream * (objective.kd_weight * objective.kd_scale / self.temperature)
        if targets.kd_weights is not None:
            self.kd = self.kd * targets.kd_weights

    @property
    def has_untempered(self) -> bool:
        """Whether there are parts at temperature 1: CE or z-loss."""
        return self.has_ce or self.has_z

    @property
    def reads_teacher(self) -> bool:
        return self.spec.objective.kd_weight > 0

    def block(self, shifted: Shifted, sums: RowSums, slope: Tensor | None = None) -> Tensor:
        """The gradient of a block's logits, in the place of ``x``.

        ``sums`` are those of its rows, ``slope`` what ``RowStatistics.add_terms`` has returned, if
        it is still there.
        """
        rows, comparison = shifted.block.rows, shifted.block.comparison
        if shifted.at is not None:
            return self._beside_ids(shifted.at, shifted, sums)
        parts: Parts = []
        factor = torch.zeros_like(sums.total)
        if comparison is not None and self.reads_teacher:
            # A weight of 0 hides what it multiplies, but not a side that is NaN.
            factor = self.kd[rows] + 0 * (sums.total + sums.teacher_total)
            # Before CE and z-loss, which overwrite x.
            if shifted.slope is not None:
                parts = [(shifted.slope, 1.0)]
            elif comparison.kl_weights is not None:
                parts = self._kl(comparison.kl_weights, shifted, sums)
            else:
                parts = self._any(comparison, shifted, sums, slope)
        g = self._untempered(shifted, sums)
        for part, share in parts:
            by = (factor * share)[:, None]
            g = torch.mul(part, by, out=shifted.x) if g is None else g.addcmul_(part, by)
        return shifted.x.zero_() if g is None else g

    def _untempered(self, shifted: Shifted, sums: RowSums) -> Tensor | None:
        """CE and z-loss, in the place of ``x``; None if there is neither."""
        if not self.has_untempered:
            return None
        x, warm = shifted.x, shifted.warm
        assert warm is not None
        factor, weights = self._factors(shifted.block, sums)
        factor = (factor / sums.total_1)[:, None]
        if isinstance(weights, float):
            less = (self.ce[shifted.block.rows] * -weights)[:, None]
            g = torch.addcmul(less, warm, factor, out=x)
            weights = None
        else:
            g = torch.mul(warm, factor, out=x)
        return self._less_shares(g, shifted.block, weights)

    def _factors(self, block: Block, sums: RowSums) -> tuple[Tensor, Tensor | float | None]:
        """What CE and z-loss multiply ``q1`` by, [rows], and what CE weights every class by."""
        rows = block.rows
        factor = torch.zeros_like(sums.total_1)
        weights = None
        if self.has_ce:
            factor = self.label_share[rows] if self.targets.labels is not None else factor
            weights = plain_weights(self.spec, self.targets, block, factor.dtype)
            if isinstance(weights, float):
                factor = self.ce[rows]  # all shares of a label without class weights: 1
            else:
                factor = factor + self.ce[rows] * sums.plain_weight
        if self.has_z:
            factor = factor + self.z[rows] * (sums.maximum + sums.total_1.log())
        return factor, weights

    def _less_shares(self, g: Tensor, block: Block, weights: Tensor | float | None) -> Tensor:
        """Subtract what CE weights every class by, and the share of each row's label."""
        rows, columns = block.rows, block.columns
        if isinstance(weights, float):
            g.sub_((self.ce[rows] * weights)[:, None])
        elif weights is not None:
            g.sub_(weights * self.ce[rows, None])
        if not self.has_ce or self.targets.labels is None:
            return g

        # Subtract the label's share in its column, if that lies in this block.
        index, here = self.labels.at(rows, columns)
        share = self.label_share[rows].where(here, 0)[:, None]
        return g.scatter_(1, index, g.gather(1, index) - share)

    def _kl(self, weights: tuple[float, float], shifted: Shifted, sums: RowSums) -> Parts:
        """A weighted sum of the gradients of both KLs."""
        on_forward, on_reverse = weights
        hot, hot_t, T = shifted.hot, shifted.hot_t, self.temperature
        assert hot is not None and hot_t is not None
        d, d_t = sums.total, sums.teacher_total
        parts: Parts = []
        if on_forward > 0 and shifted.block.gap is not None:
            # p - q by their ratio: between them lies less than rounding leaves of a target.
            gap = log_ratio(sums, shifted, T, out=self.scratch.like("u", hot.shape))
            fall = gap.abs().neg_().expm1_()
            larger = torch.maximum(hot / d[:, None], hot_t / d_t[:, None])
            total = zero_nan_(torch.copysign(fall.mul_(larger), gap, out=fall))
            parts.append((total, -on_forward))
        elif on_forward > 0:
            apart = shifted.difference
            if apart is None:
                apart = torch.sub(hot_t, hot, out=self.scratch.like("u", hot.shape))
            # By the student's exponential, or by the teacher's where its sum is far lower: one of
            # both in a row, so that no row changes the sign of another's zeros.
            by_student = sums.difference > -d / 2
            share = on_forward / d_t.where(by_student, d)
            either = hot
            if not by_student.all():
                out = self.scratch.like("either", hot.shape)
                either = torch.where(by_student[:, None], hot, hot_t, out=out)
            own = sums.difference / d.where(by_student, d_t) * share
            parts += [(apart, -share), (either, own)]
        if on_reverse > 0:
            apart = from_best(sums, shifted, out=self.scratch.like("v", hot.shape))
            # Where q is 0 nothing is left, whatever the gap is.
            part = apart.add_((sums.cross_student / sums.total)[:, None]).mul_(hot)
            parts.append((zero_nan_(part), -on_reverse / T / d))
        return parts

    def _any(
        self, comparison: Comparison, shifted: Shifted, sums: RowSums, slope: Tensor | None
    ) -> Parts:
        """The gradient of a divergence that is no KL."""
        hot = shifted.hot
        assert hot is not None
        if slope is None:
            q = torch.div(hot, sums.total[:, None], out=self.scratch.like("q", hot.shape))
            slope = slopes(comparison, sums, shifted, self.temperature, q, self.scratch)
        return [(slope, 1.0), (hot, -sums.expectation / sums.total)]

    def _beside_ids(self, at: IdColumns, shifted: Shifted, sums: RowSums) -> Tensor:
        """The gradient of a block beside a top-k teacher, in the place of ``x``: one factor for
        all columns but those of the ids, see ``TopKGradient``, which are written by themselves."""
        assert self.topk is not None and self.inside is not None and shifted.hot is not None
        rows, x, hot, warm = shifted.block.rows, shifted.x, shifted.hot, shifted.warm
        outside, inside = torch.zeros_like(sums.outside), torch.zeros_like(self.inside[rows])
        if self.reads_teacher:
            kd = self.kd[rows]
            outside, inside = kd * sums.outside, kd[:, None] * self.inside[rows]
        if not self.has_untempered:
            return at.put_(torch.mul(hot, outside[:, None], out=x), inside)
        assert warm is not None
        factor, weights = self._factors(shifted.block, sums)
        factor = factor / sums.total_1
        inside += self.topk.below(sums.maximum, rows, at).exp_() * factor[:, None]
        factor = factor * (sums.rest_maximum - sums.maximum).exp()
        if warm is hot:
            g = torch.mul(hot, (factor + outside)[:, None], out=x)
        else:
            g = torch.mul(warm, factor[:, None], out=x).addcmul_(hot, outside[:, None])
        return self._less_shares(at.put_(g, inside), shifted.block, weights)
