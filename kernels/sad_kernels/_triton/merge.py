"""Kernel: the segments of a row put together, and its losses."""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.rows import (
    BEST,
    COUNT,
    CROSS,
    DENSE,
    EXPECTATION,
    MAXIMUM,
    NO_TEACHER,
    PLAIN,
    SAVED_TEACHER_MAXIMUM,
    SAVED_TEACHER_TOTAL,
    TEACHER_BEST,
    TEACHER_MAXIMUM,
    TEACHER_TOTAL,
    TOP_K,
    TOTAL,
    TOTAL_1,
    WEIGHTED,
    product,
    rescale_cross,
    to_fp32,
)
from sad_kernels._triton.tile import (
    FORWARD_KL,
    LOG2_E,
    LOWEST,
    REVERSE_KL,
    divergence_terms,
    exponentials,
    finish,
)


@triton.jit
def merge_kernel(
    partials_ptr, mixture_ptr, num_segments, segment_length, N, V,
    s_ptr, s_stride, s_bias, s_scale, s_cap,
    ids_ptr, log_p_ptr, log_rest_ptr, top_id_ptr, K,
    labels_ptr, ignore_index,
    loss_ptr, parts_ptr, saved_ptr, inside_ptr, outside_ptr,
    inv_T, temperature, beta, smoothing, ce_weight, kd_weight, z_loss, kd_scale,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    T_CASE: tl.constexpr,
    FINAL: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    COMPUTE_CE: tl.constexpr,
    SMOOTH: tl.constexpr,
    COMPUTE_METRICS: tl.constexpr,
    TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    S_BIAS: tl.constexpr, S_SCALE: tl.constexpr, S_CAP: tl.constexpr,
):  # fmt: skip
    """Segments to rows. Not FINAL: only what ``terms`` has to know."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counts = rows < N
    in_range = counts
    label = rows
    if HAS_LABELS:
        label = tl.load(labels_ptr + rows, mask=counts, other=0)
        counts = counts & (label != ignore_index)
        in_range = (label >= 0) & (label < V)
    inv_T, temperature, beta = to_fp32(inv_T), to_fp32(temperature), to_fp32(beta)
    zero = tl.zeros([ROWS], tl.float32)
    step = tl.full((), num_segments, tl.int64) * N

    m, m_t = zero + LOWEST, zero + LOWEST
    d, d_1, S, count, E, A, d_t = zero, zero, zero, zero, zero, zero, zero
    best, best_t = zero, zero
    of = partials_ptr + rows
    for segment in range(num_segments):
        m_b = tl.load(of + MAXIMUM * step, mask=counts, other=LOWEST)
        d_b = tl.load(of + TOTAL * step, mask=counts, other=0.0)
        m_new = tl.maximum(m, m_b)
        move, move_b = m - m_new, m_b - m_new
        decay_T, decay_1 = exponentials(move, inv_T, T_CASE)
        decay_T_b, decay_1_b = exponentials(move_b, inv_T, T_CASE)
        if COMPUTE_METRICS:
            best_b = tl.load(of + BEST * step, mask=counts, other=0.0)
            best = tl.where(m_b > m, best_b, best)
        if TEACHER == DENSE:
            m_t_b = tl.load(of + TEACHER_MAXIMUM * step, mask=counts, other=LOWEST)
            d_t_b = tl.load(of + TEACHER_TOTAL * step, mask=counts, other=0.0)
            m_t_new = tl.maximum(m_t, m_t_b)
            move_t, move_t_b = m_t - m_t_new, m_t_b - m_t_new
            if COMPUTE_METRICS:
                best_t_b = tl.load(of + TEACHER_BEST * step, mask=counts, other=0.0)
                best_t = tl.where(m_t_b > m_t, best_t_b, best_t)
            A_b = zero
            if (DIVERGENCE == FORWARD_KL) | (DIVERGENCE == REVERSE_KL):
                A_b = tl.load(of + CROSS * step, mask=counts, other=0.0)
            if DIVERGENCE == FORWARD_KL:
                A = rescale_cross(d_t, A, move_t, move, inv_T)
                A += rescale_cross(d_t_b, A_b, move_t_b, move_b, inv_T)
            if DIVERGENCE == REVERSE_KL:
                A = rescale_cross(d, A, move, move_t, inv_T)
                A += rescale_cross(d_b, A_b, move_b, move_t_b, inv_T)
            d_t = d_t * tl.exp2(move_t * inv_T) + d_t_b * tl.exp2(move_t_b * inv_T)
            m_t = m_t_new
        if COMPUTE_CE:
            d_1_b = tl.load(of + TOTAL_1 * step, mask=counts, other=0.0)
            if SMOOTH:
                S_b = tl.load(of + PLAIN * step, mask=counts, other=0.0)
                here = zero + tl.minimum(segment_length, V - segment * segment_length)
                if TEACHER == TOP_K:
                    here = tl.load(of + COUNT * step, mask=counts, other=0.0)
                S = (S + count * move) + (S_b + here * move_b)
                count += here
            if COMPUTE_METRICS:
                E_b = tl.load(of + WEIGHTED * step, mask=counts, other=0.0)
                E = (E + d_1 * move) * decay_1 + (E_b + d_1_b * move_b) * decay_1_b
            d_1 = d_1 * decay_1 + d_1_b * decay_1_b
        d = d * decay_T + d_b * decay_T_b
        m = m_new
        of += N

    saved = saved_ptr + rows
    kd = zero
    if TEACHER == TOP_K:
        k = tl.arange(0, BLOCK_K)
        at = rows[:, None] * K + k[None, :]
        given = counts[:, None] & (k < K)[None, :]
        ids = tl.load(ids_ptr + at, mask=given, other=0)
        log_p = tl.load(log_p_ptr + at, mask=given, other=float("-inf")) * LOG2_E
        repeated = ids == tl.load(ids_ptr + at - 1, mask=given & (k > 0)[None, :], other=-2)
        present = given & (log_p != float("-inf"))
        foreign = present & ((ids < 0) | (ids >= V) | repeated)
        usable = present & (ids >= 0) & (ids < V)
        z = tl.load(s_ptr + rows[:, None] * s_stride + ids, mask=usable, other=0.0).to(tl.float32)
        z, _ = finish(
            z, ids, s_bias, to_fp32(s_scale), to_fp32(s_cap), usable, True, S_BIAS, S_SCALE, S_CAP
        )
        z = tl.where(usable, z, float("-inf"))
        top_z = tl.max(z, 1)
        if COMPUTE_METRICS:
            # Where an id is above all other columns, ``best`` may be any id, and is not looked at.
            best_id = tl.min(tl.where(z == top_z[:, None], ids, 0x7FFFFFFF), 1).to(tl.float32)
            first_of_both = tl.minimum(best, best_id)
            best = tl.where(top_z > m, best_id, tl.where(top_z == m, first_of_both, best))
        m_t, d_t = m, d  # of the columns without ids; from here on the others are in
        m = tl.maximum(m_t, top_z)
        move = m_t - m
        x = z - m[:, None]
        x_T, below = x * inv_T, move * inv_T
        total = d_t * tl.exp2(below) + tl.sum(tl.exp2(x_T), 1)
        if COMPUTE_CE:
            once = usable & ~repeated
            x = tl.where(once, x, float("-inf"))
            exp_1, decay_1 = tl.exp2(x * LOG2_E), tl.exp2(move * LOG2_E)
            if SMOOTH:
                S += count * move + tl.sum(tl.where(once, x, 0.0), 1)
            if COMPUTE_METRICS:
                E = (E + d_1 * move) * decay_1 + tl.sum(product(exp_1, x), 1)
            d_1 = d_1 * decay_1 + tl.sum(exp_1, 1)
        log_total = tl.log2(total)
        log_q = x_T - log_total[:, None]
        f, h = divergence_terms(log_q, log_p, beta, DIVERGENCE)
        log_rest = tl.load(log_rest_ptr + rows, mask=counts, other=0.0) * LOG2_E
        log_q_rest = below + tl.log2(d_t) - log_total
        f_rest, h_rest = divergence_terms(log_q_rest, log_rest, beta, DIVERGENCE)
        expectation = tl.sum(h, 1) + h_rest
        inside = h - tl.exp2(log_q) * expectation[:, None]
        outside = tl.where(d_t > 0, h_rest / d_t, 0.0) - expectation * tl.exp2(below) / total
        tl.store(inside_ptr + at, inside, mask=given)
        tl.store(outside_ptr + rows, outside, mask=counts)
        given_p = tl.where(present, log_p, 0.0)
        # NaN and inf of a total, and NaN of the teacher, poison the row.
        kd = tl.sum(f, 1) + f_rest + 0 * total + 0 * tl.sum(given_p, 1)
        kd = tl.where(tl.max(foreign.to(tl.int32), 1) > 0, float("nan"), kd)
    if TEACHER != NO_TEACHER:
        tl.store(saved + SAVED_TEACHER_MAXIMUM * N, m_t, mask=counts)
        tl.store(saved + SAVED_TEACHER_TOTAL * N, d_t, mask=counts)
    tl.store(saved + MAXIMUM * N, m, mask=counts)
    tl.store(saved + TOTAL * N, d, mask=counts)
    if COMPUTE_CE:
        tl.store(saved + TOTAL_1 * N, d_1, mask=counts)

    if FINAL:
        if TEACHER == DENSE:
            if DIVERGENCE == FORWARD_KL:
                kd = A / (temperature * d_t) + tl.log(d / d_t)
                expectation = zero - 1
            elif DIVERGENCE == REVERSE_KL:
                kd = A / (temperature * d) + tl.log(d_t / d)
                expectation = kd
            else:
                kd = 0 * tl.log(d / d_t)  # NaN of either side
                expectation = zero
            if HAS_MIXTURE:
                of = mixture_ptr + rows
                for _ in range(num_segments):
                    kd += tl.load(of, mask=counts, other=0.0)
                    expectation += tl.load(of + step, mask=counts, other=0.0)
                    of += N
            tl.store(saved + EXPECTATION * N, expectation, mask=counts)

        exists = rows < N
        poison = tl.where(in_range, zero, float("nan"))
        # A divergence in (-1e-5, 0) is a rounded zero; lower ones stay visible.
        kd = tl.where((kd < 0) & (kd > -1e-5), 0.0, kd) * to_fp32(kd_scale) + poison
        kd_weight = to_fp32(kd_weight)
        loss = poison
        if TEACHER != NO_TEACHER:
            loss += tl.where(kd_weight > 0, kd_weight * kd, 0.0)  # weight 0 adds 0, even of inf
        ce, square, correct, agree, entropy = zero, zero, zero, zero, zero
        if COMPUTE_CE:
            at = tl.where(in_range, label, 0)
            z = tl.load(s_ptr + rows * s_stride + at, mask=counts, other=0.0).to(tl.float32)
            scale, cap = to_fp32(s_scale), to_fp32(s_cap)
            z, _ = finish(z, at, s_bias, scale, cap, counts, True, S_BIAS, S_SCALE, S_CAP)
            log_1 = tl.log(d_1)
            smoothing = to_fp32(smoothing)
            ce = log_1 - (1 - smoothing) * (z - m) + poison
            if SMOOTH:
                ce -= smoothing * (S / V)
            lse = m + log_1
            square = lse * lse + poison
            ce_weight, z_loss = to_fp32(ce_weight), to_fp32(z_loss)
            loss += tl.where(ce_weight > 0, ce_weight * ce, 0.0)
            loss += tl.where(z_loss > 0, z_loss * square, 0.0)
            if COMPUTE_METRICS:
                entropy = log_1 - E / d_1
        if COMPUTE_METRICS:
            column = best.to(tl.int64)
            if HAS_LABELS:
                correct = (column == label).to(tl.float32)
            if TEACHER != NO_TEACHER:
                other = best_t.to(tl.int64)
                if TEACHER == TOP_K:
                    other = tl.load(top_id_ptr + rows, mask=counts, other=-1)
                agree = (column == other).to(tl.float32)
        parts = parts_ptr + rows
        tl.store(parts, tl.where(counts, ce, 0.0), mask=exists)
        tl.store(parts + 1 * N, tl.where(counts, kd, 0.0), mask=exists)
        tl.store(parts + 2 * N, tl.where(counts, square, 0.0), mask=exists)
        tl.store(parts + 3 * N, tl.where(counts, correct, 0.0), mask=exists)
        tl.store(parts + 4 * N, tl.where(counts, agree, 0.0), mask=exists)
        tl.store(parts + 5 * N, tl.where(counts, entropy, 0.0), mask=exists)
        tl.store(loss_ptr + rows, tl.where(counts, loss, 0.0), mask=exists)
