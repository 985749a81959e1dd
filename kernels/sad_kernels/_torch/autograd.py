"""The autograd function of the torch path: one loop over tiles of logits, for every loss.

Forward reads each tile once (twice for some divergences) into row statistics. Backward reads it
again, forms its gradient with the true upstream, and hands it to the source of the logits. So one
path serves every reduction and any upstream, backward may run twice, and without gradients nothing
extra is computed or kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sad_kernels._rows import LossSpec, RowLayout, RowResults
from sad_kernels._tiles import TileShape, cut
from sad_kernels._torch.gradient import RowGradient
from sad_kernels._torch.sources import HeadSource, LogitSource, LogitTransform, Source
from sad_kernels._torch.statistics import RowStatistics, SavedRows
from sad_kernels._torch.topk import TopKRows
from sad_kernels.objective import Head, Tail, Teacher, TeacherHidden, TeacherLogits, TeacherTopK

Tile = tuple[slice, slice, Tensor, Tensor | None, Tensor]  # rows, columns, s, t, scratch


class ModelInput(NamedTuple):
    """The tensors of one model: hidden states and head if it has a weight, otherwise logits."""

    x: Tensor  # [N, D] or [N, >= V]
    weight: Tensor | None = None  # [>= V, D]
    bias: Tensor | None = None  # [>= V]
    transform: LogitTransform = LogitTransform()


class TopKInput(NamedTuple):
    """The tensors of a ``TeacherTopK``, and its tail in the place of a transform."""

    ids: Tensor  # [N, K]
    log_probs: Tensor  # [N, K]
    transform: Tail


def head_input(hidden: Tensor, head: Head, layout: RowLayout) -> ModelInput:
    transform = LogitTransform(float(head.logit_scale), head.softcap)
    return ModelInput(layout.rows(hidden), head.weight, head.bias, transform)


def teacher_input(teacher: Teacher | None, layout: RowLayout) -> ModelInput | TopKInput | None:
    match teacher:
        case TeacherHidden(hidden=hidden, head=head):
            return head_input(hidden, head, layout)
        case TeacherLogits(logits=logits):
            return ModelInput(layout.rows(logits))
        case TeacherTopK(ids=ids, log_probs=log_probs, tail=tail):
            return TopKInput(layout.rows(ids), layout.rows(log_probs), tail)
        case None:
            return None


def row_losses(
    spec: LossSpec,
    student: ModelInput,
    labels: Tensor | None,  # [N]; None: all rows count
    teacher: ModelInput | TopKInput | None,
    shape: TileShape,
) -> RowResults:
    """Every row's loss, differentiable, and its parts, detached: [N] each, 0 in ignored rows."""
    # Autograd only sees tensors that are arguments of their own, so the records are flattened.
    *student_tensors, student_transform = student
    *teacher_tensors, teacher_transform = teacher or (None,)
    call = _Call(spec, student_transform, teacher_transform, shape)
    return RowResults(*_RowLosses.apply(call, *student_tensors, labels, *teacher_tensors))


class _Call(NamedTuple):
    """The arguments of a call that are no tensors."""

    spec: LossSpec
    student: LogitTransform
    teacher: LogitTransform | Tail | None
    shape: TileShape


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with _no_autocast(tensors):
            problem = _Problem(call, tensors)
            statistics = problem.statistics()
            for tile in problem.tiles():
                statistics.add(*tile)
            # Both normalisers are known now: log-probabilities can be formed and compared.
            if statistics.reads_twice:
                for rows, _, s, t, _ in problem.tiles():
                    statistics.add_terms(rows, s, t)
            results, saved = statistics.finish()

        # The inputs and a few numbers per row are kept, never a tile.
        ctx.call, ctx.num_tensors = call, len(tensors)
        ctx.save_for_backward(*tensors, *saved)
        loss, *parts = (problem.scatter(x) for x in results)
        ctx.mark_non_differentiable(*parts)
        return loss, *parts

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors[: ctx.num_tensors]
        saved = SavedRows(*ctx.saved_tensors[ctx.num_tensors :])
        with _no_autocast(tensors):
            problem = _Problem(ctx.call, tensors)
            gradient = problem.gradient(saved, upstream)
            problem.student.want_gradients(*ctx.needs_input_grad[1:4])  # x, weight, bias

            # A gradient belongs to the tile that was made last: each is added before the next.
            for tile in problem.tiles(with_teacher=gradient.has_kd):
                problem.student.add_gradient(tile[0], gradient.tile(*tile))
            student_gradients = problem.student.gradients()
        # In the order of forward's arguments: the call, the student's three, everything else.
        return None, *student_gradients, *[None] * (ctx.num_tensors - 3)


