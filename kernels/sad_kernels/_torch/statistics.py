"""Online softmax statistics of rows whose logits arrive in blocks, and the losses they give.

Every sum is kept relative to the running maxima ``m`` of its row, which stay apart from the sums:
large numbers are never subtracted from each other, so an offset of 1e4 costs nothing. With
``x = s - m`` and ``y = t - m_t``, when a maximum moves by ``move = m_old - m_new <= 0``,
``r = e^(move/T)`` and ``r_t`` likewise for the teacher:

=======================  ==============================  =======================================
sum over columns         after a move                    gives
=======================  ==============================  =======================================
d = sum e^(x/T)          d r                             log-normaliser  log d
P = sum a x              P + C move                      sum of a (lse - s) = C log d - P (T = 1)
C = sum a                C                               (a: what CE weights a class by)
E = sum e^x x            (E + d move) r                  entropy  log d - E/d  (T = 1)
A = sum e^(y/T) (y - x)  (A + d_t (move_t - move)) r_t   KL(p||q) = A/(T d_t) - log(d_t/d)
A' = sum e^(x/T) (k - y + x)  (A' + d change of k) r    KL(q||p) = (A'/d - k)/T + log(d_t/d)
B = sum (e^(y/T) - e^(x/T))  B r + d_t (r_t - r)         log(d_t/d) = log(1 + B/d)
=======================  ==============================  =======================================

``k`` is ``y - x`` in the column with the student's maximum: A' counts from it, because what the
student is sure of would otherwise be added up and subtracted again. B keeps the digits of
``d_t - d``, which are lost between two sums that agree. Maxima start at
-1e30, not at -inf, so a block of only -inf adds 0 and not NaN. Weight 0 adds 0, whatever it
multiplies, -inf included. NaN and +inf reach the sums ``d`` of their own row and poison it. A
divergence that is no KL is summed term by term: it must know both ``d`` first, and has a second
reading of the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._divergence import counted_from, terms_of, weighted_slope, zero_nan_
from sad_kernels._divergence_table import DIVERGENCES
from sad_kernels._rows import LossSpec, RowResults, RowTargets
from sad_kernels._torch.outcomes import OutcomeRows
from sad_kernels._torch.reductions import max_and_first, row_nansum, row_sum
from sad_kernels._torch.scratch import Scratch
from sad_kernels._torch.topk import IdColumns, TopKRows

LOWEST = -1e30
ROUNDING = 1e-5  # nats: a divergence in (-ROUNDING, 0) is a rounded zero; lower ones stay visible


class Comparison(NamedTuple):
    """The divergence of some rows, and what decides how it is computed."""

    divergence: str
    beta: float

    @property
    def counts_from_best(self) -> bool:
        """Whether the teacher's logit in the column with the student's maximum takes part."""
        return self.kl_weights is None or self.kl_weights[1] > 0

    @property
    def kl_weights(self) -> tuple[float, float] | None:
        """The weights of KL(p || q) and KL(q || p); None if it is no sum of them."""
        weights = DIVERGENCES[self.divergence].kl_weights
        return None if weights is None else weights(self.beta)


class Block(NamedTuple):
    """Logits of some rows and columns, and what its rows are compared with."""

    rows: slice
    columns: slice
    s: Tensor  # [rows, columns], overwritten unless lent
    t: Tensor | None  # of a dense teacher, likewise
    gap: Tensor | None  # share (t - s), where the target is not the teacher itself
    comparison: Comparison | None  # None: no teacher in these rows
    is_coarse: bool = False  # the logits are known to 16 bits
    is_lent: tuple[bool, bool] = (False, False)  # whether s and t are the caller's own


class Shifted(NamedTuple):
    """A block relative to the maxima of its rows, with exponentials.

    Beside a top-k teacher ``x`` counts from ``rest_maximum``, and says nothing in the columns of
    the ids: their logits are in ``TopKRows``.
    """

    block: Block
    x: Tensor  # s - m
    y: Tensor | None = None  # t - m_t
    hot: Tensor | None = None  # exp(x / T)
    hot_t: Tensor | None = None  # exp(y / T)
    warm: Tensor | None = None  # exp(x), where CE, z-loss or entropy ask for it
    at: IdColumns | None = None  # of a top-k teacher's ids
    slope: Tensor | None = None  # dKD/ds times T of rows that are compared by outcomes
    difference: Tensor | None = None  # hot_t - hot, if it is still there


class RowSums(NamedTuple):
    """The statistics of rows, [n] each, by which losses and gradients are formed.

    Of a vocabulary that is split over processes ``shards.py`` makes them from each shard's own.
    """

    maximum: Tensor  # m
    total: Tensor  # d at T
    total_1: Tensor  # d at 1
    teacher_maximum: Tensor
    teacher_total: Tensor
    at_best: Tensor  # t, or the gap where there is one, in the column of the maximum
    cross: Tensor  # A
    cross_student: Tensor  # A'
    difference: Tensor  # B
    expectation: Tensor  # sum of q (phi - phi_y)
    rest_maximum: Tensor  # of the student outside a top-k teacher's ids
    rest_total: Tensor  # sum of exp((s - rest_maximum) / T) there
    outside: Tensor  # see TopKGradient
    plain_weight: Tensor  # C
    label_logit: Tensor  # s_y
    weighted: Tensor  # E
    plain: Tensor  # P
    value: Tensor  # of a divergence that is no KL

    @property
    def gap_of_sums(self) -> Tensor:
        """``log d - log d_t``, exact near 0."""
        d, B = self.total, self.difference
        exact = torch.log1p(B / d)
        return -exact.where(B.abs() < d / 2, self.teacher_total.log() - d.log())

    def gap_at_best(self, has_gap: bool) -> Tensor:
        """``k``: ``y - x``, or ``share (t - s)``, in the column with the student's maximum."""
        k = self.at_best if has_gap else self.at_best - self.teacher_maximum
        return k.where(k.isfinite(), 0)  # a teacher's -inf: any other column will do

    def log_ratio_at_best(self, temperature: float, has_gap: bool) -> Tensor:
        """``log p/q`` there."""
        return self.gap_at_best(has_gap) / temperature + self.offset(temperature, has_gap)

    def offset(self, temperature: float, has_gap: bool) -> Tensor:
        """``log p/q`` less the gap over T: ``y - x``, or ``share (t - s)`` where there is one."""
        if not has_gap:
            return self.gap_of_sums
        return (self.maximum - self.teacher_maximum) / temperature + self.gap_of_sums


