"""Kernels that turn fp32 products into codes, and sum up what the codes stand for by group.

A product of hidden states and a head is made a slab at a time: some rows, and as many columns as a
GPU's L2 cache holds of them in fp32. These kernels read a slab once and write the codes of
``codes.py``, half as many bytes, and a few sums per row and group of columns; the next product
overwrites the slab.

What is stored is the logit: sums are of what the codes stand for, so that loss, normalisers and
gradient belong to the same logits. Where both sides are equal a KL and its gradient are 0 to the
bit, and near agreement the errors of codes cancel. Only the smooth term is a sum of exact logits.

Sums by group, [kind, groups, N] in fp32
----------------------------------------
They are the partial sums of ``rows.py`` with a group as the segment, relative to its maximum:

==========  ===============================================================================
student     MAXIMUM, TOTAL, TOTAL_1 (not at T = 1), PLAIN with SMOOTH, WEIGHTED with metrics
teacher     GROUP_MAXIMUM, GROUP_TOTAL, GROUP_CROSS (A), GROUP_DIFFERENCE (B)
==========  ===============================================================================

The teacher comes second: its A and B are made with the student's codes of the same columns. Where
the target is a mixture of both sides' logits, the teacher's codes and sums are of the mixture.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.codes import GROUP, decoded, encoded, group_maxima
from sad_kernels._triton.rows import MAXIMUM, PLAIN, TOTAL, TOTAL_1, WEIGHTED, product
from sad_kernels._triton.tile import (
    FORWARD_KL,
    LOWEST,
    ONE,
    REVERSE_KL,
    LogitsRow,
    exponentials,
    to_fp32,
    to_logits,
    to_target,
)

# The teacher's sums by group
GROUP_MAXIMUM = tl.constexpr(0)
GROUP_TOTAL = tl.constexpr(1)
GROUP_CROSS = tl.constexpr(2)
GROUP_DIFFERENCE = tl.constexpr(3)


@triton.jit
def slab_logits(row, columns, first, last, MASKED: tl.constexpr):
    """The logits of one row at ``columns`` of the vocabulary; its slab begins at ``first``."""
    if MASKED:
        inside = columns < last
        x = tl.load(row.ptr + (columns - first), mask=inside, other=0.0)
        x, _ = to_logits(x, columns, row, inside, True)
        x = tl.where(inside, x, float("-inf"))
    else:
        x, _ = to_logits(tl.load(row.ptr + (columns - first)), columns, row, columns, False)
    return x


@triton.jit
def store_codes(codes, columns, code, last, MASKED: tl.constexpr):
    if MASKED:
        tl.store(codes + columns, code, mask=columns < last)
    else:
        tl.store(codes + columns, code)


@triton.jit
def student_groups(
    row, codes, out, step, start, first, last, N, inv_T,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,  # some columns may lie past ``last``
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Codes and sums of the groups in the BLOCK columns at ``start``.

    ``out`` is of the row's first group, ``step`` from one kind of sum to the next.
    """
    groups = start // GROUP + tl.arange(0, BLOCK // GROUP)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = slab_logits(row, columns, first, last, MASKED)
    k = group_maxima(x)
    code, y = encoded(x, k[:, None])
    store_codes(codes, columns, code, last, MASKED)
    exp_T, exp_1 = exponentials(y, inv_T, FLAGS.T_CASE)
    out += groups.to(tl.int64) * N
    there = groups * GROUP < last
    tl.store(out + MAXIMUM * step, k, mask=there)
    tl.store(out + TOTAL * step, tl.sum(exp_T, 1), mask=there)
    if FLAGS.COMPUTE_CE:
        if FLAGS.T_CASE != ONE:
            tl.store(out + TOTAL_1 * step, tl.sum(exp_1, 1), mask=there)
        if FLAGS.SMOOTH:
            plain = x - k[:, None]
            if MASKED:
                plain = tl.where(columns < last, plain, 0.0)
            tl.store(out + PLAIN * step, tl.sum(plain, 1), mask=there)
        if FLAGS.COMPUTE_METRICS:
            weighted = exp_1 * tl.maximum(y, LOWEST)  # 0 * -inf is 0
            tl.store(out + WEIGHTED * step, tl.sum(weighted, 1), mask=there)


