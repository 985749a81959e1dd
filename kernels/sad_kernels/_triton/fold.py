"""Kernel ``fold``: the groups of columns of each row put together, where logits are codes.

To ``merge`` a row of groups is one shard of a vocabulary: it gets sums of whole rows, and the
label's logit beside them. There may be a thousand groups of a row. They are put together all at
once, as a tree, where ``merge`` would take as many steps, each of which waits for the one before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.codes import GROUP, NO_MAXIMUM, decoded
from sad_kernels._triton.compress import (
    GROUP_CROSS,
    GROUP_DIFFERENCE,
    GROUP_MAXIMUM,
    GROUP_TOTAL,
)
from sad_kernels._triton.rows import (
    BEST,
    CROSS,
    DENSE,
    DIFFERENCE,
    MAXIMUM,
    PLAIN,
    SHARD_COUNT,
    TEACHER_BEST,
    TEACHER_MAXIMUM,
    TEACHER_TOTAL,
    TOTAL,
    TOTAL_1,
    WEIGHTED,
    rescale_cross,
    rescale_difference,
)
from sad_kernels._triton.tile import FORWARD_KL, LOG2_E, LOWEST, ONE, exponentials, to_fp32


@triton.jit
def first_maximum(codes, k, top, groups, counts, V, GROUPS: tl.constexpr):
    """The first column of the largest logit: in the first group with the largest maximum.

    Of each row: ``codes`` [rows] point to its first column, ``k`` [GROUPS, rows] are the maxima of
    its groups and ``top`` [rows] the largest of them.
    """
    group = tl.min(tl.where(k == top[None, :], groups, GROUPS), 0)
    group = tl.where(group < GROUPS, group, 0)  # no maximum equals NaN
    within = tl.arange(0, GROUP)[None, :]
    columns = group[:, None] * GROUP + within
    inside = counts[:, None] & (columns < V)
    code = tl.load(codes[:, None] + columns, mask=inside, other=NO_MAXIMUM)
    return group * GROUP + tl.min(tl.where(code == 0, within, GROUP), 1)


@triton.jit
def fold_groups_kernel(
    s_codes_ptr, s_stride,  # [N, >= V] int16
    s_sums_ptr,  # [kinds, groups, N] fp32, see ``compress.py``
    t_codes_ptr, t_stride,  # the same of a DENSE teacher
    t_sums_ptr,
    labels_ptr,  # None, or [N]
    ignore_index,
    kd_weights_ptr,  # None, or [N]: rows of weight 0 are not compared
    s_shifts_ptr, t_shifts_ptr,  # [N, groups] fp32, written
    folded_ptr,  # [kinds, N] fp32, written: the sums of rows, as of one shard
    picked_ptr,  # [N] fp32, written: the labels' logits
    N, V, num_groups, inv_T,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of 2
    FLAGS: tl.constexpr,
):  # fmt: skip
    """All groups of some rows put together at once, in an order that depends on V alone."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < N
    counts = exists
    label = rows
    if labels_ptr is not None:
        label = tl.load(labels_ptr + rows, mask=exists, other=0).to(tl.int64)
        counts = exists & (label != ignore_index)
    compared = counts
    if kd_weights_ptr is not None:
        compared = counts & (tl.load(kd_weights_ptr + rows, mask=counts, other=0.0) != 0)
    inv_T = to_fp32(inv_T)
    groups = tl.arange(0, GROUPS)[:, None]
    mask = (groups < num_groups) & counts[None, :]
    at = groups.to(tl.int64) * N + rows[None, :]
    by_row = rows[None, :] * num_groups + groups
    step = tl.full((), num_groups, tl.int64) * N  # from one kind of sum to the next
    out = folded_ptr + rows

    sums = s_sums_ptr + at
    k = tl.load(sums + MAXIMUM * step, mask=mask, other=LOWEST)
    top = tl.max(k, 0)
    shift = k - top[None, :]
    tl.store(s_shifts_ptr + by_row, shift, mask=mask)
    rate_T, rate_1 = exponentials(shift, inv_T, FLAGS.T_CASE)
    d = tl.load(sums + TOTAL * step, mask=mask, other=0.0)
    tl.store(out + MAXIMUM * N, top, mask=exists)
    tl.store(out + TOTAL * N, tl.sum(d * rate_T, 0), mask=exists)
    if FLAGS.COMPUTE_CE:
        d_1 = d
        if FLAGS.T_CASE != ONE:
            d_1 = tl.load(sums + TOTAL_1 * step, mask=mask, other=0.0)
        tl.store(out + TOTAL_1 * N, tl.sum(d_1 * rate_1, 0), mask=exists)
        if FLAGS.SMOOTH:
            S = tl.load(sums + PLAIN * step, mask=mask, other=0.0)
            S += tl.minimum(V - groups * GROUP, GROUP).to(tl.float32) * shift
            tl.store(out + PLAIN * N, tl.sum(tl.where(mask, S, 0.0), 0), mask=exists)
            count = tl.zeros([ROWS], tl.float32) + V
            tl.store(out + SHARD_COUNT * N, count, mask=exists)
        if FLAGS.COMPUTE_METRICS:
            E = tl.load(sums + WEIGHTED * step, mask=mask, other=0.0)
            E = rescale_cross(d_1, E, shift, 0.0, LOG2_E)
            tl.store(out + WEIGHTED * N, tl.sum(E, 0), mask=exists)
    s_codes = s_codes_ptr + rows * s_stride
    if FLAGS.COMPUTE_METRICS:
        best = first_maximum(s_codes, k, top, groups, counts, V, GROUPS)
        tl.store(out + BEST * N, best.to(tl.float32), mask=exists)
    if labels_ptr is not None:
        here = counts & (label >= 0) & (label < V)
        y = decoded(tl.load(s_codes + label, mask=here, other=0))
        k_y = tl.load(s_sums_ptr + (label // GROUP) * N + rows, mask=here, other=0.0)
        tl.store(picked_ptr + rows, y + k_y, mask=exists)

    if FLAGS.TEACHER == DENSE:
        t_mask = mask & compared[None, :]
        sums = t_sums_ptr + at
        k = tl.load(sums + GROUP_MAXIMUM * step, mask=t_mask, other=LOWEST)
        top = tl.max(k, 0)
        t_shift = k - top[None, :]
        tl.store(t_shifts_ptr + by_row, t_shift, mask=t_mask)
        d_t = tl.load(sums + GROUP_TOTAL * step, mask=t_mask, other=0.0)
        A = tl.load(sums + GROUP_CROSS * step, mask=t_mask, other=0.0)
        B = tl.load(sums + GROUP_DIFFERENCE * step, mask=t_mask, other=0.0)
        t_rate = tl.exp2(t_shift * inv_T)
        if FLAGS.DIVERGENCE == FORWARD_KL:
            A = rescale_cross(d_t, A, t_shift, shift, inv_T)
        else:
            A = rescale_cross(d, A, shift, t_shift, inv_T)
        B = rescale_difference(d_t, B, t_rate, rate_T)
        A, B = tl.where(t_mask, A, 0.0), tl.where(t_mask, B, 0.0)
        tl.store(out + TEACHER_MAXIMUM * N, top, mask=exists)
        tl.store(out + TEACHER_TOTAL * N, tl.sum(d_t * t_rate, 0), mask=exists)
        tl.store(out + CROSS * N, tl.sum(A, 0), mask=exists)
        tl.store(out + DIFFERENCE * N, tl.sum(B, 0), mask=exists)
        if FLAGS.COMPUTE_METRICS:
            t_codes = t_codes_ptr + rows * t_stride
            best = first_maximum(t_codes, k, top, groups, compared, V, GROUPS)
            tl.store(out + TEACHER_BEST * N, best.to(tl.float32), mask=exists)
