"""Kernel ``mixture``: JSD and the skews, which compare with a mixture of both sides, and TVD.

They need both normalisers first, so the logits are read a second time in forward.

With the ratio ``r = p/q`` they are ``D = sum q F(r)``, and the gradient by a logit is
``q (phi - sum q phi) / T``, ``phi = F - r F'``, of which a constant drops out. Near agreement, and
in a row where one token has nearly all probability, phi is nearly the same number everywhere, so
that little would be left of differences of rounded ones. Here it counts from phi at the student's
most likely token: ratios are ``r0 e^g``, with ``r0`` the ratio there and ``g`` the gap between the
two sides' logits, each relative to its logit of that token, and phi is made of ``g`` without the
constant (``mixture_terms``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.rows import (
    MAXIMUM,
    RATIO,
    REFERENCE,
    SAVED_TEACHER_MAXIMUM,
    SAVED_TEACHER_TOTAL,
    TOP_SIGN,
    TOTAL,
    TOTALS,
    lane_sum,
    to_lanes,
)
from sad_kernels._triton.tile import (
    TVD,
    LogitsRow,
    load_logits,
    mixture_gap,
    mixture_row,
    mixture_terms,
    probability_difference,
    sign,
    teacher_side,
    to_fp32,
    totals_ratio,
    value_weights,
)


@triton.jit
def mixture_sums(
    student, teacher, t_share, columns, V, m, m_t, reference, mixture, inv_T, beta,
    MASKED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """What ``mixture_value`` needs, times d or d_t, summed up by lane over a tile.

    Of TVD ``d |q - p|``, and d q times the sign of q - p less that of the student's argmax, which
    is ``reference`` then; ``mixture`` is the ``totals_ratio``.
    """
    s, _ = load_logits(student, columns, V, MASKED)
    t, _ = load_logits(teacher, columns, V, MASKED)
    x = s - m
    y, apart = teacher_side(x, s, t, t_share, m, m_t)
    exp_T, exp_T_t = tl.exp2(x * inv_T), tl.exp2(y * inv_T)
    if DIVERGENCE == TVD:
        near, rest = mixture[0], mixture[1]
        difference = probability_difference(exp_T, exp_T_t, apart, near, rest, t_share, inv_T)
        first, second = tl.abs(difference), exp_T * (sign(difference) - reference)
    else:
        gap = mixture_gap(x, t, reference, t_share, inv_T)
        phi, term = mixture_terms(gap, mixture, beta, DIVERGENCE, True)
        weights = value_weights(exp_T_t, exp_T, mixture, DIVERGENCE)
        first, second = weights * term, exp_T * phi
    return lane_sum(to_lanes(first, LANES, VECTOR)), lane_sum(to_lanes(second, LANES, VECTOR))


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
    mixture_ptr,  # [2, segments, N] fp32, written: the two sums of a value
    N, V, inv_T, beta,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """The sums of a mixture's divergence, see ``mixture_value``, over one segment."""
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
    if DIVERGENCE == TVD:
        reference = tl.load(saved + TOP_SIGN * N)
        d, d_t = tl.load(saved + TOTAL * N), tl.load(saved + SAVED_TEACHER_TOTAL * N)
        mixture = totals_ratio(tl.load(saved + TOTALS * N), d, d_t)
    else:
        reference = tl.load(saved + REFERENCE * N)
        mixture = mixture_row(tl.load(saved + RATIO * N), beta, DIVERGENCE, True)

    weighted = tl.zeros([LANES], tl.float32)
    q_sum = tl.zeros([LANES], tl.float32)
    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, V)
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tile_weighted, tile_q = mixture_sums(
            student, teacher, t_share, columns, V, m, m_t, reference, mixture,
            inv_T, beta, False, LANES, VECTOR, DIVERGENCE,
        )  # fmt: skip
        weighted += tile_weighted
        q_sum += tile_q
    if whole < last:  # the last tile, which V cuts
        columns = whole + tl.arange(0, BLOCK)
        tile_weighted, tile_q = mixture_sums(
            student, teacher, t_share, columns, V, m, m_t, reference, mixture,
            inv_T, beta, True, LANES, VECTOR, DIVERGENCE,
        )  # fmt: skip
        weighted += tile_weighted
        q_sum += tile_q
    out = mixture_ptr + segment.to(tl.int64) * N + row
    tl.store(out, tl.sum(weighted, 0))
    tl.store(out + tl.num_programs(1).to(tl.int64) * N, tl.sum(q_sum, 0))