GRADIENT_SUMS = RowSums._fields.index("label_logit")
"""The fields before this one are what a gradient is made of."""


class SumTable:
    """The sums of n rows: one tensor [fields, n], of which a ``RowSums`` has views.

    It may end before the fields that a gradient does not need.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self._last: tuple[slice, RowSums] | None = None

    def at(self, rows: slice) -> RowSums:
        """The sums of some rows, as views, kept while these rows are worked on."""
        if self._last is None or self._last[0] != rows:
            views = self.table[:, rows].unbind(0)
            absent = len(RowSums._fields) - len(views)
            self._last = rows, RowSums(*views, *(views[0].new_empty(0),) * absent)
        return self._last[1]


class RowStatistics:
    """Accumulates the statistics of n rows over blocks of their logits, and makes losses of them.

    Call ``add`` with every block once; then for those with a ``Comparison`` that ``reads_twice``
    ``add_terms`` with every block again, shifted by ``shift``; then ``finish``. Columns are those
    of the whole vocabulary, of which the blocks of a shard are a part. Labels may lie outside of
    it.
    """

    def __init__(
        self,
        spec: LossSpec,
        targets: RowTargets,
        groups: list[tuple[slice, Comparison | None]],
        topk: TopKRows | None,
        like: Tensor,  # [n]
        scratch: Scratch,
    ) -> None:
        self.spec, self.targets, self.groups, self.topk = spec, targets, groups, topk
        self.temperature, self.scratch = spec.objective.temperature, scratch
        self.table = SumTable(like.new_zeros(len(RowSums._fields), len(like)))
        self.sums = self.table.at(slice(0, len(like)))
        for maximum in (self.sums.maximum, self.sums.teacher_maximum, self.sums.rest_maximum):
            maximum.fill_(LOWEST)
        self.sums.label_logit.fill_(torch.nan)
        self.labels = LabelColumns(targets.labels)
        self.outcomes = None
        if spec.num_outcomes:
            self.outcomes = OutcomeRows(spec, targets, topk, scratch)
        self.inside = None if topk is None else torch.zeros_like(topk.log_probs)
        self.best = torch.full_like(like, -1, dtype=torch.long)
        self.teacher_best = torch.full_like(self.best, -2)  # agrees with nothing

    def at(self, rows: slice) -> RowSums:
        """The sums of some rows, as views."""
        return self.table.at(rows)

    # --- first reading ----------------------------------------------------------------------------

    def add(self, block: Block, with_slope: bool = False) -> Shifted:
        """Update every sum of these rows with one block; return it relative to the new maxima,
        where outcomes are compared with the slope, if asked for."""
        rows, columns, s, t, gap, comparison, *_ = block
        sums = self.at(rows)
        # The label's and the ids' logits are picked while the block still holds logits.
        self._note_label(sums, rows, columns, s)
        if comparison is not None and self.outcomes is not None:
            return self._add_outcomes(block, sums, self.outcomes, with_slope)
        if comparison is not None and self.topk is not None:
            return self._add_beside_ids(block, sums, self.topk)

        looks_on, before = None, sums.at_best.clone()
        if comparison is not None and comparison.counts_from_best:
            looks_on = gap if gap is not None else t
        move = self._raise(sums.maximum, self.best[rows], columns, s, looks_on, sums.at_best)
        move_t = None
        if t is not None:
            move_t = self._raise(sums.teacher_maximum, self.teacher_best[rows], columns, t)
        shifted = self._shift(block, sums)
        if self.spec.compute_ce:
            self._add_untempered(sums, shifted, move)
            self._add_plain(sums, block, shifted.x, move)
        if t is None:
            return shifted
        # Last, because it leaves a buffer that the gradient takes up.
        return self._add_both(sums, shifted, move, move_t, before)

    def _add_outcomes(
        self, block: Block, sums: RowSums, outcomes: OutcomeRows, with_slope: bool
    ) -> Shifted:
        """The same for whole rows that are compared by outcomes."""
        rows, columns, s, t, *_ = block
        move = self._raise(sums.maximum, self.best[rows], columns, s)
        if t is not None:
            self._raise(sums.teacher_maximum, self.teacher_best[rows], columns, t)
        shifted = self._shift(block, sums)
        assert shifted.hot is not None
        compared = outcomes.compare(rows, shifted.x, shifted.hot, shifted.hot_t, with_slope)
        sums.value.copy_(compared.value)
        sums.total.copy_(compared.total)
        sums.teacher_total.copy_(compared.teacher_total)
        if self.spec.compute_ce:
            self._add_untempered(sums, shifted, move)
            self._add_plain(sums, block, shifted.x, move)
        return shifted._replace(slope=compared.slope)

    def _shift(self, block: Block, sums: RowSums, at: IdColumns | None = None) -> Shifted:
        tempered = self.outcomes is not None and block.comparison is not None
        return shift(
            block, sums, self.temperature, self.scratch, at, self.spec.compute_ce, tempered
        )

    def _note_label(self, sums: RowSums, rows: slice, columns: slice, s: Tensor) -> None:
        """Keep the logit of each label that lies in this block."""
        if self.targets.labels is None or not self.spec.compute_ce:
            return
        index, here = self.labels.at(rows, columns)
        logit = s.gather(1, index).squeeze(1)
        sums.label_logit.copy_(logit.where(here, sums.label_logit))

    def _raise(
        self,
        maximum: Tensor,  # [rows], updated
        best: Tensor,  # [rows], its column, ties to the left, updated
        columns: slice,
        x: Tensor,
        other: Tensor | None = None,  # [rows, columns], of which the same column is kept
        kept: Tensor | None = None,  # [rows], there
    ) -> Tensor | None:  # [rows]
        """Raise the maxima; return how far they moved, as numbers <= 0, or None from LOWEST, which
        leaves nothing of the sums so far."""
        is_first = columns.start == self.spec.first
        looks = other is not None or self.spec.compute_metrics
        if is_first and looks:
            top, column = max_and_first(x)
            torch.maximum(maximum, top, out=maximum)
            raised = maximum > LOWEST
            best.copy_((column + columns.start).where(raised, best))
            if other is not None and kept is not None:
                there = other.gather(1, column[:, None]).squeeze(1)
                kept.copy_(there.where(raised, kept))
            return None
        before = maximum.clone()
        torch.maximum(before, x.amax(1), out=maximum)
        if looks:
            # Few further slices raise a row's maximum. Look only where one does.
            raised = (maximum > before).nonzero().squeeze(1)
            _, column = max_and_first(x[raised])
            best[raised] = column + columns.start
            if other is not None and kept is not None:
                kept[raised] = other[raised, column]
        return None if is_first else before.sub_(maximum)

    def _add_both(
        self,
        sums: RowSums,
        shifted: Shifted,
        move: Tensor | None,
        move_t: Tensor | None,
        at_best: Tensor,  # [rows], before this block
    ) -> Shifted:
        """Both sums ``d``, their difference, and for a KL the cross sums; return the block with the
        difference in every column."""
        block, x, y, hot, hot_t, *_ = shifted
        assert y is not None and hot is not None and hot_t is not None
        assert block.comparison is not None
        u = self.scratch.like("u", x.shape)

        cross = cross_student = None
        weights = block.comparison.kl_weights
        if weights is not None:
            # nansum: what is not a number here is 0 * inf, a weight of 0. NaNs show in the totals.
            if weights[0] > 0:
                cross = row_nansum(towards_teacher(sums, shifted, out=u).mul_(hot_t))  # y - x
            if weights[1] > 0:
                cross_student = row_nansum(from_best(sums, shifted, out=u).mul_(hot)).neg_()
        apart = self._differences(sums, shifted)
        difference, total, teacher_total = row_sum(apart), row_sum(hot), row_sum(hot_t)

        if move is not None and move_t is not None:
            # The cross sums are rescaled by the totals from before this block.
            T, d_t = self.temperature, sums.teacher_total
            r, r_t = (move / T).exp_(), (move_t / T).exp_()
            if cross is not None:
                cross += ((sums.cross + d_t * (move_t - move)) * r_t).where(r_t > 0, 0)
            if cross_student is not None:
                change = sums.at_best - at_best  # of k; where it is infinite, so is the divergence
                change = change if block.gap is not None else change + move
                change = change.nan_to_num(0.0, 0.0, 0.0)
                moved = (sums.cross_student + sums.total * change) * r
                cross_student += moved.where(r > 0, 0)
            difference += sums.difference * r + d_t * (r_t - r)
            total += sums.total * r
            teacher_total += d_t * r_t
        if cross is not None:
            sums.cross.copy_(cross)
        if cross_student is not None:
            sums.cross_student.copy_(cross_student)
        sums.difference.copy_(difference)
        sums.total.copy_(total)
        sums.teacher_total.copy_(teacher_total)
        return shifted._replace(difference=None if block.gap is not None else apart)

    def _differences(self, sums: RowSums, shifted: Shifted) -> Tensor:
        """``e^(y/T) - e^(x/T)``; by their ratio where the gap of the logits is known better."""
        _, x, _, hot, hot_t, *_ = shifted
        assert hot is not None and hot_t is not None
        u = self.scratch.like("u", x.shape)
        if shifted.block.gap is None:
            return torch.sub(hot_t, hot, out=u)
        apart = towards_teacher(sums, shifted, out=u).mul_(1 / self.temperature)
        fall = apart.abs().neg_().expm1_().neg_()
        return zero_nan_(torch.copysign(fall.mul_(torch.maximum(hot, hot_t)), apart, out=u))

    def _add_beside_ids(self, block: Block, sums: RowSums, topk: TopKRows) -> Shifted:
        """The same beside a top-k teacher: the columns of its ids are taken out of the block, and
        the others have a maximum and a sum of their own, which CE's sums are made from as well."""
        rows, columns, s = block.rows, block.columns, block.s
        at = topk.note_logits(rows, columns, s)
        move = self._raise(sums.maximum, self.best[rows], columns, s)
        if (
            self.spec.compute_ce
            and plain_weights(self.spec, self.targets, block, s.dtype) is not None
        ):
            x = torch.sub(s, sums.maximum[:, None], out=self.scratch.like("u", s.shape))
            self._add_plain(sums, block, x, move)
        at.put_(s, -torch.inf)
        before = sums.rest_maximum.clone()
        if topk.rest_has_mass:
            torch.maximum(before, s.amax(1), out=sums.rest_maximum)
        else:  # beside the teacher's 0 no digits of a small rest are needed
            sums.rest_maximum.copy_(sums.maximum)
        shifted = self._shift(block, sums, at)
        assert shifted.hot is not None
        rest = row_sum(shifted.hot)
        if move is None:
            sums.rest_total.copy_(rest)
        else:
            r = (before.sub_(sums.rest_maximum) / self.temperature).exp_()
            sums.rest_total.mul_(r).add_(rest)
        if self.spec.compute_ce:
            self._add_untempered(sums, shifted, move, rest)
        return shifted

    def _add_untempered(
        self, sums: RowSums, shifted: Shifted, move: Tensor | None, hot_sum: Tensor | None = None
    ) -> None:
        """The sums at temperature 1. ``hot_sum`` is that of ``hot``, where it is known."""
        x, warm = shifted.x, shifted.warm
        assert warm is not None
        is_known = hot_sum is not None and warm is shifted.hot
        total = hot_sum if is_known else row_sum(warm)
        assert total is not None
        weighted = None
        if self.spec.compute_metrics:
            weighted = row_nansum(torch.mul(warm, x, out=self.scratch.like("u", x.shape)))
        if shifted.at is not None:
            assert self.topk is not None
            # Both count from the rest's maximum so far, and are without the ids.
            below = sums.rest_maximum - sums.maximum
            at_ids = self.topk.below(sums.maximum, shifted.block.rows, shifted.at)
            e = at_ids.exp()
            if weighted is not None:
                weighted = (weighted + total * below) * below.exp() + row_nansum(at_ids.mul_(e))
            total = total * below.exp() + row_sum(e)
        if move is not None:
            r = move.exp()
            if weighted is not None:
                weighted = weighted + (sums.weighted + sums.total_1 * move) * r
            total = total + sums.total_1 * r
        if weighted is not None:
            sums.weighted.copy_(weighted)
        sums.total_1.copy_(total)

    def _add_plain(self, sums: RowSums, block: Block, x: Tensor, move: Tensor | None) -> None:
        """The sum of what CE weights every class by, ``x = s - m``."""
        weights = plain_weights(self.spec, self.targets, block, x.dtype)
        if weights is None:
            return
        if not isinstance(weights, Tensor):
            added, count = row_sum(x), torch.full_like(sums.plain, float(x.shape[1]))
        else:
            # nansum: a class of weight 0 adds 0, whatever its logit is.
            u = self.scratch.like("u", x.shape)
            added = row_nansum(torch.mul(x, weights, out=u))
            count = weights.sum(-1).expand_as(sums.plain)
        if move is not None:
            sums.plain.add_(sums.plain_weight * move)
        sums.plain.add_(added)
        sums.plain_weight.add_(count)

    # --- second reading ---------------------------------------------------------------------------

    def add_terms(self, shifted: Shifted) -> Tensor:
        """The sums of ``f`` and of ``q (phi - phi_y)``; return the latter's summands, in ``v``."""
        comparison, sums = shifted.block.comparison, self.at(shifted.block.rows)
        assert comparison is not None and shifted.hot is not None and shifted.hot_t is not None
        divergence, beta = comparison
        # Values from log p/q itself: sums that count from a row's constant cancel far from it.
        gap = log_ratio(
            sums, shifted, self.temperature, out=self.scratch.like("u", shifted.x.shape)
        )
        q = torch.div(shifted.hot, sums.total[:, None], out=self.scratch.like("q", gap.shape))
        p = torch.div(
            shifted.hot_t, sums.teacher_total[:, None], out=self.scratch.like("p", gap.shape)
        )
        f = terms_of(divergence).value(beta, gap, p, q, True)
        sums.value.add_(row_sum(f))
        h = slopes(comparison, sums, shifted, self.temperature, q, self.scratch)
        sums.expectation.add_(row_sum(h))
        return h

    # --- all blocks -------------------------------------------------------------------------------

    def finish_topk(self, rows: slice, comparison: Comparison) -> None:
        """Compare the outcomes of a top-k teacher in these rows, once all columns are read."""
        assert self.topk is not None and self.inside is not None
        sums = self.at(rows)
        value, gradient = self.topk.compare(
            rows,
            comparison,
            self.temperature,
            sums.maximum,
            sums.rest_maximum,
            sums.rest_total,
        )
        sums.value.copy_(value)
        sums.outside.copy_(gradient.outside)
        self.inside[rows] = gradient.inside

    def finish(self) -> RowResults:
        """The losses of the rows."""
        objective, sums, targets = self.spec.objective, self.sums, self.targets
        poison = self._poison()
        divergence = torch.zeros_like(sums.total)
        for rows, comparison in self.groups:
            if comparison is not None:
                divergence[rows] = self._divergence(comparison, self.at(rows))

        # A KL of 0 may come out as -1e-8: a divergence within rounding below 0 is 0.
        kd = torch.where((divergence < 0) & (divergence > -ROUNDING), 0, divergence)
        kd = weighted(kd * objective.kd_scale, targets.kd_weights) + poison
        ce, z, entropy, lse = self._finish_untempered(poison)
        loss = poison.clone()
        for weight, term in (
            (objective.ce_weight, ce),
            (objective.kd_weight, kd),
            (objective.z_loss, z),
        ):
            if weight > 0:  # a term of weight 0 contributes 0, infinite or not
                loss += weight * term
        correct, agree = self._finish_counts()
        return RowResults(loss, ce, kd, z, correct, agree, entropy, lse)

    def _poison(self) -> Tensor:
        """NaN in rows with a label outside the vocabulary, 0 in the others."""
        poison = torch.zeros_like(self.sums.total)
        labels = self.targets.labels
        if labels is not None:
            poison.masked_fill_((labels < 0) | (labels >= self.spec.vocab), torch.nan)
        return poison

    def _divergence(self, comparison: Comparison, sums: RowSums) -> Tensor:
        """The bare divergence of some rows, before T^2."""
        weights = comparison.kl_weights
        nan = 0 * (sums.total.log() + sums.teacher_total.log())  # where either side is NaN
        if self.topk is not None or self.outcomes is not None:
            return sums.value
        if weights is None:
            return sums.value + nan
        T, value = self.temperature, nan
        between = sums.gap_of_sums  # log d - log d_t
        if weights[0] > 0:
            value = value + weights[0] * (sums.cross / (T * sums.teacher_total) + between)
        if weights[1] > 0:
            at_best = sums.log_ratio_at_best(T, self.spec.objective.teacher_share != 1)
            value = value + weights[1] * (sums.cross_student / (T * sums.total) - at_best)
        return value

    def _finish_untempered(self, poison: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """CE, ``lse^2``, entropy and lse, all at temperature 1."""
        if not self.spec.compute_ce:
            nothing = torch.zeros_like(poison)
            return poison, poison, nothing, nothing
        sums, targets = self.sums, self.targets
        log_d = sums.total_1.log()
        lse = sums.maximum + log_d
        ce = torch.zeros_like(poison)
        if targets.labels is not None:
            share = label_shares(self.spec, targets, log_d)
            ce = weighted(log_d - (sums.label_logit - sums.maximum), share)
        eps = self.spec.objective.label_smoothing
        if targets.labels is not None and targets.class_weight is None:
            if eps > 0:  # P and C are without their common factor
                ce = ce + eps * (log_d - sums.plain / self.spec.vocab)
        else:
            # A weight of 0 times a normaliser that is infinite is 0, but in a row of NaN.
            nan = log_d.where(log_d.isnan(), 0)
            ce = ce + weighted(log_d, sums.plain_weight) - sums.plain + nan
        ce = ce + poison
        z = weighted(lse.square(), targets.token_weights) + poison
        entropy = log_d - sums.weighted / sums.total_1
        return weighted(ce, targets.token_weights), z, entropy, lse

    def _finish_counts(self) -> tuple[Tensor, Tensor]:
        """Whether the student's argmax is the label, and whether it is the teacher's: 0 or 1."""
        nothing = torch.zeros_like(self.sums.total)
        if not self.spec.compute_metrics:
            return nothing, nothing
        labels, best = self.targets.labels, self.best
        correct = nothing if labels is None else (best == labels).to(nothing.dtype)
        teacher_best = self.teacher_best
        if self.topk is not None:
            teacher_best = teacher_best.clone()
            teacher_best[: len(self.topk.ids)] = self.topk.argmax()
        if self.outcomes is not None:
            best, teacher_best = self.outcomes.choices(best, teacher_best)
        return correct, (best == teacher_best).to(nothing.dtype)


# --- Of one block --------------------------------------------------------------------------------


def shift(
    block: Block,
    sums: RowSums,
    temperature: float,
    scratch: Scratch,
    at: IdColumns | None = None,  # beside a top-k teacher
    untempered: bool = True,
    tempered: bool = False,  # exp(x / T) is needed without a dense teacher too
) -> Shifted:
    """Logits as their differences to the rows' maxima, in their place unless lent, and
    exponentials."""
    maximum = sums.maximum if at is None else sums.rest_maximum
    out = scratch.like("x", block.s.shape) if block.is_lent[0] else block.s
    x, y, hot, hot_t, warm = torch.sub(block.s, maximum[:, None], out=out), None, None, None, None
    weights = None if block.comparison is None else block.comparison.kl_weights
    # The forward KL is a difference, q - p, of which coarse logits leave no more digits.
    subtracts = at is None and weights is not None and weights[0] > 0 and not block.is_coarse
    if block.t is not None:
        y = _teacher_side(block, x, sums, scratch)
        hot_t = scratch.exp_("hot_t", y, temperature, to_the_bit=subtracts)
    if at is not None or y is not None or tempered or (untempered and temperature == 1):
        hot = scratch.exp_("hot", x, temperature, to_the_bit=subtracts)
    if untempered and temperature == 1:
        warm = hot
    elif untempered and temperature == 2 and hot is not None:
        warm = torch.mul(hot, hot, out=scratch.like("warm", x.shape))
    elif untempered:
        warm = scratch.exp_("warm", x)
    return Shifted(block, x, y, hot, hot_t, warm, at)


def _teacher_side(block: Block, x: Tensor, sums: RowSums, scratch: Scratch) -> Tensor:
    """``t - m_t``, in the place of ``t`` unless that is lent; of a mixture
    ``x + share (t - s) + m - m_t``: rounded, its logits differ from the student's by more."""
    assert block.t is not None
    if block.gap is None:
        out = scratch.like("y", block.t.shape) if block.is_lent[1] else block.t
        return torch.sub(block.t, sums.teacher_maximum[:, None], out=out)
    y = torch.add(x, block.gap, out=block.t)
    y.nan_to_num_(-torch.inf, torch.inf, -torch.inf)  # a token that either side rules out
    return y.add_((sums.maximum - sums.teacher_maximum)[:, None])


def towards_teacher(sums: RowSums, shifted: Shifted, out: Tensor) -> Tensor:
    """``y - x``, from the gap where there is one: a target differs by less than it is."""
    gap = shifted.block.gap
    if gap is None:
        assert shifted.y is not None
        return torch.sub(shifted.y, shifted.x, out=out)
    return torch.add(gap, (sums.maximum - sums.teacher_maximum)[:, None], out=out)


def from_best(sums: RowSums, shifted: Shifted, out: Tensor) -> Tensor:
    """``y - x - k``: the gap of the logits, counted from the column with the row's maximum."""
    gap = shifted.block.gap
    k = sums.gap_at_best(gap is not None)
    if gap is not None:
        return torch.sub(gap, k[:, None], out=out)
    return towards_teacher(sums, shifted, out).sub_(k[:, None])


def log_ratio(sums: RowSums, shifted: Shifted, temperature: float, out: Tensor) -> Tensor:
    """``log p/q`` of every column."""
    gap = shifted.block.gap
    raw = towards_teacher(sums, shifted, out) if gap is None else out.copy_(gap)
    offset = sums.offset(temperature, gap is not None)
    return raw.mul_(1 / temperature).add_(offset[:, None])


def slopes(
    comparison: Comparison,
    sums: RowSums,
    shifted: Shifted,
    temperature: float,
    q: Tensor,
    scratch: Scratch,
) -> Tensor:
    """``q (phi - phi_y)`` of every column, see ``_divergence.py``."""
    ratio = sums.log_ratio_at_best(temperature, shifted.block.gap is not None)
    counted = counted_from(comparison.divergence, comparison.beta, ratio[:, None])
    # Subtract first: what a common offset hides is lost in its product with 1/T.
    g = from_best(sums, shifted, out=scratch.like("u", q.shape))
    g.mul_(1 / temperature).add_(counted.gap - counted.g0)
    return weighted_slope(terms_of(comparison.divergence).slope, comparison.beta, g, counted, q)


def plain_weights(
    spec: LossSpec, targets: RowTargets, block: Block, dtype: torch.dtype
) -> Tensor | float | None:
    """By how much CE weights every class of a block, a label's own share apart: [1, columns] or
    [rows, columns]; one number, by which the sums are not multiplied; None if the label's share is
    all."""
    eps = spec.objective.label_smoothing
    by_class = None if targets.class_weight is None else targets.class_weight[block.columns]
    if targets.soft is not None:
        here = slice(block.columns.start - spec.first, block.columns.stop - spec.first)
        soft = targets.soft[block.rows, here].to(dtype)
        a = soft * (1 - eps) + eps / spec.vocab
        return a if by_class is None else a.mul_(by_class)
    if targets.labels is None or eps == 0:
        return None
    uniform = eps / spec.vocab
    return uniform if by_class is None else (by_class * uniform)[None]


class LabelColumns:
    """``label_columns`` of n rows, found once for all blocks of the same columns."""

    def __init__(self, labels: Tensor | None) -> None:  # [n]
        self.labels = labels
        self._last: tuple[slice, Tensor, Tensor] | None = None

    def at(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        assert self.labels is not None
        if self._last is None or self._last[0] != columns:
            self._last = columns, *label_columns(self.labels, columns)
        _, index, here = self._last
        return index[rows], here[rows]


def label_columns(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where in a block each row's label is, [rows, 1], and whether it is there at all, [rows]."""
    column, width = labels - columns.start, columns.stop - columns.start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


def label_shares(spec: LossSpec, targets: RowTargets, like: Tensor) -> Tensor:  # [n]
    """By how much CE weights the label of each row, beside what all classes get."""
    share = torch.full_like(like, 1 - spec.objective.label_smoothing)
    if targets.labels is None or targets.class_weight is None:
        return share
    return share * targets.class_weight[targets.labels.clamp(0, spec.vocab - 1)]


def weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    """``weights * x``, and 0 where the weight is 0, infinite or not."""
    if weights is None:
        return x
    return (x * weights).masked_fill_(weights == 0, 0)
