"""Linear losses in chunks of rows: losses and gradients without N x V logits in memory.

Two sizes of chunks share two kinds of slabs. A forward block has ``C_f`` rows: the products of the
student's and the teacher's hidden states with their heads go to fp32 slabs, the row kernels read
these and write the gradient ``g`` of the logits, in the hidden states' dtype, to its own slab of
``C_g = 4 C_f`` rows. When that slab is full, or the rows have ended, follow the products that are
efficient for many rows only:

    dhidden  = g W                 one cast at the end of its chunk
    dweight += g^T hidden          in fp32 over all chunks
    dbias   += column sums of g    in fp32

Both sizes follow from ``chunk_bytes`` alone, never from free memory: the order of summation must
not depend on the machine.

Rows that do not count are zeroed in the chunk's copy of the hidden states: their ``g`` is 0, but
0 times inf or NaN is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._rows import LossSpec, RowTargets
from sad_kernels._tiles import TRITON_CHUNK_BYTES, chunk_rows, cut, outcome_row_bytes, pitch
from sad_kernels._triton import launch
from sad_kernels._triton.gemm import add_times_, times
from sad_kernels._triton.launch import Logits, SortedTopK
from sad_kernels._triton.outcomes import Tables, as_columns
from sad_kernels._triton.rows import PARTS
from sad_kernels.vocab import sum_


@dataclass(frozen=True)
class HiddenWithHead:
    """One model: its final hidden states, and the head that turns them into logits."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [>= V, D], in the dtype of the hidden states
    bias: Tensor | None  # [>= V]
    scale: float
    softcap: float | None

    def logits(self, rows: slice, slab: Tensor, vocab: int) -> Logits:
        """Write the products of some rows to the slab; kernels apply bias, scale and softcap."""
        out = slab[: rows.stop - rows.start, :vocab]
        times(self.hidden[rows], self.weight[:vocab].T, out=out)
        return Logits(out, self.bias, self.scale, self.softcap)


class GradMask(NamedTuple):
    """Which of the three gradients are computed."""

    hidden: bool
    weight: bool
    bias: bool


class Result(NamedTuple):
    """Losses of all rows, and gradients; one that is not wanted is empty."""

    loss: Tensor  # [N]
    parts: Tensor  # [PARTS, N]
    dhidden: Tensor  # [N, D]
    dweight: Tensor  # [>= V, D]
    dbias: Tensor  # [>= V]