class _Problem:
    """The rows that count, the sources of their logits, and the loop over tiles."""

    def __init__(self, call: _Call, tensors: tuple[Tensor | None, ...]) -> None:
        x, weight, bias, labels, *teacher = tensors
        assert x is not None
        # Only the n rows that count exist from here on.
        self.call, self.num_rows = call, len(x)
        self.kept, self.labels = _kept(labels, call.spec.ignore_index)
        n = self.num_rows if self.kept is None else len(self.kept)
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.zeros = torch.zeros(n, dtype=dtype, device=x.device)

        self.student = self._source(x, weight, bias, call.student)
        self.teacher: Source | None = None
        self.topk: TopKRows | None = None
        if isinstance(call.teacher, LogitTransform):
            hidden, head, head_bias = teacher
            assert hidden is not None
            self.teacher = self._source(hidden, head, head_bias, call.teacher)
        elif call.teacher is not None:
            ids, log_probs = (self.gather(x) for x in teacher)
            self.topk = TopKRows(ids, log_probs, call.teacher, call.spec.vocab, self.zeros)

    def _source(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, transform: LogitTransform
    ) -> Source:
        if weight is None:
            return LogitSource(x, transform, self.kept, self.zeros.dtype)
        return HeadSource(
            x, weight, bias, transform, self.kept, self.zeros.dtype, self.call.spec.vocab
        )

    def statistics(self) -> RowStatistics:
        teacher = self.topk or self.teacher is not None
        return RowStatistics(self.call.spec, self.labels, teacher, self.zeros)

    def gradient(self, saved: SavedRows, upstream: Tensor) -> RowGradient:
        rows = self.gather(upstream).to(self.zeros.dtype)
        return RowGradient(self.call.spec, saved, rows, self.labels, self.topk)

    def gather(self, x: Tensor) -> Tensor:  # [N, ...] -> [n, ...]
        return x if self.kept is None else x[self.kept]

    def scatter(self, x: Tensor) -> Tensor:  # [n] -> [N], a tensor of its own
        if self.kept is None:
            return x.clone()
        return x.new_zeros(self.num_rows).index_copy_(0, self.kept, x)

    def tiles(self, with_teacher: bool = True) -> Iterator[Tile]:
        """Read every tile once: slices of the vocabulary outside, rows inside.

        In this order a slice of the head is read, and its gradient written, once.
        """
        n, V, shape = len(self.zeros), self.call.spec.vocab, self.call.shape
        share = self.call.spec.objective.teacher_share
        teacher = self.teacher if with_teacher else None
        scratch = self.zeros.new_empty(min(n, shape.rows) * min(V, shape.columns))
        for columns in cut(V, shape.columns):
            self.student.open(columns)
            if teacher is not None:
                teacher.open(columns)
            for rows in cut(n, shape.rows):
                s = self.student.tile(rows)
                t = None if teacher is None else teacher.tile(rows)
                if t is not None and share != 1:  # the target lies between both
                    t = t.mul_(share).add_(s, alpha=1 - share)
                yield rows, columns, s, t, scratch[: s.numel()].view(s.shape)
            self.student.close()


def _kept(labels: Tensor | None, ignore_index: int) -> tuple[Tensor | None, Tensor | None]:
    """The indices of the rows that count, None for all of them, and their labels."""
    if labels is None:
        return None, None
    # nonzero waits for the device, as the number of rows has to be known here.
    kept = (labels != ignore_index).nonzero().squeeze(1)
    return (None, labels) if len(kept) == len(labels) else (kept, labels[kept])


def _no_autocast(tensors: tuple[Tensor | None, ...]) -> torch.autocast:
    """Autocast off: it would act inside an autograd function too, whose dtypes are chosen."""
    assert tensors[0] is not None
    return torch.autocast(tensors[0].device.type, enabled=False)
