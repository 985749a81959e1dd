"""Kernel ``gradient``: the gradient of the row losses by the logits, written once."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sad_kernels._triton.codes import load_codes
from sad_kernels._triton.rows import (
    DENSE,
    EXPECTATION,
    MASS,
    MAXIMUM,
    RATIO,
    REFERENCE,
    SAVED_TEACHER_MAXIMUM,
    SAVED_TEACHER_TOTAL,
    TOP_K,
    TOP_SIGN,
    TOTAL,
    TOTAL_1,
    TOTALS,
    first_id_at,
    id_at,
    product,
)
from sad_kernels._triton.tile import (
    FORWARD_KL,
    JEFFREYS,
    LN_2,
    REVERSE_KL,
    TVD,
    ClassShares,
    LogitsRow,
    exponentials,
    load_logits,
    load_shares,
    mixture_gap,
    mixture_row,
    mixture_terms,
    probability_difference,
    sign,
    teacher_side,
    to_dtype,
    to_fp32,
    totals_ratio,
)


class RowScalars(NamedTuple):
    """What the gradient of one row needs besides its logits, named as in ``rows.py``."""

    label: Any
    m: Any  # what the loaded logits are relative to, and the teacher's: 0 if they are codes
    m_t: Any
    shifts: Any  # None, or of the groups of codes, see ``load_codes``
    t_shifts: Any
    expectation: Any
    reference: Any  # what the slopes of a mixture or of TVD count from
    mixture: Any  # its MixtureRow
    kd: Any  # the divergence's factor: its weight, the upstream's, and 1/d
    near: Any  # forward_kl: d/d_t is near - rest
    rest: Any
    outside: Any  # of a column without an id, by e^((s - m_t)/T)
    q_1_factor: Any  # the CE's and z-loss's gradient by e^x
    shares: Any  # what every column loses, a number or ClassShares
    label_share: Any  # what the label's column loses


@triton.jit
def difference_tile(exp_T, y, apart, t_share, scalars, inv_T):
    """``d (q - p)`` of a tile."""
    exp_T_t = tl.exp2(y * inv_T)
    near, rest = scalars.near, scalars.rest
    return probability_difference(exp_T, exp_T_t, apart, near, rest, t_share, inv_T)


@triton.jit
def gradient_tile(
    student, teacher, t_share, start, V, scalars, ids, inside, K, id, next_id, inv_T, beta,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """The gradient by the logits before their softcap, all in fp32: the store is the only rounding.

    It grows with the upstream gradient, of which a factor of the logits is a part.
    """
    columns = start + tl.arange(0, BLOCK)
    if scalars.shifts is None:
        s, slope = load_logits(student, columns, V, MASKED)
    else:
        s = load_codes(student, scalars.shifts, start, V, BLOCK, MASKED)
        slope = s
    t = s
    if FLAGS.TEACHER == DENSE:
        if scalars.shifts is None:
            t, _ = load_logits(teacher, columns, V, MASKED)
        else:
            t = load_codes(teacher, scalars.t_shifts, start, V, BLOCK, MASKED)

    # The divergence, from what lies between the two sides: near agreement little else is left.
    g = tl.zeros([BLOCK], tl.float32)
    if FLAGS.TEACHER == TOP_K:
        g = tl.exp2((s - scalars.m_t) * inv_T) * scalars.outside
        while next_id < start + BLOCK:
            g = tl.where(columns == next_id, scalars.kd * tl.load(inside + id), g)
            id += 1
            next_id = id_at(ids, K, id)
    x = s - scalars.m
    exp_T, exp_1 = exponentials(x, inv_T, FLAGS.T_CASE)
    if FLAGS.TEACHER == DENSE:
        y, apart = teacher_side(x, s, t, t_share, scalars.m, scalars.m_t)
        if FLAGS.DIVERGENCE == FORWARD_KL:  # q - p
            g = difference_tile(exp_T, y, apart, t_share, scalars, inv_T) * scalars.kd
        elif FLAGS.DIVERGENCE == JEFFREYS:  # both KLs
            forward = difference_tile(exp_T, y, apart, t_share, scalars, inv_T)
            reverse = product(exp_T, -apart - scalars.expectation) * (inv_T * LN_2)
            g = (beta * forward + (1 - beta) * reverse) * scalars.kd
        elif FLAGS.DIVERGENCE == TVD:  # q (sign(q - p) - its expectation) / 2, see variation_terms
            above = sign(difference_tile(exp_T, y, apart, t_share, scalars, inv_T))
            above -= scalars.reference
            g = exp_T * (above - scalars.expectation) * (0.5 * scalars.kd)
        elif FLAGS.DIVERGENCE == REVERSE_KL:  # q ((x - y)/T - its expectation)
            g = product(exp_T, -apart - scalars.expectation) * scalars.kd
        else:  # q (phi - its expectation); mixture_terms stops the compiler at an unknown one
            gap = mixture_gap(x, t, scalars.reference, t_share, inv_T)
            phi, _ = mixture_terms(gap, scalars.mixture, beta, FLAGS.DIVERGENCE, False)
            g = exp_T * (phi - scalars.expectation) * scalars.kd
        if teacher.is_read is not None:
            g = tl.where(tl.zeros_like(columns) < teacher.is_read, g, 0.0)

    # CE and z-loss, the label's column last.
    if FLAGS.COMPUTE_CE:
        lost = scalars.shares
        if FLAGS.SMOOTH:
            lost = load_shares(lost, columns, V, MASKED)
        g += exp_1 * scalars.q_1_factor - lost
        if (scalars.label >= start) & (scalars.label < start + BLOCK):
            g = tl.where(columns == scalars.label, g - scalars.label_share, g)
    if student.softcap is not None:
        g *= slope
    return g, id, next_id


@triton.jit
def gradient_kernel(
    s_ptr, s_stride, s_bias, s_scale, s_softcap,  # [N, >= V]; what follows as in LogitsRow
    t_ptr, t_stride, t_bias, t_scale, t_softcap,  # [N, >= V] of a DENSE teacher
    t_share,  # None, or the teacher's share of the target
    s_shifts_ptr, t_shifts_ptr, num_groups,  # None, or [N, groups]: the logits of both are codes
    ids_ptr,  # [N, K] int32 of a TOP_K teacher, ascending in each row
    inside_ptr,  # [N, K] fp32, of ``merge``: the divergence's gradient by the ids' logits
    outside_ptr,  # [N] fp32, of ``merge``: the same by all other logits, by e^((s - m_t)/T)
    K,
    labels_ptr,  # None, or [N]
    ignore_index,
    other_rows_ptr, wanted,  # None, or [N]: only rows with the wanted number are computed
    token_weights_ptr,  # None, or [N] fp32: of CE and z-loss
    kd_weights_ptr,  # None, or [N] fp32: of the divergence; no teacher's row is read where it is 0
    soft_ptr, soft_stride,  # None, or [N, >= V] probabilities of the classes
    class_weight_ptr,  # None, or [V]
    saved_ptr,  # [SAVED, N] fp32, of ``merge``
    upstream_ptr, upstream_stride,  # [N], or one number with stride 0
    g_ptr, g_stride,  # [N, width], written
    N, V, width,
    shard_start, classes,  # None, or of a shard: its first column, and the columns of all
    inv_T, temperature, beta, smoothing, ce_weight, kd_weight, z_loss, kd_scale,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    FLAGS: tl.constexpr,  # TEACHER is NO_TEACHER also where its weight is 0
):  # fmt: skip
    """One row over one segment of ``width``: the gradient up to V, zeros from there on."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SEGMENT
    last = tl.minimum(first + SEGMENT, width)
    g_row = g_ptr + row * g_stride
    if other_rows_ptr is not None:
        if tl.load(other_rows_ptr + row) != wanted:
            return
    label = tl.full((), -1, tl.int64)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        if label == ignore_index:  # zeros, without reading: the row may hold anything
            for start in range(first, last, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                nothing = tl.zeros([BLOCK], g_ptr.dtype.element_ty)
                tl.store(g_row + columns, nothing, mask=columns < last)
            return

    inv_T, beta = to_fp32(inv_T), to_fp32(beta)
    student = LogitsRow(s_ptr + row * s_stride, s_bias, s_scale, s_softcap, None)
    teacher = student
    saved = saved_ptr + row
    m = tl.load(saved + MAXIMUM * N)
    d = tl.load(saved + TOTAL * N)
    upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
    if classes is None:
        classes = V
    if labels_ptr is not None:
        upstream = tl.where((label >= 0) & (label < classes), upstream, float("nan"))
        if shard_start is not None:
            label -= shard_start
    kd = upstream * to_fp32(kd_weight) * to_fp32(kd_scale) / to_fp32(temperature)
    is_read = None
    if kd_weights_ptr is not None:
        on_kd = tl.load(kd_weights_ptr + row)
        is_read = (on_kd != 0).to(tl.int32)
        kd *= on_kd

    # What ``merge`` has saved of the teacher.
    zero = tl.full((), 0, tl.float32)
    m_t, expectation, outside, near, rest = zero, zero, zero, zero, zero
    reference, mixture = zero, zero
    ids, inside = ids_ptr + row * K, inside_ptr + row * K
    id, next_id = 0, 0
    if FLAGS.TEACHER == DENSE:
        teacher = LogitsRow(t_ptr + row * t_stride, t_bias, t_scale, t_softcap, is_read)
        m_t = tl.load(saved + SAVED_TEACHER_MAXIMUM * N)
        d_t = tl.load(saved + SAVED_TEACHER_TOTAL * N)
        expectation = tl.load(saved + EXPECTATION * N)
        if FLAGS.DIVERGENCE == TVD:
            reference = tl.load(saved + TOP_SIGN * N)
        if FLAGS.TWO_PASSES and FLAGS.DIVERGENCE != TVD:
            reference = tl.load(saved + REFERENCE * N)
            mixture = mixture_row(tl.load(saved + RATIO * N), beta, FLAGS.DIVERGENCE, True)
            kd /= d
        elif FLAGS.DIVERGENCE == FORWARD_KL:
            near, rest = totals_ratio(expectation, d, d_t)
            kd /= d
        elif FLAGS.DIVERGENCE == JEFFREYS or FLAGS.DIVERGENCE == TVD:
            near, rest = totals_ratio(tl.load(saved + TOTALS * N), d, d_t)
            kd /= d
        else:
            kd /= d * to_fp32(temperature)
    if FLAGS.TEACHER == TOP_K:
        if is_read is not None:
            K *= is_read
        id = first_id_at(ids, K, first)
        next_id = id_at(ids, K, id)
        m_t = tl.load(saved + SAVED_TEACHER_MAXIMUM * N)
        if is_read is None:
            outside = kd * tl.load(outside_ptr + row)
        else:
            outside = kd * tl.load(outside_ptr + row, mask=is_read > 0, other=0.0)

    # The factors of CE and z-loss.
    q_1_factor, shares, label_share = zero, zero, zero
    if FLAGS.COMPUTE_CE:
        d_1 = tl.load(saved + TOTAL_1 * N)
        ce_weight, smoothing = to_fp32(ce_weight), to_fp32(smoothing)
        lse = m + tl.log(d_1)
        mass = ce_weight
        if (soft_ptr is not None) or (class_weight_ptr is not None):
            mass *= tl.load(saved + MASS * N)
        q_1_factor = upstream * (mass + 2 * to_fp32(z_loss) * lse) / d_1
        if token_weights_ptr is not None:
            on_ce = tl.load(token_weights_ptr + row)
            q_1_factor = tl.where(on_ce != 0, on_ce * q_1_factor, 0.0)
            ce_weight *= on_ce
        shares = upstream * ce_weight * smoothing / classes
        label_share = upstream * ce_weight * (1 - smoothing)
        if FLAGS.SMOOTH:
            soft = None
            if soft_ptr is not None:
                soft = soft_ptr + row * soft_stride
            shares = ClassShares(soft, class_weight_ptr, label_share, shares)
        if (class_weight_ptr is not None) and (labels_ptr is not None):
            in_range = (label >= 0) & (label < V)
            label_share *= tl.load(class_weight_ptr + label, mask=in_range, other=0.0)

    shifts, t_shifts = None, None
    if s_shifts_ptr is not None:
        m, m_t = zero, zero  # codes are relative to their row's maximum as they are decoded
        shifts = s_shifts_ptr + row * num_groups
        if FLAGS.TEACHER == DENSE:
            t_shifts = t_shifts_ptr + row * num_groups
    scalars = RowScalars(
        label=label, m=m, m_t=m_t, shifts=shifts, t_shifts=t_shifts,
        expectation=expectation, reference=reference, mixture=mixture, kd=kd, near=near, rest=rest,
        outside=outside, q_1_factor=q_1_factor, shares=shares, label_share=label_share,
    )  # fmt: skip
    stop = tl.minimum(last, V)
    whole = first + tl.maximum(stop - first, 0) // BLOCK * BLOCK
    # Codes and g may be the same memory: each number is written by whoever has read it.
    for start in range(first, whole, BLOCK):  # whole tiles, read and written without a mask
        columns = start + tl.arange(0, BLOCK)
        g, id, next_id = gradient_tile(
            student, teacher, t_share, start, V, scalars, ids, inside, K, id, next_id, inv_T, beta,
            BLOCK, False, FLAGS,
        )  # fmt: skip
        tl.store(g_row + columns, to_dtype(g, g_ptr.dtype.element_ty))
    for start in range(whole, last, BLOCK):  # what is left up to V, then the padding
        columns = start + tl.arange(0, BLOCK)
        g = tl.zeros([BLOCK], tl.float32)
        if start < V:
            g, id, next_id = gradient_tile(
                student, teacher, t_share, start, V, scalars, ids, inside, K, id, next_id, inv_T,
                beta, BLOCK, True, FLAGS,
            )  # fmt: skip
            g = tl.where(columns < V, g, 0.0)
        tl.store(g_row + columns, to_dtype(g, g_ptr.dtype.element_ty), mask=columns < last)
