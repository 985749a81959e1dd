"""Kernel ``mixture``: divergences against a mixture of both sides (JSD and the skews).

They need both normalisers first, so the logits are read a second time in forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.rows import (
    MAXIMUM,
    SAVED_TEACHER_MAXIMUM,
    SAVED_TEACHER_TOTAL,
    TOTAL,
    lane_sum,
    to_lanes,
)
from sad_kernels._triton.tile import (
    LogitsRow,
    load_logits,
    load_target,
    mixture_parts,
    mixture_terms,
    to_fp32,
)


@triton.jit
def mixture_sums(
    student, teacher, t_share, columns, V, log_d, log_d_t, m, m_t, inv_T, beta,
    MASKED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """The two summands of ``mixture_parts``, summed up by lane over a tile."""
    s, _ = load_logits(student, columns, V, MASKED)
    t = load_target(s, teacher, t_share, columns, V, MASKED)
    log_q = (s - m) * inv_T - log_d
    log_p = (t - m_t) * inv_T - log_d_t
    _, u, v = mixture_parts(log_q, log_p, beta, DIVERGENCE, True)
    return lane_sum(to_lanes(u, LANES, VECTOR)), lane_sum(to_lanes(v, LANES, VECTOR))


@triton.jit
def mixture_kernel(
    s_ptr, s_stride, s_bias, s_scale, s_softcap,  # [N, >= V]; what follows as in LogitsRow
    t_ptr, t_stride, t_bias, t_scale, t_softcap,  # [N, >= V]
    t_share,  # None, or the teacher's share of the target
    labels_ptr,  # None, or [N]
    ignore_index,
    other_rows_ptr, wanted,  # None, or [N]: only rows with the wanted number are computed
    kd_weights_ptr,  # None, or [N]: rows of weight 0 are not compared
    saved_ptr,  # [SAVED, N] fp32, of ``merge``
    mixture_ptr,  # [2, segments, N] fp32, written: f and h summed up
    N, V, inv_T, beta,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """Value and expectation of a mixture's divergence over one segment: [2, segments, N]."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    if labels_ptr is not None:
        if tl.load(labels_ptr + row) == ignore_index:
            return
    if other_rows_ptr is not None:
        if tl.load(other_rows_ptr + row) != wanted:
            return
    if kd_weights_ptr is not None:
        if tl.load(kd_weights_ptr + row) == 0:
            return
    inv_T, beta = to_fp32(inv_T), to_fp32(beta)
    student = LogitsRow(s_ptr + row * s_stride, s_bias, s_scale, s_softcap, None)
    teacher = LogitsRow(t_ptr + row * t_stride, t_bias, t_scale, t_softcap, None)
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
        u, v = mixture_sums(
            student, teacher, t_share, columns, V, log_d, log_d_t, m, m_t, inv_T, beta,
            False, LANES, VECTOR, DIVERGENCE,
        )  # fmt: skip
        u_sum += u
        v_sum += v
    if whole < last:  # the last tile, which V cuts
        columns = whole + tl.arange(0, BLOCK)
        u, v = mixture_sums(
            student, teacher, t_share, columns, V, log_d, log_d_t, m, m_t, inv_T, beta,
            True, LANES, VECTOR, DIVERGENCE,
        )  # fmt: skip
        u_sum += u
        v_sum += v
    out = mixture_ptr + segment.to(tl.int64) * N + row
    value, expectation = mixture_terms(tl.sum(u_sum, 0), tl.sum(v_sum, 0), beta, DIVERGENCE)
    tl.store(out, value)
    tl.store(out + tl.num_programs(1).to(tl.int64) * N, expectation)
