"""The torch path: one loop over tiles of logits, for every loss of the package.

Forward reads each tile once (mixtures: twice) into row statistics. Backward reads it again, forms
its gradient with the true upstream, and hands it to where the logits came from. So one path serves
every reduction and any upstream, backward may run twice, and without gradients nothing is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sad_kernels._gradient import RowGradient
from sad_kernels._reduce import Leading
from sad_kernels._sources import HeadSource, LogitSource, Source
from sad_kernels._statistics import RowResults, RowStatistics, SavedRows, Task
from sad_kernels._topk import TopKRows
from sad_kernels.objective import (
    Objective,
    Tail,
    Teacher,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
)

LOGIT_COLUMNS = 16384
LOGIT_TILE = 1 << 21
HEAD_ROWS = 512
DEFAULT_CHUNK_BYTES = 32 << 20

Tile = tuple[slice, slice, Tensor, Tensor | None, Tensor]  # rows, columns, s, t, scratch


class Side(NamedTuple):
    """One model: hidden states and head if there is a weight, otherwise its logits."""

    x: Tensor  # [N, D] or [N, >= V]
    weight: Tensor | None = None  # [>= V, D]
    bias: Tensor | None = None  # [>= V]
    logit_scale: float = 1.0
    softcap: float | None = None


class TopK(NamedTuple):
    """A teacher known at K ids."""

    ids: Tensor  # [N, K]
    log_probs: Tensor  # [N, K]
    tail: Tail


class TileShape(NamedTuple):
    rows: int
    columns: int


def row_losses(
    task: Task,
    student: Side,
    labels: Tensor | None,  # [N], None: all rows count
    teacher: Side | TopK | None,
    *,
    ignore_index: int,
    shape: TileShape,
) -> RowResults:
    """Return every row's loss, differentiable, and its parts, detached: [N] each, 0 where ignored."""
    tensors: list[Tensor | None] = [*student[:3], labels]
    tensors += [None, None, None] if teacher is None else [*teacher[:2], None]
    if isinstance(teacher, Side):
        tensors[-1] = teacher.bias
    call = _Call(
        task,
        ignore_index,
        shape,
        student[3:],
        teacher[3:] if isinstance(teacher, Side) else None,
        teacher.tail if isinstance(teacher, TopK) else None,
    )
    return RowResults(*_RowLosses.apply(call, *tensors))


class _Call(NamedTuple):
    """What a call is, apart from its tensors, which autograd has to see."""

    task: Task
    ignore_index: int
    shape: TileShape
    student: tuple[float, float | None]  # logit scale, softcap
    teacher: tuple[float, float | None] | None  # the same, of a dense teacher
    tail: Tail | None  # of a sparse one


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with torch.autocast(tensors[0].device.type, enabled=False):
            problem = _Problem(call, tensors)
            statistics = RowStatistics(
                call.task, problem.labels, problem.topk or call.teacher is not None, problem.zeros
            )
            for tile in problem.tiles():
                statistics.add(*tile)
            if statistics.reads_twice:
                for rows, _, s, t, _ in problem.tiles():
                    statistics.add_mixture(rows, s, t)
            results, saved = statistics.finish()
        ctx.call, ctx.num_tensors = call, len(tensors)
        ctx.save_for_backward(*tensors, *saved)
        results = tuple(problem.scatter(x) for x in results)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        tensors = ctx.saved_tensors[: ctx.num_tensors]
        saved = SavedRows(*ctx.saved_tensors[ctx.num_tensors :])
        with torch.autocast(upstream.device.type, enabled=False):
            problem = _Problem(call, tensors)
            upstream = problem.gather(upstream)
            gradient = RowGradient(call.task, saved, upstream, problem.labels, problem.topk)
            problem.student.want_gradients(*ctx.needs_input_grad[1:4])
            for tile in problem.tiles(with_teacher=gradient.has_kd):
                rows, _, *_ = tile
                problem.student.add_gradient(rows, gradient.tile(*tile))
            gradients = problem.student.gradients()
        return None, *gradients, *[None] * (ctx.num_tensors - 3)


