"""Kernel ``merge``: the segments of each row put together, and the row's losses.

A program holds a few whole rows: there are a dozen numbers per segment and, beside a top-k teacher,
K logits per row to read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.rows import (
    BEST,
    COUNT,
    CROSS,
    CROSS_REVERSE,
    DENSE,
    DIFFERENCE,
    EXPECTATION,
    MASS,
    MAXIMUM,
    NO_TEACHER,
    PLAIN,
    RATIO,
    REFERENCE,
    SAVED_TEACHER_MAXIMUM,
    SAVED_TEACHER_TOTAL,
    SHARD_COUNT,
    TEACHER_AT_BEST,
    TEACHER_BEST,
    TEACHER_MAXIMUM,
    TEACHER_TOTAL,
    TOP_K,
    TOP_SIGN,
    TOTAL,
    TOTAL_1,
    TOTALS,
    WEIGHTED,
    RowSums,
    rescale_cross,
    rescale_difference,
)
from sad_kernels._triton.tile import (
    FORWARD_KL,
    JEFFREYS,
    LN_2,
    LOWEST,
    REVERSE_KL,
    TVD,
    LogitsRow,
    bounded_ratio,
    exponentials,
    log2_1p,
    mixture_row,
    mixture_value,
    probability_difference,
    require_mixture,
    sign,
    teacher_side,
    to_fp32,
    to_logits,
    totals_ratio,
    value_weights,
)
from sad_kernels._triton.top_k import add_top_k


@triton.jit
def merge_segments(
    partials_ptr, rows, counts, num_segments, segment_length, N, V, inv_T,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,  # S is a sum of classes with shares of their own
    SHARDS: tl.constexpr,  # the segments are shards of the vocabulary
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Add up the segments of ``rows`` in their order; of rows that do not count, none."""
    zero = tl.zeros([ROWS], tl.float32)
    m, m_t = zero + LOWEST, zero + LOWEST
    d, d_1, S, count, E, A, C, B, d_t = zero, zero, zero, zero, zero, zero, zero, zero, zero
    best, best_t, t_at_best = zero, zero, zero
    step = tl.full((), num_segments, tl.int64) * N  # from one kind of partial sum to the next
    at = partials_ptr + rows
    for segment in range(num_segments):
        # The segment's maximum, and by how much either side moves to the larger of the two.
        m_b = tl.load(at + MAXIMUM * step, mask=counts, other=LOWEST)
        d_b = tl.load(at + TOTAL * step, mask=counts, other=0.0)
        m_new = tl.maximum(m, m_b)
        move, move_b = m - m_new, m_b - m_new
        decay_T, decay_1 = exponentials(move, inv_T, FLAGS.T_CASE)
        decay_T_b, decay_1_b = exponentials(move_b, inv_T, FLAGS.T_CASE)
        if FLAGS.COMPUTE_METRICS:
            best_b = tl.load(at + BEST * step, mask=counts, other=0.0)
            best = tl.where(m_b > m, best_b, best)
        if FLAGS.TWO_PASSES:
            t_at_best_b = tl.load(at + TEACHER_AT_BEST * step, mask=counts, other=0.0)
            t_at_best = tl.where(m_b > m, t_at_best_b, t_at_best)

        if FLAGS.TEACHER == DENSE:
            m_t_b = tl.load(at + TEACHER_MAXIMUM * step, mask=counts, other=LOWEST)
            d_t_b = tl.load(at + TEACHER_TOTAL * step, mask=counts, other=0.0)
            m_t_new = tl.maximum(m_t, m_t_b)
            move_t, move_t_b = m_t - m_t_new, m_t_b - m_t_new
            decay_T_t, decay_T_t_b = tl.exp2(move_t * inv_T), tl.exp2(move_t_b * inv_T)
            if FLAGS.COMPUTE_METRICS:
                best_t_b = tl.load(at + TEACHER_BEST * step, mask=counts, other=0.0)
                best_t = tl.where(m_t_b > m_t, best_t_b, best_t)
            if FLAGS.DIVERGENCE == FORWARD_KL:
                A_b = tl.load(at + CROSS * step, mask=counts, other=0.0)
                A = rescale_cross(d_t, A, move_t, move, inv_T)
                A += rescale_cross(d_t_b, A_b, move_t_b, move_b, inv_T)
            elif FLAGS.DIVERGENCE == REVERSE_KL:
                A_b = tl.load(at + CROSS * step, mask=counts, other=0.0)
                A = rescale_cross(d, A, move, move_t, inv_T)
                A += rescale_cross(d_b, A_b, move_b, move_t_b, inv_T)
            elif FLAGS.DIVERGENCE == JEFFREYS:
                A_b = tl.load(at + CROSS * step, mask=counts, other=0.0)
                A = rescale_cross(d_t, A, move_t, move, inv_T)
                A += rescale_cross(d_t_b, A_b, move_t_b, move_b, inv_T)
                C_b = tl.load(at + CROSS_REVERSE * step, mask=counts, other=0.0)
                C = rescale_cross(d, C, move, move_t, inv_T)
                C += rescale_cross(d_b, C_b, move_b, move_t_b, inv_T)
            elif FLAGS.DIVERGENCE != TVD:
                require_mixture(FLAGS.DIVERGENCE)  # its sums come from ``mixture``
            if not FLAGS.TWO_PASSES or FLAGS.DIVERGENCE == TVD:
                B_b = tl.load(at + DIFFERENCE * step, mask=counts, other=0.0)
                B = rescale_difference(d_t, B, decay_T_t, decay_T)
                B += rescale_difference(d_t_b, B_b, decay_T_t_b, decay_T_b)
            d_t = d_t * decay_T_t + d_t_b * decay_T_t_b
            m_t = m_t_new

        if FLAGS.COMPUTE_CE:
            d_1_b = tl.load(at + TOTAL_1 * step, mask=counts, other=0.0)
            if FLAGS.SMOOTH:
                S_b = tl.load(at + PLAIN * step, mask=counts, other=0.0)
                count_b = zero + tl.minimum(segment_length, V - segment * segment_length)
                if SHARDS:
                    count_b = tl.load(at + SHARD_COUNT * step, mask=counts, other=0.0)
                elif FLAGS.TEACHER == TOP_K or SHARES:
                    count_b = tl.load(at + COUNT * step, mask=counts, other=0.0)
                S = (S + count * move) + (S_b + count_b * move_b)
                count += count_b
            if FLAGS.COMPUTE_METRICS:
                E_b = tl.load(at + WEIGHTED * step, mask=counts, other=0.0)
                E = (E + d_1 * move) * decay_1 + (E_b + d_1_b * move_b) * decay_1_b
            d_1 = d_1 * decay_1 + d_1_b * decay_1_b
        d = d * decay_T + d_b * decay_T_b
        m = m_new
        at += N
    return RowSums(m, m_t, d, d_1, S, count, E, A, C, B, d_t, best, best_t, t_at_best)