def run(
    spec: LossSpec,
    student: HiddenWithHead,
    targets: RowTargets,
    teacher: HiddenWithHead | Logits | SortedTopK | None,
    *,
    grad_mask: GradMask,
    upstream: Tensor | None,  # [N] or [1]: what g is multiplied by; None: losses only
    dhidden_dtype: torch.dtype,  # the others are left in fp32
    chunk_bytes: int | None,
) -> Result:
    """Compute the losses of all rows, and the wanted gradients of ``sum(upstream * loss)``."""
    hidden, V = student.hidden, spec.width
    N = len(hidden)
    fp32 = hidden.new_empty(0, dtype=torch.float32)
    any_grad = upstream is not None and any(grad_mask)
    sides = 2 if isinstance(teacher, HiddenWithHead) else 1
    budget = TRITON_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    tables = Tables.of(spec, targets)
    if tables is None:
        teacher_width, sizes = V, chunk_rows(spec.widest, sides, hidden.element_size(), budget)
    else:
        teacher_width = spec.teacher_columns
        others = outcome_row_bytes(spec.column_counts) + (sides - 1) * 4 * pitch(teacher_width)
        sizes = chunk_rows(V, 1, hidden.element_size(), budget, others)
    result = Result(
        loss=fp32.new_empty(N),
        parts=fp32.new_empty(PARTS, N),
        dhidden=fp32.new_empty(0),
        dweight=fp32.new_empty(0),
        dbias=fp32.new_empty(0),
    )
    if any_grad and grad_mask.hidden:
        # That of a shard is rounded once the others' have been added.
        dtype = dhidden_dtype if spec.shard is None else torch.float32
        result = result._replace(dhidden=hidden.new_empty(hidden.shape, dtype=dtype))
    if any_grad and grad_mask.weight:
        dweight = fp32.new_empty(student.weight.shape)
        dweight[V if N else 0 :] = 0  # the first chunk overwrites the others
        result = result._replace(dweight=dweight)
    if any_grad and grad_mask.bias:
        result = result._replace(dbias=fp32.new_zeros(len(student.weight)))

    # The slabs, of the largest block and chunk that occur, serve all of them in turn. A pitch of
    # whole 16 bytes lets the kernels load vectors whatever V is.
    chunks = cut(N, sizes.gradient)
    blocks_of = [cut(chunk.stop - chunk.start, sizes.forward) for chunk in chunks]
    most = max((block.stop - block.start for blocks in blocks_of for block in blocks), default=0)
    slabs = [fp32.new_empty(most, pitch(width)) for width in (V, teacher_width)[:sides]]
    spread = None if tables is None else fp32.new_empty(most, pitch(V))
    rows_of_g = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    g = hidden.new_empty(rows_of_g if any_grad else 0, pitch(V))
    for chunk, blocks in zip(chunks, blocks_of, strict=True):
        for block in blocks:  # block: rows within the chunk; rows: the same among all
            rows = slice(chunk.start + block.start, chunk.start + block.stop)
            s, y = student.logits(rows, slabs[0], V), targets.at(rows)
            t = _teacher_rows(teacher, rows, slabs[-1], teacher_width)
            columns = None
            if tables is not None and t is not None:
                assert not isinstance(t, HiddenWithHead)
                columns = as_columns(spec, tables, s, y, t, spread)
                forward = launch.forward(columns.spec, s, y, columns.teacher)
                columns.finish(forward, y)
            else:
                forward = launch.forward(spec, s, y, t)
            result.loss[rows], result.parts[:, rows] = forward.loss, forward.parts
            if any_grad:  # while the products are in their slabs, which the next block overwrites
                up = upstream if len(upstream) == 1 else upstream[rows]
                if columns is not None:
                    t = columns.teacher
                launch.gradient(spec, s, y, t, forward, up, g[block, :V])
        if any_grad:
            _add_gradients(spec, student, targets.labels, chunk, g, result, grad_mask)
    if spec.shard is not None and result.dhidden.numel() > 0:
        if spec.shard.sum_dhidden:
            sum_(result.dhidden, spec.shard.group)
        result = result._replace(dhidden=result.dhidden.to(dhidden_dtype))
    return result


def _add_gradients(
    spec: LossSpec,
    student: HiddenWithHead,
    labels: Tensor | None,
    chunk: slice,
    g: Tensor,
    result: Result,
    grad_mask: GradMask,
) -> None:
    """Write a chunk's rows of dhidden, and add its products to dweight and dbias."""
    V = spec.width
    g = g[: chunk.stop - chunk.start, :V]
    if grad_mask.hidden:
        out = result.dhidden[chunk]
        weight = student.weight[:V]
        if out.dtype == torch.float32:
            times(g, weight, out=out)
        else:
            out.copy_(times(g, weight))
    if grad_mask.weight:
        x = student.hidden[chunk]
        if labels is not None:
            x = x.where((labels[chunk] != spec.ignore_index)[:, None], 0)
        # The first chunk overwrites dweight, which saves a pass of zeros over it.
        if chunk.start == 0:
            times(g.T, x, out=result.dweight[:V])
        else:
            add_times_(result.dweight[:V], g.T, x)
    if grad_mask.bias:
        result.dbias[:V] += g.sum(0, dtype=torch.float32)


def _teacher_rows(
    teacher: HiddenWithHead | Logits | SortedTopK | None, rows: slice, slab: Tensor, vocab: int
) -> Logits | SortedTopK | None:
    """Some rows of a teacher of any kind, as the row kernels take it."""
    match teacher:
        case HiddenWithHead():
            return teacher.logits(rows, slab, vocab)
        case None:
            return None
        case _:
            return launch.rows_of(teacher, rows)
