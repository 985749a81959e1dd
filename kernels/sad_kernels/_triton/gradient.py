"""Kernel: the gradient of the row losses with respect to the logits."""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.rows import (
    DENSE,
    EXPECTATION,
    MAXIMUM,
    SAVED_TEACHER_MAXIMUM,
    SAVED_TEACHER_TOTAL,
    TOP_K,
    TOTAL,
    TOTAL_1,
    first_id_at,
    id_at,
    to_fp32,
)
from sad_kernels._triton.tile import (
    FORWARD_KL,
    REVERSE_KL,
    SKEW_FORWARD_KL,
    divergence_terms,
    exponentials,
    load_logits,
    load_target,
    mixture_parts,
    mixture_terms,
)


@triton.jit
def gradient_tile(
    s, slope, t, start, columns, label,
    m, d, m_t, d_t, log_d, log_d_t, expectation, outside,
    q_1_factor, smooth_share, label_share, kd,
    ids, inside, K, id, next_id,
    inv_T, beta,
    BLOCK: tl.constexpr,
    T_CASE: tl.constexpr,
    HAS_CE: tl.constexpr,
    TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The gradient by the logits before their softcap, all in fp32: the store is the only rounding.

    It grows with the upstream gradient, of which a factor of the logits is a part.
    """
    g = tl.zeros([BLOCK], tl.float32)
    if TEACHER == TOP_K:
        g = tl.exp2((s - m_t) * inv_T) * outside
        while next_id < start + BLOCK:
            g = tl.where(columns == next_id, kd * tl.load(inside + id), g)
            id += 1
            next_id = id_at(ids, K, id)
    x = s - m
    exp_T, exp_1 = exponentials(x, inv_T, T_CASE)
    if TEACHER == DENSE:
        if DIVERGENCE == FORWARD_KL:
            g = exp_T * (kd / d) - tl.exp2((t - m_t) * inv_T) * (kd / d_t)
        else:
            log_q = x * inv_T - log_d
            log_p = (t - m_t) * inv_T - log_d_t
            if DIVERGENCE == REVERSE_KL:
                q = tl.exp2(log_q)
                _, h = divergence_terms(log_q, log_p, beta, DIVERGENCE)
            else:
                q, u, v = mixture_parts(
                    log_q, log_p, beta, DIVERGENCE, DIVERGENCE != SKEW_FORWARD_KL
                )
                _, h = mixture_terms(u, v, beta, DIVERGENCE)
            g = (h - q * expectation) * kd
    if HAS_CE:
        g += exp_1 * q_1_factor - smooth_share
        if (label >= start) & (label < start + BLOCK):
            g = tl.where(columns == label, g - label_share, g)
    if HAS_CAP:
        g *= slope
    return g, id, next_id


@triton.jit
def gradient_kernel(
    s_ptr, s_stride, s_bias, s_scale, s_cap,
    t_ptr, t_stride, t_bias, t_scale, t_cap, t_share,
    ids_ptr, inside_ptr, outside_ptr, K,
    labels_ptr, ignore_index,
    saved_ptr, upstream_ptr, upstream_stride,
    g_ptr, g_stride, N, V, width,
    inv_T, temperature, beta, smoothing, ce_weight, kd_weight, z_loss, kd_scale,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    T_CASE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_CE: tl.constexpr,
    TEACHER: tl.constexpr,  # NO_TEACHER also where its weight is 0
    DIVERGENCE: tl.constexpr,
    S_BIAS: tl.constexpr, S_SCALE: tl.constexpr, S_CAP: tl.constexpr,
    T_BIAS: tl.constexpr, T_SCALE: tl.constexpr, T_CAP: tl.constexpr, T_MIXED: tl.constexpr,
):  # fmt: skip
    """One row over one segment of ``width``: the gradient up to V, zeros from there on."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SEGMENT
    last = tl.minimum(first + SEGMENT, width)
    g_row = g_ptr + row * g_stride
    label = tl.full((), -1, tl.int64)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if label == ignore_index:
            for start in range(first, last, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                nothing = tl.zeros([BLOCK], g_ptr.dtype.element_ty)
                tl.store(g_row + columns, nothing, mask=columns < last)
            return

    inv_T, beta = to_fp32(inv_T), to_fp32(beta)
    s_scale, s_cap = to_fp32(s_scale), to_fp32(s_cap)
    t_scale, t_cap, t_share = to_fp32(t_scale), to_fp32(t_cap), to_fp32(t_share)
    s_row = s_ptr + row * s_stride
    t_row = s_row
    saved = saved_ptr + row
    m = tl.load(saved + MAXIMUM * N)
    d = tl.load(saved + TOTAL * N)
    upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
    if HAS_LABELS:
        upstream = tl.where((label >= 0) & (label < V), upstream, float("nan"))
    kd = upstream * to_fp32(kd_weight) * to_fp32(kd_scale) / to_fp32(temperature)
    zero = tl.full((), 0, tl.float32)
    m_t, d_t, expectation, outside = zero, zero, zero, zero
    log_d, log_d_t = zero, zero
    ids, inside = ids_ptr, inside_ptr
    id, next_id = 0, 0
    if TEACHER == DENSE:
        t_row = t_ptr + row * t_stride
        m_t = tl.load(saved + SAVED_TEACHER_MAXIMUM * N)
        d_t = tl.load(saved + SAVED_TEACHER_TOTAL * N)
        log_d, log_d_t = tl.log2(d), tl.log2(d_t)
        expectation = tl.load(saved + EXPECTATION * N)
    if TEACHER == TOP_K:
        ids, inside = ids_ptr + row * K, inside_ptr + row * K
        id = first_id_at(ids, K, first)
        next_id = id_at(ids, K, id)
        m_t = tl.load(saved + SAVED_TEACHER_MAXIMUM * N)
        outside = kd * tl.load(outside_ptr + row)
    q_1_factor, smooth_share, label_share = zero, zero, zero
    if HAS_CE:
        d_1 = tl.load(saved + TOTAL_1 * N)
        ce_weight, smoothing = to_fp32(ce_weight), to_fp32(smoothing)
        lse = m + tl.log(d_1)
        q_1_factor = upstream * (ce_weight + 2 * to_fp32(z_loss) * lse) / d_1
        smooth_share = upstream * ce_weight * smoothing / V
        label_share = upstream * ce_weight * (1 - smoothing)

    stop = tl.minimum(last, V)
    whole = first + tl.maximum(stop - first, 0) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s, slope = load_logits(
            s_row, columns, V, s_bias, s_scale, s_cap, False, S_BIAS, S_SCALE, S_CAP
        )
        t = s
        if TEACHER == DENSE:
            t = load_target(
                s, t_row, columns, V, t_bias, t_scale, t_cap, t_share,
                False, T_BIAS, T_SCALE, T_CAP, T_MIXED,
            )  # fmt: skip
        g, id, next_id = gradient_tile(
            s, slope, t, start, columns, label,
            m, d, m_t, d_t, log_d, log_d_t, expectation, outside,
            q_1_factor, smooth_share, label_share, kd, ids, inside, K, id, next_id,
            inv_T, beta,
            BLOCK, T_CASE, HAS_CE, TEACHER, DIVERGENCE, S_CAP,
        )  # fmt: skip
        tl.store(g_row + columns, g.to(g_ptr.dtype.element_ty))
    for start in range(whole, last, BLOCK):  # what is left up to V, then the padding
        columns = start + tl.arange(0, BLOCK)
        g = tl.zeros([BLOCK], tl.float32)
        if start < V:
            s, slope = load_logits(
                s_row, columns, V, s_bias, s_scale, s_cap, True, S_BIAS, S_SCALE, S_CAP
            )
            t = s
            if TEACHER == DENSE:
                t = load_target(
                    s, t_row, columns, V, t_bias, t_scale, t_cap, t_share,
                    True, T_BIAS, T_SCALE, T_CAP, T_MIXED,
                )  # fmt: skip
            g, id, next_id = gradient_tile(
                s, slope, t, start, columns, label,
                m, d, m_t, d_t, log_d, log_d_t, expectation, outside,
                q_1_factor, smooth_share, label_share, kd, ids, inside, K, id, next_id,
                inv_T, beta,
                BLOCK, T_CASE, HAS_CE, TEACHER, DIVERGENCE, S_CAP,
            )  # fmt: skip
            g = tl.where(columns < V, g, 0.0)
        tl.store(g_row + columns, g.to(g_ptr.dtype.element_ty), mask=columns < last)
