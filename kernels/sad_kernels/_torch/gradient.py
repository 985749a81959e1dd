"""The gradient of a row's loss with respect to its logits, tile by tile.

    g = up [ (ce_weight + 2 z_loss lse) q1 - ce_weight (eps/V + (1-eps) [v = y])
             + kd_weight (scale / T) (h - q sum_u h_u) ]

with ``up`` the row's upstream gradient, ``scale`` the factor on the divergence (T^2 or 1) and ``h``
as in ``_divergence.py``. The parts are added in the dtype of the arithmetic, fp32 at least, and
rounded once, where ``g`` is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sad_kernels._divergence import terms_of
from sad_kernels._rows import LossSpec
from sad_kernels._torch.statistics import SavedRows, log_softmax_, tempered_exp
from sad_kernels._torch.topk import TopKRows


class RowGradient:
    """``g`` of the tiles that made the statistics, in any order."""

    def __init__(
        self,
        spec: LossSpec,
        saved: SavedRows,
        upstream: Tensor,  # [n]
        labels: Tensor | None,  # [n]
        topk: TopKRows | None,
    ) -> None:
        objective = spec.objective
        self.spec, self.saved, self.labels, self.topk = spec, saved, labels, topk
        self.temperature = objective.temperature
        self.has_ce = objective.ce_weight > 0 or objective.z_loss > 0
        self.has_kd = objective.kd_weight > 0

        # A label outside the vocabulary has a loss of NaN, and so a gradient of NaN.
        if labels is not None:
            outside = (labels < 0) | (labels >= spec.vocab)
            upstream = upstream.masked_fill(outside, torch.nan)

        # Everything that does not depend on the column, [n], formed once.
        lse = saved.maximum + saved.total_1.log()
        ce = upstream * objective.ce_weight
        self.q1_factor = (ce + upstream * (2 * objective.z_loss) * lse) / saved.total_1
        self.label_share = ce * (1 - objective.label_smoothing)
        self.smooth_share = ce * (objective.label_smoothing / spec.vocab)
        self.kd = upstream * (objective.kd_weight * objective.kd_scale / self.temperature)

    def tile(self, rows: slice, columns: slice, s: Tensor, t: Tensor | None, u: Tensor) -> Tensor:
        """Overwrite the logits ``s`` with their gradient; ``t`` and ``u`` are scratch."""
        maximum = self.saved.maximum[rows, None]
        if not self.has_kd:  # CE and z-loss alone, from one exponential
            return self._untempered(rows, columns, tempered_exp(s.sub_(maximum), 1.0, out=s))
        # A dense teacher: from log-probabilities, but for the forward KL, which needs none.
        if t is not None and self.spec.objective.divergence != "forward_kl":
            kd = self._any_divergence(rows, s, t, u)
            g = self._untempered(rows, columns, tempered_exp(s.sub_(maximum), 1.0, out=s))
            return g.add_(kd)
        if t is None:  # a top-k teacher
            u.copy_(s)
            g = self._untempered(rows, columns, tempered_exp(s.sub_(maximum), 1.0, out=s))
            return self._add_topk(rows, columns, g, u)

        # The forward KL: at T = 1 one exponential of the student serves CE and KD.
        tempered_exp(s.sub_(maximum), self.temperature, out=u)
        g = s.copy_(u) if self.temperature == 1 else tempered_exp(s, 1.0, out=s)
        return self._add_forward_kl(rows, self._untempered(rows, columns, g), u, t)

    def _untempered(self, rows: slice, columns: slice, g: Tensor) -> Tensor:
        """CE and z-loss, in place of ``exp(s - maximum)``."""
        if not self.has_ce:
            return g.zero_()
        g.mul_(self.q1_factor[rows, None])
        if self.spec.objective.label_smoothing > 0:
            g.sub_(self.smooth_share[rows, None])

        # Subtract the label's share in its column, if that lies in this tile.
        column = self.labels[rows] - columns.start
        here = (column >= 0) & (column < g.shape[1])
        index = column.clamp(0, g.shape[1] - 1)[:, None]
        share = self.label_share[rows].where(here, 0)[:, None]
        return g.scatter_(1, index, g.gather(1, index) - share)

    def _any_divergence(self, rows: slice, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """The KD part for a dense teacher, from log-probabilities; ``s`` stays as it is."""
        objective, saved = self.spec.objective, self.saved
        log_q = log_softmax_(u.copy_(s), saved.maximum[rows], saved.total[rows], self.temperature)
        log_p = log_softmax_(
            t, saved.teacher_maximum[rows], saved.teacher_total[rows], self.temperature
        )
        _, h = terms_of(objective.divergence)(objective.beta, log_q, log_p)
        q = log_q.exp_()
        return h.sub_(q.mul_(saved.expectation[rows, None])).mul_(self.kd[rows, None])

    def _add_forward_kl(self, rows: slice, g: Tensor, u: Tensor, t: Tensor) -> Tensor:
        """Add the KD part ``q - p``: ``h = -p``, so no logarithm is needed."""
        saved, kd = self.saved, self.kd[rows]
        g.addcmul_(u, (kd / saved.total[rows])[:, None])
        tempered_exp(t.sub_(saved.teacher_maximum[rows, None]), self.temperature, out=u)
        return g.addcmul_(u, (kd / saved.teacher_total[rows])[:, None], value=-1)

    def _add_topk(self, rows: slice, columns: slice, g: Tensor, u: Tensor) -> Tensor:
        """Add the KD part of a top-k teacher: ``TopKGradient`` has the formula."""
        saved, kd = self.saved, self.kd[rows]
        row, k, column = self.topk.positions(rows, columns)
        u[row, column] = -torch.inf
        tempered_exp(u.sub_(saved.rest_maximum[rows, None]), self.temperature, out=u)
        g.addcmul_(u, (kd * saved.topk_outside[rows])[:, None])
        g[row, column] += kd[row] * saved.topk_inside[rows][row, k]
        return g