@triton.jit
def student_codes_kernel(
    x_ptr, x_stride,  # [N, columns of the slab] fp32
    s_bias, s_scale, s_softcap,  # as in LogitsRow
    codes_ptr, codes_stride,  # [N, >= V] int16, written from ``first`` on
    sums_ptr,  # [kinds, groups, N] fp32, written
    labels_ptr,  # None, or [N]
    ignore_index,
    first, last,  # of the slab in the vocabulary: its first column, and one past its last
    N, num_groups, inv_T,
    BLOCK: tl.constexpr,  # columns of a program: whole groups
    FLAGS: tl.constexpr,
):  # fmt: skip
    """One row's logits, of some groups of a slab, as codes. Ignored rows are not read."""
    row = tl.program_id(0).to(tl.int64)
    start = first + tl.program_id(1) * BLOCK
    if labels_ptr is not None:
        if tl.load(labels_ptr + row) == ignore_index:
            return
    inv_T = to_fp32(inv_T)
    student = LogitsRow(x_ptr + row * x_stride, s_bias, s_scale, s_softcap, None)
    codes, out = codes_ptr + row * codes_stride, sums_ptr + row
    step = tl.full((), num_groups, tl.int64) * N
    if start + BLOCK <= last:
        student_groups(student, codes, out, step, start, first, last, N, inv_T, BLOCK, False, FLAGS)
    else:
        student_groups(student, codes, out, step, start, first, last, N, inv_T, BLOCK, True, FLAGS)


@triton.jit
def teacher_groups(
    row, s_codes, s_sums, t_share, codes, out, step, start, first, last, N, inv_T,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """``student_groups`` of the teacher, beside the student's codes and maxima."""
    groups = start // GROUP + tl.arange(0, BLOCK // GROUP)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = groups * GROUP < last
    t = slab_logits(row, columns, first, last, MASKED)
    if MASKED:
        x = decoded(tl.load(s_codes + columns, mask=columns < last, other=0))
        x = tl.where(columns < last, x, float("-inf"))
    else:
        x = decoded(tl.load(s_codes + columns))
    if t_share is not None:
        k_s = tl.load(s_sums + groups.to(tl.int64) * N, mask=there, other=0.0)
        t = to_target(x + k_s[:, None], t, t_share)
    k = group_maxima(t)
    code, y = encoded(t, k[:, None])
    store_codes(codes, columns, code, last, MASKED)
    exp_T, exp_T_t = tl.exp2(x * inv_T), tl.exp2(y * inv_T)
    out += groups.to(tl.int64) * N
    tl.store(out + GROUP_MAXIMUM * step, k, mask=there)
    tl.store(out + GROUP_TOTAL * step, tl.sum(exp_T_t, 1), mask=there)
    if FLAGS.DIVERGENCE == FORWARD_KL:
        cross = product(exp_T_t, y - x)
    else:
        tl.static_assert(
            FLAGS.DIVERGENCE == REVERSE_KL,
            "divergence must have a branch in every kernel that asks for it, got an unknown code; "
            "add it where the known ones are told apart",
        )
        cross = product(exp_T, x - y)
    tl.store(out + GROUP_CROSS * step, tl.sum(cross, 1), mask=there)
    tl.store(out + GROUP_DIFFERENCE * step, tl.sum(exp_T_t - exp_T, 1), mask=there)


@triton.jit
def teacher_codes_kernel(
    x_ptr, x_stride,  # [N, columns of the slab] fp32
    t_bias, t_scale, t_softcap,  # as in LogitsRow
    t_share,  # None, or the teacher's share of the target
    s_codes_ptr, s_codes_stride,  # [N, >= V] int16, the student's
    s_sums_ptr,  # [kinds, groups, N] fp32, the student's: of the maxima
    codes_ptr, codes_stride,  # [N, >= V] int16, written from ``first`` on
    sums_ptr,  # [kinds, groups, N] fp32, written
    labels_ptr,  # None, or [N]
    ignore_index,
    kd_weights_ptr,  # None, or [N]: rows of weight 0 are not compared
    first, last,  # of the slab in the vocabulary: its first column, and one past its last
    N, num_groups, inv_T,
    BLOCK: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """``student_codes_kernel`` of the teacher, beside the student's codes of the same columns."""
    row = tl.program_id(0).to(tl.int64)
    start = first + tl.program_id(1) * BLOCK
    if labels_ptr is not None:
        if tl.load(labels_ptr + row) == ignore_index:
            return
    if kd_weights_ptr is not None:
        if tl.load(kd_weights_ptr + row) == 0:
            return
    inv_T = to_fp32(inv_T)
    teacher = LogitsRow(x_ptr + row * x_stride, t_bias, t_scale, t_softcap, None)
    codes, out = codes_ptr + row * codes_stride, sums_ptr + row
    s_codes, s_sums = s_codes_ptr + row * s_codes_stride, s_sums_ptr + MAXIMUM + row
    step = tl.full((), num_groups, tl.int64) * N
    if start + BLOCK <= last:
        teacher_groups(
            teacher, s_codes, s_sums, t_share, codes, out, step, start, first, last, N, inv_T,
            BLOCK, False, FLAGS,
        )  # fmt: skip
    else:
        teacher_groups(
            teacher, s_codes, s_sums, t_share, codes, out, step, start, first, last, N, inv_T,
            BLOCK, True, FLAGS,
        )  # fmt: skip