@triton.jit
def mixture_reference(sums, t_share, inv_T, beta, DIVERGENCE: tl.constexpr):
    """The teacher's logit that a dense mixture's ratios count from, and ``r0``, the ratio there.

    The logit at the student's argmax; where ``r0`` is out of bounds, what it would be at a bound.
    """
    t = sums.t_at_best
    y, _ = teacher_side(tl.zeros_like(t), sums.m, t, t_share, sums.m, sums.m_t)
    ratio = tl.exp2(y * inv_T) * (sums.d / sums.d_t)
    bounded = bounded_ratio(ratio, beta, DIVERGENCE)
    bound = sums.m_t + tl.log2(bounded * (sums.d_t / sums.d)) / inv_T
    if t_share is not None:
        share = to_fp32(t_share)
        bound = (bound - (1 - share) * sums.m) / share
    return tl.where(ratio == bounded, t, bound), bounded


@triton.jit
def dense_divergence(
    sums, rows, counts, mixture_ptr, num_segments, N, t_share, inv_T, temperature, beta,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """The divergence from a dense teacher, and what its gradient needs as EXPECTATION."""
    if DIVERGENCE == FORWARD_KL:
        kd = sums.A / (temperature * sums.d_t) - log_totals_ratio(sums)
        expectation = sums.B / sums.d_t
    elif DIVERGENCE == REVERSE_KL:
        expectation = sums.A / sums.d
        kd = expectation / temperature + log_totals_ratio(sums)
    elif DIVERGENCE == JEFFREYS:
        expectation = sums.C / sums.d
        forward = sums.A / (temperature * sums.d_t) - log_totals_ratio(sums)
        kd = beta * forward + (1 - beta) * (expectation / temperature + log_totals_ratio(sums))
    elif DIVERGENCE == TVD:
        total, expectation = second_sums(sums, rows, counts, mixture_ptr, num_segments, N)
        kd = 0.5 * total / sums.d
    else:
        require_mixture(DIVERGENCE)
        weighted, expectation = second_sums(sums, rows, counts, mixture_ptr, num_segments, N)
        _, ratio = mixture_reference(sums, t_share, inv_T, beta, DIVERGENCE)
        row = mixture_row(ratio, beta, DIVERGENCE, True)
        weighted /= value_weights(sums.d_t, sums.d, row, DIVERGENCE)
        kd = mixture_value(weighted, expectation, row, beta, DIVERGENCE)
    return kd, expectation


@triton.jit
def top_sign(sums, t_share, inv_T):
    """The sign of ``q - p`` at the student's argmax, which TVD's slopes count from."""
    near, rest = totals_ratio(sums.B / sums.d_t, sums.d, sums.d_t)
    x = tl.zeros_like(sums.m)
    y, apart = teacher_side(x, sums.m, sums.t_at_best, t_share, sums.m, sums.m_t)
    exp_T, exp_T_t = x + 1, tl.exp2(y * inv_T)
    return sign(probability_difference(exp_T, exp_T_t, apart, near, rest, t_share, inv_T))


@triton.jit
def second_sums(sums, rows, counts, mixture_ptr, num_segments, N):
    """What ``mixture`` has summed up of the rows, the second of it over the student's total."""
    first, second = tl.zeros_like(sums.d), tl.zeros_like(sums.d)
    step = tl.full((), num_segments, tl.int64) * N
    at = mixture_ptr + rows
    for _ in range(num_segments):
        first += tl.load(at, mask=counts, other=0.0)
        second += tl.load(at + step, mask=counts, other=0.0)
        at += N
    return first, second / sums.d + 0 * tl.log(sums.d / sums.d_t)  # NaN of either side


@triton.jit
def log_totals_ratio(sums):
    """``log(d_t/d)``, from their difference where they are near."""
    near = LN_2 * log2_1p(sums.B / sums.d)
    return tl.where(tl.abs(sums.B) < 0.5 * sums.d, near, tl.log(sums.d_t / sums.d))


@triton.jit
def merge_kernel(
    partials_ptr,  # [PARTIALS, segments, N] fp32, of ``statistics``
    mixture_ptr,  # [2, segments, N] fp32, of ``mixture``, read if FINAL
    picked_ptr,  # None, or [1 + K, N] fp32: the segments are shards; logits of label and ids
    num_segments, segment_length, N, V,
    s_ptr, s_stride, s_bias, s_scale, s_softcap,  # [N, >= V]; what follows as in LogitsRow
    t_share,  # None, or a DENSE teacher's share of the target
    ids_ptr,  # [N, K] int32 of a TOP_K teacher, ascending in each row
    log_p_ptr,  # [N, K] fp32
    log_rest_ptr,  # [N] fp32: log-probability of everything else
    top_id_ptr,  # [N] int64: the likeliest id
    K,
    labels_ptr,  # None, or [N]
    ignore_index,
    other_rows_ptr, wanted,  # None, or [N]: only rows with the wanted number are computed
    token_weights_ptr,  # None, or [N] fp32: of CE and z-loss
    kd_weights_ptr,  # None, or [N] fp32: of the divergence; rows of weight 0 are not compared
    soft_ptr,  # None, or what has been summed up are shares of the classes
    class_weight_ptr,  # None, or [V]
    loss_ptr,  # [N] fp32, written, as all that follow
    parts_ptr,  # [PARTS, N]
    saved_ptr,  # [SAVED, N]
    inside_ptr,  # [N, K] of a TOP_K teacher
    outside_ptr,  # [N] of a TOP_K teacher
    inv_T, temperature, beta, smoothing, ce_weight, kd_weight, z_loss, kd_scale,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a power of 2 from K on
    FINAL: tl.constexpr,  # not FINAL: only what ``mixture`` has to know, which fills mixture_ptr
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Segments to rows: their losses, and what the gradient needs of them."""
    # Which rows count: those of a label other than the ignored one. A label outside [0, V) counts,
    # and poisons its row.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < N
    if other_rows_ptr is not None:
        exists = exists & (tl.load(other_rows_ptr + rows, mask=exists, other=0) == wanted)
    counts = exists
    in_range = exists
    label = rows
    if labels_ptr is not None:
        label = tl.load(labels_ptr + rows, mask=counts, other=0)
        counts = counts & (label != ignore_index)
        in_range = (label >= 0) & (label < V)
    compared = counts  # with the teacher
    if kd_weights_ptr is not None:
        on_kd = tl.load(kd_weights_ptr + rows, mask=counts, other=0.0)
        compared = counts & (on_kd != 0)
    inv_T, temperature, beta = to_fp32(inv_T), to_fp32(temperature), to_fp32(beta)
    zero = tl.zeros([ROWS], tl.float32)

    SOFT: tl.constexpr = soft_ptr is not None
    WEIGHTED_CLASSES: tl.constexpr = class_weight_ptr is not None
    SHARDS: tl.constexpr = picked_ptr is not None
    sums = merge_segments(
        partials_ptr, rows, counts, num_segments, segment_length, N, V, inv_T,
        ROWS, SOFT or WEIGHTED_CLASSES, SHARDS, FLAGS,
    )  # fmt: skip
    saved = saved_ptr + rows
    kd = zero
    if FLAGS.TEACHER == TOP_K:
        student = LogitsRow(s_ptr + rows[:, None] * s_stride, s_bias, s_scale, s_softcap, None)
        sums, kd = add_top_k(
            sums, rows, compared, student, picked_ptr, N,
            ids_ptr, log_p_ptr, log_rest_ptr, inside_ptr, outside_ptr, K, V, inv_T, beta,
            BLOCK_K, FLAGS,
        )  # fmt: skip

    # What ``mixture`` and ``gradient`` need of each row.
    if FLAGS.TEACHER != NO_TEACHER:
        tl.store(saved + SAVED_TEACHER_MAXIMUM * N, sums.m_t, mask=counts)
        tl.store(saved + SAVED_TEACHER_TOTAL * N, sums.d_t, mask=counts)
    if FLAGS.TWO_PASSES and FLAGS.DIVERGENCE != TVD:
        reference, ratio = mixture_reference(sums, t_share, inv_T, beta, FLAGS.DIVERGENCE)
        tl.store(saved + REFERENCE * N, reference, mask=counts)
        tl.store(saved + RATIO * N, ratio, mask=counts)
    if FLAGS.TEACHER == DENSE and (FLAGS.DIVERGENCE == JEFFREYS or FLAGS.DIVERGENCE == TVD):
        tl.store(saved + TOTALS * N, sums.B / sums.d_t, mask=counts)
    if FLAGS.TWO_PASSES and FLAGS.DIVERGENCE == TVD:
        tl.store(saved + TOP_SIGN * N, top_sign(sums, t_share, inv_T), mask=counts)
    tl.store(saved + MAXIMUM * N, sums.m, mask=counts)
    tl.store(saved + TOTAL * N, sums.d, mask=counts)
    if FLAGS.COMPUTE_CE:
        tl.store(saved + TOTAL_1 * N, sums.d_1, mask=counts)

    if FINAL:
        if FLAGS.TEACHER == DENSE:
            kd, expectation = dense_divergence(
                sums, rows, compared, mixture_ptr, num_segments, N, t_share, inv_T, temperature,
                beta, FLAGS.DIVERGENCE,
            )  # fmt: skip
            tl.store(saved + EXPECTATION * N, expectation, mask=counts)

        poison = tl.where(in_range, zero, float("nan"))
        # A divergence in (-1e-5, 0) is a rounded zero; lower ones stay visible.
        kd = tl.where((kd < 0) & (kd > -1e-5), 0.0, kd) * to_fp32(kd_scale) + poison
        if kd_weights_ptr is not None:
            kd = tl.where(compared, on_kd * kd, 0.0)
        kd_weight = to_fp32(kd_weight)
        loss = poison
        if FLAGS.TEACHER != NO_TEACHER:
            loss += tl.where(kd_weight > 0, kd_weight * kd, 0.0)  # weight 0 adds 0, even of inf

        # CE and z-loss: the label's logit is read here, one number per row, unless it was picked.
        ce, square, correct, agree, entropy, lse = zero, zero, zero, zero, zero, zero
        if FLAGS.COMPUTE_CE:
            log_1 = tl.log(sums.d_1)
            if SOFT:
                ce = sums.count * log_1 - sums.S
                tl.store(saved + MASS * N, sums.count, mask=counts)
            elif labels_ptr is not None:
                at = tl.where(in_range, label, 0)
                student = LogitsRow(s_ptr + rows * s_stride, s_bias, s_scale, s_softcap, None)
                if picked_ptr is None:
                    z = tl.load(student.ptr + at, mask=counts, other=0.0).to(tl.float32)
                    z, _ = to_logits(z, at, student, counts, True)
                else:
                    z = tl.load(picked_ptr + rows, mask=counts, other=0.0)
                smoothing = to_fp32(smoothing)
                if WEIGHTED_CLASSES:
                    label_share = (1 - smoothing) * tl.load(class_weight_ptr + at)
                    mass = label_share
                    ce = tl.where(label_share != 0, label_share * (log_1 - (z - sums.m)), 0.0)
                    if FLAGS.SMOOTH:
                        ce += (smoothing / V) * (sums.count * log_1 - sums.S)
                        mass += (smoothing / V) * sums.count
                    tl.store(saved + MASS * N, mass, mask=counts)
                else:
                    ce = log_1 - (1 - smoothing) * (z - sums.m)
                    if FLAGS.SMOOTH:
                        ce = tl.where(smoothing < 1, ce, log_1) - smoothing * (sums.S / V)
                ce += poison
            lse = sums.m + log_1
            square = lse * lse + poison
            if token_weights_ptr is not None:
                on_ce = tl.load(token_weights_ptr + rows, mask=counts, other=0.0)
                ce = tl.where(on_ce != 0, on_ce * ce, 0.0)
                square = tl.where(on_ce != 0, on_ce * square, 0.0)
            ce_weight, z_loss = to_fp32(ce_weight), to_fp32(z_loss)
            loss += tl.where(ce_weight > 0, ce_weight * ce, 0.0)
            loss += tl.where(z_loss > 0, z_loss * square, 0.0)
            if FLAGS.COMPUTE_METRICS:
                entropy = log_1 - sums.E / sums.d_1

        if FLAGS.COMPUTE_METRICS:
            column = sums.best.to(tl.int64)
            if labels_ptr is not None:
                correct = (column == label).to(tl.float32)
            if FLAGS.TEACHER != NO_TEACHER:
                other = sums.best_t.to(tl.int64)
                if FLAGS.TEACHER == TOP_K:
                    other = tl.load(top_id_ptr + rows, mask=compared, other=-1)
                agree = ((column == other) & compared).to(tl.float32)

        # Rows that do not count are 0, never products with 0: they may hold NaN.
        parts = parts_ptr + rows
        tl.store(parts, tl.where(counts, ce, 0.0), mask=exists)
        tl.store(parts + 1 * N, tl.where(counts, kd, 0.0), mask=exists)
        tl.store(parts + 2 * N, tl.where(counts, square, 0.0), mask=exists)
        tl.store(parts + 3 * N, tl.where(counts, correct, 0.0), mask=exists)
        tl.store(parts + 4 * N, tl.where(counts, agree, 0.0), mask=exists)
        tl.store(parts + 5 * N, tl.where(counts, entropy, 0.0), mask=exists)
        tl.store(parts + 6 * N, tl.where(counts, lse, 0.0), mask=exists)
        tl.store(loss_ptr + rows, tl.where(counts, loss, 0.0), mask=exists)
