"""A vocabulary that is split over processes: one exchange between ``statistics`` and ``merge``.

To ``merge`` a shard is a segment. Kernel ``fold`` makes one of the segments that a shard has, with
the rules of ``merge``, and reads the logits that are asked for by column: the label's, and those of
a top-k teacher's ids. ``exchanged`` gathers what the objective needs of that, and ``merge`` gets
shards in the place of segments, in the order of the vocabulary, and these logits beside them. The
two sums of ``mixture`` are exchanged as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sad_kernels._triton.merge import merge_segments
from sad_kernels._triton.rows import (
    BEST,
    CROSS,
    CROSS_REVERSE,
    DENSE,
    DIFFERENCE,
    MAXIMUM,
    NO_TEACHER,
    PARTIALS,
    PLAIN,
    SHARD_COUNT,
    TEACHER_AT_BEST,
    TEACHER_BEST,
    TEACHER_MAXIMUM,
    TEACHER_TOTAL,
    TOP_K,
    TOTAL,
    TOTAL_1,
    WEIGHTED,
    Flags,
)
from sad_kernels._triton.tile import (
    JEFFREYS,
    TVD,
    LogitsRow,
    to_fp32,
    to_logits,
)
from sad_kernels.vocab import gathered

KINDS = PARTIALS + 1
"""Partial sums of a shard: those of a segment, and SHARD_COUNT."""


@triton.jit
def fold_kernel(
    partials_ptr,  # [PARTIALS, segments, N] fp32, of ``statistics``
    num_segments, segment_length, N, V,
    s_ptr, s_stride, s_bias, s_scale, s_softcap,  # [N, >= V]; what follows as in LogitsRow
    ids_ptr, K,  # [N, K] int32 of a TOP_K teacher, from the shard's first column
    labels_ptr,  # None, or [N]
    ignore_index,
    other_rows_ptr, wanted,  # None, or [N]: only rows with the wanted number are computed
    first,  # the shard's first column
    folded_ptr,  # [KINDS, N] fp32, written
    picked_ptr,  # [1 + K, N] fp32, written: the logits of the label and the ids; 0 if not here
    inv_T,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a power of 2 from K on
    SHARES: tl.constexpr,  # as in ``merge_segments``
    FLAGS: tl.constexpr,
):  # fmt: skip
    """The segments of each row put together, and the logits that are read by their column."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < N
    counts = exists
    if other_rows_ptr is not None:
        counts = counts & (tl.load(other_rows_ptr + rows, mask=exists, other=0) == wanted)
    label = rows
    if labels_ptr is not None:
        label = tl.load(labels_ptr + rows, mask=counts, other=0)
        counts = counts & (label != ignore_index)
    sums = merge_segments(
        partials_ptr, rows, counts, num_segments, segment_length, N, V, to_fp32(inv_T),
        ROWS, SHARES, False, FLAGS,
    )  # fmt: skip
    out = folded_ptr + rows
    tl.store(out + MAXIMUM * N, sums.m, mask=exists)
    tl.store(out + TOTAL * N, sums.d, mask=exists)
    if FLAGS.COMPUTE_CE:
        tl.store(out + TOTAL_1 * N, sums.d_1, mask=exists)
        if FLAGS.SMOOTH:
            tl.store(out + PLAIN * N, sums.S, mask=exists)
            tl.store(out + SHARD_COUNT * N, sums.count, mask=exists)
        if FLAGS.COMPUTE_METRICS:
            tl.store(out + WEIGHTED * N, sums.E, mask=exists)
    if FLAGS.COMPUTE_METRICS:
        tl.store(out + BEST * N, sums.best + first, mask=exists)
    if FLAGS.TEACHER == DENSE:
        tl.store(out + TEACHER_MAXIMUM * N, sums.m_t, mask=exists)
        tl.store(out + TEACHER_TOTAL * N, sums.d_t, mask=exists)
        if FLAGS.COMPUTE_METRICS:
            tl.store(out + TEACHER_BEST * N, sums.best_t + first, mask=exists)
        if FLAGS.TWO_PASSES:
            tl.store(out + TEACHER_AT_BEST * N, sums.t_at_best, mask=exists)
        else:
            tl.store(out + CROSS * N, sums.A, mask=exists)
        if FLAGS.DIVERGENCE == JEFFREYS:
            tl.store(out + CROSS_REVERSE * N, sums.C, mask=exists)
        if not FLAGS.TWO_PASSES or FLAGS.DIVERGENCE == TVD:
            tl.store(out + DIFFERENCE * N, sums.B, mask=exists)

    student = LogitsRow(s_ptr + rows * s_stride, s_bias, s_scale, s_softcap, None)
    if labels_ptr is not None:
        column = label - first
        here = counts & (column >= 0) & (column < V)
        z = tl.load(student.ptr + column, mask=here, other=0.0).to(tl.float32)
        z, _ = to_logits(z, column, student, here, True)
        tl.store(picked_ptr + rows, tl.where(here, z, 0.0), mask=exists)
    if FLAGS.TEACHER == TOP_K:
        k = tl.arange(0, BLOCK_K)
        given = exists[:, None] & (k < K)[None, :]
        columns = tl.load(ids_ptr + rows[:, None] * K + k[None, :], mask=given, other=-1)
        here = given & counts[:, None] & (columns >= 0) & (columns < V)
        student = LogitsRow(s_ptr + rows[:, None] * s_stride, s_bias, s_scale, s_softcap, None)
        z = tl.load(student.ptr + columns, mask=here, other=0.0).to(tl.float32)
        z, _ = to_logits(z, columns, student, here, True)
        at = (1 + k).to(tl.int64)[None, :] * N + rows[:, None]
        tl.store(picked_ptr + at, tl.where(here, z, 0.0), mask=given)


