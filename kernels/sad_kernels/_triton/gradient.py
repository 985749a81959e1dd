"""Kernel ``gradient``: the gradient of the row losses by the logits, written once."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sad_kernels._triton.rows import (
    DENSE,
    EXPECTATION,
    MAXIMUM,
    RATIO,
    REFERENCE,
    SAVED_TEACHER_MAXIMUM,
    SAVED_TEACHER_TOTAL,
    TOP_K,
    TOTAL,
    TOTAL_1,
    first_id_at,
    id_at,
    product,
)
from sad_kernels._triton.tile import (
    FORWARD_KL,
    REVERSE_KL,
    LogitsRow,
    exponentials,
    load_logits,
    mixture_gap,
    mixture_row,
    mixture_terms,
    to_dtype,
    to_fp32,
    to_target,
)


class RowScalars(NamedTuple):
    """What the gradient of one row needs besides its logits, named as in ``rows.py``."""

    label: Any
    m: Any
    m_t: Any
    expectation: Any
    reference: Any  # of a mixture
    mixture: Any  # its MixtureRow
    kd: Any  # the divergence's factor: its weight, the upstream's, and 1/d
    near: Any  # forward_kl: d/d_t is near - rest
    rest: Any
    outside: Any  # of a column without an id, by e^((s - m_t)/T)
    q_1_factor: Any  # the CE's and z-loss's gradient by e^x
    smooth_share: Any  # what label smoothing takes from every column
    label_share: Any  # what the label's column loses


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
    s, slope = load_logits(student, columns, V, MASKED)
    t = s
    if FLAGS.TEACHER == DENSE:
        t, _ = load_logits(teacher, columns, V, MASKED)

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
        if FLAGS.DIVERGENCE == FORWARD_KL:  # q - p
            y = to_target(s, t, t_share) - scalars.m_t
            exp_T_t = tl.exp2(y * inv_T)
            g = ((exp_T - exp_T_t * scalars.near) + exp_T_t * scalars.rest) * scalars.kd
        elif FLAGS.DIVERGENCE == REVERSE_KL:  # q ((x - y)/T - its expectation)
            y = to_target(s, t, t_share) - scalars.m_t
            g = product(exp_T, (x - y) - scalars.expectation) * scalars.kd
        else:  # q (phi - its expectation); mixture_terms stops the compiler at an unknown one
            gap = mixture_gap(x, t, scalars.reference, t_share, inv_T)
            phi, _ = mixture_terms(gap, scalars.mixture, beta, FLAGS.DIVERGENCE, False)
            g = exp_T * (phi - scalars.expectation) * scalars.kd

    # CE and z-loss, the label's column last.
    if FLAGS.COMPUTE_CE:
        g += exp_1 * scalars.q_1_factor - scalars.smooth_share
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
    ids_ptr,  # [N, K] int32 of a TOP_K teacher, ascending in each row
    inside_ptr,  # [N, K] fp32, of ``merge``: the divergence's gradient by the ids' logits
    outside_ptr,  # [N] fp32, of ``merge``: the same by all other logits, by e^((s - m_t)/T)
    K,
    labels_ptr,  # None, or [N]
    ignore_index,
    saved_ptr,  # [SAVED, N] fp32, of ``merge``
    upstream_ptr, upstream_stride,  # [N], or one number with stride 0
    g_ptr, g_stride,  # [N, width], written
    N, V, width,
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
    student = LogitsRow(s_ptr + row * s_stride, s_bias, s_scale, s_softcap)
    teacher = student
    saved = saved_ptr + row
    m = tl.load(saved + MAXIMUM * N)
    d = tl.load(saved + TOTAL * N)
    upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
    if labels_ptr is not None:
        upstream = tl.where((label >= 0) & (label < V), upstream, float("nan"))
    kd = upstream * to_fp32(kd_weight) * to_fp32(kd_scale) / to_fp32(temperature)

    # What ``merge`` has saved of the teacher.
    zero = tl.full((), 0, tl.float32)
    m_t, expectation, outside, near, rest = zero, zero, zero, zero, zero
    reference, mixture = zero, zero
    ids, inside = ids_ptr, inside_ptr
    id, next_id = 0, 0
    if FLAGS.TEACHER == DENSE:
        teacher = LogitsRow(t_ptr + row * t_stride, t_bias, t_scale, t_softcap)
        m_t = tl.load(saved + SAVED_TEACHER_MAXIMUM * N)
        d_t = tl.load(saved + SAVED_TEACHER_TOTAL * N)
        expectation = tl.load(saved + EXPECTATION * N)
        if FLAGS.MIXTURE:
            reference = tl.load(saved + REFERENCE * N)
            mixture = mixture_row(tl.load(saved + RATIO * N), beta, FLAGS.DIVERGENCE, True)
            kd /= d
        elif FLAGS.DIVERGENCE == FORWARD_KL:
            # d/d_t = 1 - B/d_t, in two numbers where the first is most of it
            is_near = tl.abs(expectation * d_t) < 0.5 * d
            near, rest = tl.where(is_near, 1.0, d / d_t), tl.where(is_near, expectation, 0.0)
            kd /= d
        else:
            kd /= d * to_fp32(temperature)
    if FLAGS.TEACHER == TOP_K:
        ids, inside = ids_ptr + row * K, inside_ptr + row * K
        id = first_id_at(ids, K, first)
        next_id = id_at(ids, K, id)
        m_t = tl.load(saved + SAVED_TEACHER_MAXIMUM * N)
        outside = kd * tl.load(outside_ptr + row)

    # The factors of CE and z-loss.
    q_1_factor, smooth_share, label_share = zero, zero, zero
    if FLAGS.COMPUTE_CE:
        d_1 = tl.load(saved + TOTAL_1 * N)
        ce_weight, smoothing = to_fp32(ce_weight), to_fp32(smoothing)
        lse = m + tl.log(d_1)
        q_1_factor = upstream * (ce_weight + 2 * to_fp32(z_loss) * lse) / d_1
        smooth_share = upstream * ce_weight * smoothing / V
        label_share = upstream * ce_weight * (1 - smoothing)

    scalars = RowScalars(
        label=label, m=m, m_t=m_t, expectation=expectation, reference=reference,
        mixture=mixture, kd=kd, near=near, rest=rest, outside=outside,
        q_1_factor=q_1_factor, smooth_share=smooth_share, label_share=label_share,
    )  # fmt: skip
    stop = tl.minimum(last, V)
    whole = first + tl.maximum(stop - first, 0) // BLOCK * BLOCK
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
