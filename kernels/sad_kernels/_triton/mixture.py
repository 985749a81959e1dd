"""Kernel: divergences against a mixture of both sides, which need both normalisers first."""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.rows import (
    MAXIMUM,
    SAVED_TEACHER_MAXIMUM,
    SAVED_TEACHER_TOTAL,
    TOTAL,
    lane_sum,
    to_fp32,
    to_lanes,
)
from sad_kernels._triton.tile import (
    load_logits,
    load_target,
    mixture_parts,
    mixture_terms,
)


@triton.jit
def mixture_sums(
    s, t, log_d, log_d_t, m, m_t, inv_T, beta,
    LANES: tl.constexpr, VECTOR: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    log_q = (s - m) * inv_T - log_d
    log_p = (t - m_t) * inv_T - log_d_t
    _, u, v = mixture_parts(log_q, log_p, beta, DIVERGENCE, True)
    return lane_sum(to_lanes(u, LANES, VECTOR)), lane_sum(to_lanes(v, LANES, VECTOR))


@triton.jit
def mixture_kernel(
    s_ptr, s_stride, s_bias, s_scale, s_cap,
    t_ptr, t_stride, t_bias, t_scale, t_cap, t_share,
    labels_ptr, ignore_index,
    saved_ptr, mixture_ptr, N, V, inv_T, beta,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    S_BIAS: tl.constexpr, S_SCALE: tl.constexpr, S_CAP: tl.constexpr,
    T_BIAS: tl.constexpr, T_SCALE: tl.constexpr, T_CAP: tl.constexpr, T_MIXED: tl.constexpr,
):  # fmt: skip
    """Value and expectation of a mixture's divergence over one segment: [2, segments, N]."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    if HAS_LABELS:
        if tl.load(labels_ptr + row) == ignore_index:
            return
    inv_T, beta = to_fp32(inv_T), to_fp32(beta)
    s_scale, s_cap = to_fp32(s_scale), to_fp32(s_cap)
    t_scale, t_cap, t_share = to_fp32(t_scale), to_fp32(t_cap), to_fp32(t_share)
    s_row = s_ptr + row * s_stride
    t_row = t_ptr + row * t_stride
    saved = saved_ptr + row
    m = tl.load(saved + MAXIMUM * N)
    m_t = tl.load(saved + SAVED_TEACHER_MAXIMUM * N)
    log_d = tl.log2(tl.load(saved + TOTAL * N))
    log_d_t = tl.log2(tl.load(saved + SAVED_TEACHER_TOTAL * N))

    u_sum = tl.zeros([LANES], tl.float32)
    v_sum = tl.zeros([LANES], tl.float32)
    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, V)
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s, _ = load_logits(s_row, columns, V, s_bias, s_scale, s_cap, False, S_BIAS, S_SCALE, S_CAP)
        t = load_target(
            s, t_row, columns, V, t_bias, t_scale, t_cap, t_share,
            False, T_BIAS, T_SCALE, T_CAP, T_MIXED,
        )  # fmt: skip
        u, v = mixture_sums(s, t, log_d, log_d_t, m, m_t, inv_T, beta, LANES, VECTOR, DIVERGENCE)
        u_sum += u
        v_sum += v
    if whole < last:
        columns = whole + tl.arange(0, BLOCK)
        s, _ = load_logits(s_row, columns, V, s_bias, s_scale, s_cap, True, S_BIAS, S_SCALE, S_CAP)
        t = load_target(
            s, t_row, columns, V, t_bias, t_scale, t_cap, t_share,
            True, T_BIAS, T_SCALE, T_CAP, T_MIXED,
        )  # fmt: skip
        u, v = mixture_sums(s, t, log_d, log_d_t, m, m_t, inv_T, beta, LANES, VECTOR, DIVERGENCE)
        u_sum += u
        v_sum += v
    out = mixture_ptr + segment.to(tl.int64) * N + row
    value, expectation = mixture_terms(tl.sum(u_sum, 0), tl.sum(v_sum, 0), beta, DIVERGENCE)
    tl.store(out, value)
    tl.store(out + tl.num_programs(1).to(tl.int64) * N, expectation)