class Exchanged(NamedTuple):
    """What ``merge`` takes of all shards."""

    partials: Tensor  # [KINDS, shards, N]; kinds that the objective does not need hold anything
    picked: Tensor  # [1 + K, N]


def exchanged(
    folded: Tensor, picked: Tensor, flags: Flags, has_labels: bool, group: str
) -> Exchanged:
    """Gather the partial sums and picked logits of all shards, once, of those that are needed."""
    kinds = needed_kinds(flags)
    logits = picked if has_labels and flags.COMPUTE_CE else picked[1:]
    everyone = gathered(torch.cat([folded[kinds], logits]), group)  # [shards, numbers, N]
    partials = folded.new_empty(KINDS, len(everyone), folded.shape[1])
    partials[kinds] = everyone[:, : len(kinds)].transpose(0, 1)
    # Each of these logits is known to one shard. The others' 0 adds nothing.
    picked = picked.clone()
    picked[len(picked) - len(logits) :] = everyone[:, len(kinds) :].sum(0)
    return Exchanged(partials, picked)


def needed_kinds(flags: Flags) -> list[int]:
    """The partial sums that ``merge`` reads, by their numbers in ``rows.py``."""
    dense, mixture = flags.TEACHER == DENSE.value, flags.TWO_PASSES
    variation = flags.DIVERGENCE == TVD.value
    needed = {
        MAXIMUM: True,
        TOTAL: flags.TEACHER != NO_TEACHER.value,
        TOTAL_1: flags.COMPUTE_CE,
        PLAIN: flags.COMPUTE_CE and flags.SMOOTH,
        SHARD_COUNT: flags.COMPUTE_CE and flags.SMOOTH,
        WEIGHTED: flags.COMPUTE_CE and flags.COMPUTE_METRICS,
        BEST: flags.COMPUTE_METRICS,
        TEACHER_MAXIMUM: dense,
        TEACHER_TOTAL: dense,
        TEACHER_BEST: dense and flags.COMPUTE_METRICS,
        CROSS: dense,  # TEACHER_AT_BEST of what takes two passes
        CROSS_REVERSE: dense and flags.DIVERGENCE == JEFFREYS.value,
        DIFFERENCE: dense and (not mixture or variation),
    }
    return [kind.value for kind, is_needed in needed.items() if is_needed]