class _Problem:
    """The rows that count, the sources of both sides, and the tiles that both are read in."""

    def __init__(self, call: _Call, tensors: tuple[Tensor | None, ...]) -> None:
        x, weight, bias, labels, *teacher = tensors
        assert x is not None
        self.call, self.num_rows = call, x.shape[0]
        self.kept = None
        if labels is not None:
            valid = labels != call.ignore_index
            kept = valid.nonzero().squeeze(1)
            self.kept = None if len(kept) == self.num_rows else kept
            labels = labels if self.kept is None else labels[kept]
        self.labels = labels

        dtype = torch.promote_types(x.dtype, torch.float32)
        self.student = self._source(x, weight, bias, *call.student, dtype)
        n = self.num_rows if self.kept is None else len(self.kept)
        self.zeros = torch.zeros(n, dtype=dtype, device=x.device)
        self.teacher: Source | None = None
        self.topk: TopKRows | None = None
        if call.teacher is not None:
            self.teacher = self._source(*teacher, *call.teacher, dtype)
        elif call.tail is not None:
            ids, log_probs = (self.gather(x) for x in teacher[:2])
            self.topk = TopKRows(ids, log_probs, call.tail, call.task.vocab, self.zeros)

    def _source(self, x, weight, bias, logit_scale, softcap, dtype) -> Source:
        if weight is None:
            return LogitSource(x, self.kept, softcap, dtype)
        return HeadSource(
            x,
            weight,
            bias,
            self.kept,
            vocab=self.call.task.vocab,
            logit_scale=logit_scale,
            softcap=softcap,
            dtype=dtype,
        )

    def gather(self, x: Tensor) -> Tensor:  # [N, ...] -> [n, ...]
        return x if self.kept is None else x[self.kept]

    def scatter(self, x: Tensor) -> Tensor:  # [n] -> [N], a tensor of its own
        if self.kept is None:
            return x.clone()
        return x.new_zeros(self.num_rows).index_copy_(0, self.kept, x)

    def tiles(self, with_teacher: bool = True) -> Iterator[Tile]:
        """Read every tile once: slices of the vocabulary outside, rows inside."""
        n, V, shape = len(self.zeros), self.call.task.vocab, self.call.shape
        teacher = self.teacher if with_teacher else None
        scratch = self.zeros.new_empty(min(n, shape.rows) * min(V, shape.columns))
        for columns in _cut(V, shape.columns):
            self.student.open(columns)
            if teacher is not None:
                teacher.open(columns)
            for rows in _cut(n, shape.rows):
                s = self.student.tile(rows)
                t = None if teacher is None else teacher.tile(rows)
                yield rows, columns, s, t, scratch[: s.numel()].view(s.shape)
                del s, t
            self.student.close()


def _cut(length: int, at_most: int) -> list[slice]:
    """Cut a range into as few pieces as possible, of sizes that differ by one at most."""
    pieces = -(-length // at_most)
    edges = [i * length // pieces for i in range(pieces + 1)] if pieces else []
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def teacher_side(teacher: Teacher | None, leading: Leading) -> Side | TopK | None:
    """The teacher's tensors with flat leading dimensions."""
    match teacher:
        case TeacherHidden(hidden=hidden, head=head):
            scale = float(head.logit_scale)
            return Side(leading.rows(hidden), head.weight, head.bias, scale, head.softcap)
        case TeacherLogits(logits=logits):
            return Side(leading.rows(logits))
        case TeacherTopK(ids=ids, log_probs=log_probs, tail=tail):
            return TopK(leading.rows(ids), leading.rows(log_probs), tail)
        case None:
            return None


def logit_tiles(vocab: int) -> TileShape:
    columns = min(vocab, LOGIT_COLUMNS)
    return TileShape(max(1, LOGIT_TILE // columns), columns)


def head_tiles(student: Side, teacher, objective: Objective, chunk_bytes: int | None) -> TileShape:
    itemsize = torch.promote_types(student.x.dtype, torch.float32).itemsize
    numbers = max(1, (DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // itemsize)
    slabs = 3
    per_column = student.x.shape[1] * 2 + 512
    rows = min(student.x.shape[0], HEAD_ROWS) or 1
    columns = numbers // (slabs * rows + per_column)
    if columns < 1:
        return TileShape(max(1, (numbers - per_column) // slabs), 1)
    return TileShape(rows, columns)
