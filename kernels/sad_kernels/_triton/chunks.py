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

Where logits are codes (``compact.py``) they take the place of ``g`` until it overwrites them, and a
forward block has no more rows than make its products slabs that fit a cache.

Rows that do not count are zeroed in the chunk's copy of the hidden states: their ``g`` is 0, but
0 times inf or NaN is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._rows import LossSpec, RowTargets
from sad_kernels._tiles import (
    TRITON_CHUNK_BYTES,
    ChunkRows,
    chunk_rows,
    cut,
    outcome_row_bytes,
    pitch,
)
from sad_kernels._triton import launch
from sad_kernels._triton.compact import CodedRows, takes_codes
from sad_kernels._triton.gemm import HiddenWithHead, add_times_, times
from sad_kernels._triton.launch import Block, Logits, SortedTopK
from sad_kernels._triton.outcomes import Tables, as_columns
from sad_kernels._triton.rows import PARTS
from sad_kernels.vocab import sum_


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
    compact_logits: bool = False,  # as codes, if these can be
) -> Result:
    """Compute the losses of all rows, and the wanted gradients of ``sum(upstream * loss)``."""
    hidden, V = student.hidden, spec.width
    N = len(hidden)
    fp32 = hidden.new_empty(0, dtype=torch.float32)
    any_grad = upstream is not None and any(grad_mask)
    in_codes = compact_logits and takes_codes(spec, student, targets, teacher)
    kind = CodedRows if in_codes else WholeRows
    sizes = kind.sizes(spec, student, teacher, chunk_bytes)
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
    logits = kind(spec, student, targets, teacher, most)
    rows_of_g = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    rows_of_codes = most if in_codes else 0
    g = hidden.new_empty(rows_of_g if any_grad else rows_of_codes, pitch(V))
    for chunk, blocks in zip(chunks, blocks_of, strict=True):
        for block in blocks:  # block: rows within the chunk; rows: the same among all
            rows = slice(chunk.start + block.start, chunk.start + block.stop)
            y = targets.at(rows)
            out = g[block] if any_grad else g[: block.stop - block.start]
            forward, s, t = logits.forward(rows, y, out)
            result.loss[rows], result.parts[:, rows] = forward.loss, forward.parts
            if any_grad:  # while the logits are in their slabs, which the next block overwrites
                up = upstream if len(upstream) == 1 else upstream[rows]
                launch.gradient(spec, s, y, t, forward, up, out[:, :V])
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


class WholeRows:
    """Rows of logits in fp32: those of one block at a time, in slabs that serve all of them."""

    def __init__(
        self,
        spec: LossSpec,
        student: HiddenWithHead,
        targets: RowTargets,
        teacher: HiddenWithHead | Logits | SortedTopK | None,
        most: int,  # rows of a block
    ) -> None:
        self.spec, self.student, self.teacher = spec, student, teacher
        self.tables = Tables.of(spec, targets)
        V, new = spec.width, student.hidden.new_empty
        self.slab = new(most, pitch(V), dtype=torch.float32)
        if isinstance(teacher, HiddenWithHead):
            width = V if self.tables is None else spec.teacher_columns
            self.teacher_slab = new(most, pitch(width), dtype=torch.float32)[:, :width]
        if self.tables is not None:
            self.spread = new(most, pitch(V), dtype=torch.float32)

    @staticmethod
    def sizes(
        spec: LossSpec,
        student: HiddenWithHead,
        teacher: HiddenWithHead | Logits | SortedTopK | None,
        chunk_bytes: int | None,
    ) -> ChunkRows:
        """The most rows of a block and of a chunk."""
        sides = 2 if isinstance(teacher, HiddenWithHead) else 1
        budget = TRITON_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        itemsize = student.hidden.element_size()
        if not spec.num_outcomes:
            return chunk_rows(spec.widest, sides, itemsize, budget)
        others = outcome_row_bytes(spec.column_counts)
        others += (sides - 1) * 4 * pitch(spec.teacher_columns)
        return chunk_rows(spec.width, 1, itemsize, budget, others)

    def forward(self, rows: slice, y: RowTargets, out: Tensor) -> Block:
        """The losses of some rows; ``out`` is for their gradient, and left alone."""
        spec, tables = self.spec, self.tables
        s, t = _logits(self.student, rows, self.slab[:, : spec.width]), self.teacher
        if isinstance(t, HiddenWithHead):
            t = _logits(t, rows, self.teacher_slab)
        elif t is not None:
            t = launch.rows_of(t, rows)
        if tables is None or t is None:
            return Block(launch.forward(spec, s, y, t), s, t)
        columns = as_columns(spec, tables, s, y, t, self.spread)
        forward = launch.forward(columns.spec, s, y, columns.teacher)
        columns.finish(forward, y)
        return Block(forward, s, columns.teacher)


def _logits(side: HiddenWithHead, rows: slice, slab: Tensor) -> Logits:
    """Write the products of some rows to the slab; kernels apply bias, scale and softcap."""
    x = side.products(rows, slice(0, slab.shape[1]), slab)
    return Logits(x, side.bias, side.scale, side.softcap)
