"""Online softmax statistics of rows whose logits arrive in tiles, and the losses they give.

Every sum is kept relative to the running maxima ``m`` of its row, which stay apart from the sums:
large numbers are never subtracted from each other, so an offset of 1e4 costs nothing. With
``x' = (x - m) / T``, when a maximum moves by ``move = m_old - m_new <= 0`` and ``r = e^(move/T)``:

====================  ===============================  ====================================
sum over columns      after a move                     gives
====================  ===============================  ====================================
d = sum e^x'          d r                              log-normaliser  log d
S = sum (x - m)       S + columns so far * move        smooth term     log d - S/V   (T = 1)
E = sum e^x' (x - m)  (E + d move) r                   entropy         log d - E/d   (T = 1)
A = sum e^a' (a - b)  (A + d_a (move_a - move_b)) r_a  KL(a||b) = A/(T d_a) - log (d_a/d_b)
====================  ===============================  ====================================

with ``a - b`` in A short for ``(a - m_a) - (b - m_b)``. Maxima start at -1e30, not at -inf, so a
slice of only -inf adds 0 and not NaN. Weight 0 adds 0, whatever it multiplies, -inf included. NaN
and +inf reach the sums ``d`` of their own row and poison it. A divergence that is no KL is summed
from log-probabilities, term by term: it must know both ``d`` first, and reads the logits twice.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sad_kernels._divergence import Terms, terms_of
from sad_kernels._divergence_table import DIVERGENCES, missing
from sad_kernels._rows import LossSpec, RowResults
from sad_kernels._torch.topk import TopKRows

LOWEST = -1e30
ROUNDING = 1e-5  # nats: a divergence in (-ROUNDING, 0) is a rounded zero; lower ones stay visible

Side = Literal["student", "teacher"]

ONE_PASS_KL: dict[str, Side] = {"forward_kl": "teacher", "reverse_kl": "student"}
"""The divergences that one reading gives, each a KL(a || b): whose distribution ``a`` is."""


class SavedRows(NamedTuple):
    """Statistics that backward needs besides the logits, [n] each."""

    maximum: Tensor  # of the student
    total: Tensor  # sum exp((s - maximum) / T)
    total_1: Tensor  # sum exp(s - maximum)
    teacher_maximum: Tensor | None = None
    teacher_total: Tensor | None = None
    expectation: Tensor | None = None  # sum_u h_u of a dense divergence
    rest_maximum: Tensor | None = None  # of the student outside a top-k teacher's ids
    topk_inside: Tensor | None = None  # [n, K], see TopKGradient
    topk_outside: Tensor | None = None


class RunningSoftmax:
    """Of n rows: maximum, its column (ties to the left), and ``d = sum exp((x - maximum) / T)``."""

    def __init__(self, like: Tensor, temperature: float, argmax: bool) -> None:  # like: [n]
        self.temperature = temperature
        self.maximum = torch.full_like(like, LOWEST)
        self.total = torch.zeros_like(like)
        self.argmax = torch.full_like(like, -1, dtype=torch.long) if argmax else None

    def shift_(self, rows: slice, columns: slice, x: Tensor, scratch: Tensor) -> Tensor:
        """Update the maximum and subtract it from the tile; return how far it moved, [rows].

        ``x`` is overwritten with ``x - maximum``, ``scratch`` with anything.
        """
        maximum = self.maximum[rows]
        before = maximum.clone()
        torch.maximum(before, x.amax(1), out=maximum)
        if self.argmax is not None:
            # Few slices raise a row's maximum. Look only where one does, because argmax is slow.
            raised = (maximum > before).nonzero().squeeze(1)
            candidates = torch.index_select(x, 0, raised, out=scratch[: len(raised)])
            self.argmax[rows].index_copy_(0, raised, candidates.argmax(1) + columns.start)
        x.sub_(maximum[:, None])
        return before.sub_(maximum)

    def add(self, rows: slice, move: Tensor, weights: Tensor) -> None:
        """Add ``weights = exp(x / T)`` of a shifted tile."""
        self.total[rows] *= (move / self.temperature).exp_()
        self.total[rows] += weights.sum(1)


class RowStatistics:
    """Accumulates the statistics of n rows over tiles of their logits, and makes losses of them.

    Call ``add`` with every tile once; if ``reads_twice``, then ``add_terms`` with every tile again;
    then ``finish``. A tile has logits of the student ``s``, of a dense teacher ``t``, and scratch
    ``u``, all three [rows, columns] and overwritten. Labels may lie outside the vocabulary.
    """

    def __init__(
        self, spec: LossSpec, labels: Tensor | None, teacher: TopKRows | bool, like: Tensor
    ) -> None:
        objective, zeros = spec.objective, torch.zeros_like(like)  # [n]
        self.spec, self.temperature, self.labels = spec, objective.temperature, labels
        self.topk = teacher if isinstance(teacher, TopKRows) else None

        # One softmax per side, each with its own maximum and normaliser.
        self.student = RunningSoftmax(like, self.temperature, spec.compute_metrics)
        self.rest = RunningSoftmax(like, self.temperature, argmax=False)  # outside a top-k's ids
        self.teacher: RunningSoftmax | None = None
        self.kl_left: Side | None = None  # a of a KL(a || b) from running sums
        self.terms: Terms | None = None  # of any other divergence of a dense teacher
        if teacher is True:
            self.teacher = RunningSoftmax(like, self.temperature, spec.compute_metrics)
            if DIVERGENCES[objective.divergence].forward_passes == 1:
                self.kl_left = _one_pass_kl(objective.divergence)
            else:
                self.terms = terms_of(objective.divergence)

        # The sums of the module's docstring that are not normalisers at T.
        self.label_logit = torch.full_like(like, torch.nan)
        self.total_1, self.weighted, self.plain = zeros, zeros.clone(), zeros.clone()  # d, E, S
        self.cross = zeros.clone()  # A
        self.divergence, self.expectation = zeros.clone(), zeros.clone()

    # --- one tile ---------------------------------------------------------------------------------

    def add(self, rows: slice, columns: slice, s: Tensor, t: Tensor | None, u: Tensor) -> None:
        """First reading: update every sum of these rows with one tile."""
        # The label's and the ids' logits are picked while the tile still holds logits.
        self._note_label(rows, columns, s)
        if self.topk is not None:
            self._add_rest(self.topk, rows, columns, s, u)

        # From here on s and t hold differences to their running maxima, and u exponentials.
        move = self.student.shift_(rows, columns, s, u)
        if t is not None:
            self._add_both(rows, columns, s, t, u, move)
        elif self.topk is None or self.temperature == 1:  # else nobody asks for it
            self.student.add(rows, move, tempered_exp(s, self.temperature, out=u))
        if self.spec.compute_ce:
            self._add_untempered(rows, columns, s, u, move)

    def _note_label(self, rows: slice, columns: slice, s: Tensor) -> None:
        """Keep the logit of each label that lies in this tile."""
        if self.labels is None:
            return
        column = self.labels[rows] - columns.start
        here = (column >= 0) & (column < s.shape[1])
        logit = s.gather(1, column.clamp(0, s.shape[1] - 1)[:, None]).squeeze(1)
        noted = self.label_logit[rows]
        noted.copy_(logit.where(here, noted))

    def _add_both(
        self, rows: slice, columns: slice, s: Tensor, t: Tensor, u: Tensor, move: Tensor
    ) -> None:
        """Both sums ``d`` and, for a KL, ``A``; leave ``exp(s / T)`` in ``u``."""
        student, teacher = self.student, self.teacher
        assert teacher is not None
        # A is rescaled by the totals from before this tile, so it comes before ``add`` of its side.
        teacher_move = teacher.shift_(rows, columns, t, u)
        tempered_exp(t, self.temperature, out=u)
        if self.kl_left == "teacher":
            self._add_cross(rows, u, t.sub_(s), teacher.total[rows], teacher_move, move)
        teacher.add(rows, teacher_move, u)

        tempered_exp(s, self.temperature, out=u)
        if self.kl_left == "student":
            self._add_cross(rows, u, t.neg_().add_(s), student.total[rows], move, teacher_move)
        student.add(rows, move, u)

    def _add_cross(
        self,
        rows: slice,
        weights: Tensor,
        gap: Tensor,
        total: Tensor,
        move_a: Tensor,
        move_b: Tensor,
    ) -> None:
        """Rescale A to the new maxima and add ``sum(weights * gap)``; a is the weighted side."""
        factor = (move_a / self.temperature).exp_()
        rescale_cross = (self.cross[rows] + total * (move_a - move_b)) * factor
        # nansum: what is not a number here is 0 * inf, a weight of 0. Real NaNs show in the totals.
        self.cross[rows] = rescale_cross.where(factor > 0, 0) + gap.mul_(weights).nansum(1)

    def _add_rest(self, topk: TopKRows, rows: slice, columns: slice, s: Tensor, u: Tensor) -> None:
        """The sum ``d`` of the columns outside the teacher's ids, from their own maximum."""
        row, _, column = topk.note_logits(rows, columns, s)
        u.copy_(s)[row, column] = -torch.inf
        move = self.rest.shift_(rows, columns, u, u)
        self.rest.add(rows, move, tempered_exp(u, self.temperature, out=u))

    def _add_untempered(
        self, rows: slice, columns: slice, s: Tensor, u: Tensor, move: Tensor
    ) -> None:
        """The sums at temperature 1, from ``exp(s / T)`` in ``u``."""
        if self.spec.objective.label_smoothing > 0:
            self.plain[rows] += columns.start * move + s.sum(1)

        weights = u if self.temperature == 1 else tempered_exp(s, 1.0, out=u)
        factor, total = move.exp(), self.total_1[rows]
        if self.spec.compute_metrics:
            self.weighted[rows] = (self.weighted[rows] + total * move) * factor
        self.total_1[rows] = total * factor + weights.sum(1)
        if self.spec.compute_metrics:  # after the sum, because the weights are overwritten
            self.weighted[rows] += weights.mul_(s).nansum(1)

    def add_terms(self, rows: slice, s: Tensor, t: Tensor | None) -> None:
        """Second reading: the sums of ``f`` and ``h`` (see ``_divergence.py``) of these rows."""
        student, teacher, objective = self.student, self.teacher, self.spec.objective
        assert teacher is not None and t is not None and self.terms is not None
        log_q = log_softmax_(s, student.maximum[rows], student.total[rows], self.temperature)
        log_p = log_softmax_(t, teacher.maximum[rows], teacher.total[rows], self.temperature)
        f, h = self.terms(objective.beta, log_q, log_p)
        self.divergence[rows] += f.sum(1)
        self.expectation[rows] += h.sum(1)

    # --- all tiles --------------------------------------------------------------------------------

    @property
    def reads_twice(self) -> bool:
        """Whether every tile has to be read again, by ``add_terms``."""
        return self.terms is not None

    def finish(self) -> tuple[RowResults, SavedRows]:
        """The losses of the rows, and what backward needs of them."""
        objective = self.spec.objective
        divergence, saved = self._finish_divergence()
        poison = self._poison()

        # A KL of 0 may come out as -1e-8: a divergence within rounding below 0 is 0.
        kd = torch.where((divergence < 0) & (divergence > -ROUNDING), 0, divergence)
        kd = kd * objective.kd_scale + poison
        ce, z, entropy = self._finish_untempered(poison)

        weighted = (objective.ce_weight, ce), (objective.kd_weight, kd), (objective.z_loss, z)
        loss = poison.clone()
        for weight, term in weighted:
            if weight > 0:  # a term of weight 0 contributes 0, infinite or not
                loss += weight * term
        correct, agree = self._finish_counts()
        return RowResults(loss, ce, kd, z, correct, agree, entropy), saved

    def _poison(self) -> Tensor:
        """NaN in rows with a label outside the vocabulary, 0 in the others."""
        poison = torch.zeros_like(self.total_1)
        if self.labels is not None:
            outside = (self.labels < 0) | (self.labels >= self.spec.vocab)
            poison.masked_fill_(outside, torch.nan)
        return poison

    def _finish_divergence(self) -> tuple[Tensor, SavedRows]:
        """The bare divergence, before T^2, and what its gradient needs."""
        student, teacher, objective = self.student, self.teacher, self.spec.objective
        saved = SavedRows(student.maximum, student.total, self.total_1)
        if self.topk is not None:
            value, topk = self.topk.compare(
                objective, student.maximum, self.rest.maximum, self.rest.total
            )
            return value, saved._replace(
                rest_maximum=self.rest.maximum, topk_inside=topk.inside, topk_outside=topk.outside
            )
        if teacher is None:
            return torch.zeros_like(self.total_1), saved

        log_student, log_teacher = student.total.log(), teacher.total.log()
        match self.kl_left:
            case "teacher":
                value = self.cross / (self.temperature * teacher.total) - log_teacher + log_student
                expectation = torch.full_like(value, -1)
            case "student":
                value = self.cross / (self.temperature * student.total) - log_student + log_teacher
                expectation = value
            case None:
                value = self.divergence + 0 * (log_student + log_teacher)  # NaN from either side
                expectation = self.expectation
        return value, saved._replace(
            teacher_maximum=teacher.maximum, teacher_total=teacher.total, expectation=expectation
        )

    def _finish_untempered(self, poison: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CE, ``lse^2`` and entropy, all at temperature 1."""
        if not self.spec.compute_ce:
            return poison, poison, torch.zeros_like(poison)
        eps, log_d = self.spec.objective.label_smoothing, self.total_1.log()
        ce = log_d - (1 - eps) * (self.label_logit - self.student.maximum)
        if eps > 0:
            ce -= eps * (self.plain / self.spec.vocab)
        z = (self.student.maximum + log_d).square() + poison
        return ce, z, log_d - self.weighted / self.total_1

    def _finish_counts(self) -> tuple[Tensor, Tensor]:
        """Whether the student's argmax is the label, and whether it is the teacher's: 0 or 1."""
        column, nothing = self.student.argmax, torch.zeros_like(self.total_1)
        if column is None:
            return nothing, nothing
        correct = nothing if self.labels is None else (column == self.labels).to(nothing.dtype)
        if self.topk is not None:
            return correct, (column == self.topk.argmax()).to(nothing.dtype)
        if self.teacher is not None:
            return correct, (column == self.teacher.argmax).to(nothing.dtype)
        return correct, nothing


def _one_pass_kl(divergence: str) -> Side:
    if divergence not in ONE_PASS_KL:
        raise missing(divergence, f"{__name__}.ONE_PASS_KL")
    return ONE_PASS_KL[divergence]


def tempered_exp(x: Tensor, temperature: float, out: Tensor) -> Tensor:
    """``exp(x / T)``. torch's exp2 would be four times as fast on a CPU, but there its vectorised
    body and its scalar tail differ in the last bit, and with them a row's result by its place."""
    if temperature == 1:
        return torch.exp(x, out=out)
    return torch.mul(x, 1 / temperature, out=out).exp_()


def log_softmax_(x: Tensor, maximum: Tensor, total: Tensor, temperature: float) -> Tensor:
    """Logits to log-probabilities at T, in place, from ``total = sum exp((x - maximum) / T)``."""
    return x.sub_(maximum[:, None]).mul_(1 / temperature).sub_(total.log()[:, None])
