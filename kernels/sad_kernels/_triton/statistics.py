"""Kernel: partial sums of each row over each segment of the vocabulary."""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.rows import (
    BEST,
    COUNT,
    CROSS,
    DENSE,
    MASKED_LOGIT,
    MAXIMUM,
    PLAIN,
    TEACHER_BEST,
    TEACHER_MAXIMUM,
    TEACHER_TOTAL,
    TOP_K,
    TOTAL,
    TOTAL_1,
    WEIGHTED,
    first_id_at,
    id_at,
    lane_max,
    lane_sum,
    over_lanes,
    product,
    rescale_cross,
    to_fp32,
    to_lanes,
)
from sad_kernels._triton.tile import (
    FORWARD_KL,
    LOWEST,
    REVERSE_KL,
    exponentials,
    load_logits,
    load_target,
)


@triton.jit
def mask_ids(x, start, end, ids, K, at, next_id, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return ``x`` with MASKED_LOGIT in the columns of ids below ``end``, the number of these by
    lane, and the position and value of the next id."""
    columns = start + tl.arange(0, LANES * VECTOR)
    gone = tl.zeros([LANES], tl.float32)
    before = -1
    while next_id < end:
        x = tl.where(columns == next_id, MASKED_LOGIT, x)
        lane = tl.where(next_id == before, -1, (next_id - start) // VECTOR)  # once if repeated
        gone += (tl.arange(0, LANES) == lane).to(tl.float32)
        before = next_id
        at += 1
        next_id = id_at(ids, K, at)
    return x, gone, at, next_id


@triton.jit
def first_argmax(x, start, column, seen, SIZE: tl.constexpr):
    """The first column, exact in fp32, of the largest ``seen``, after the piece at ``start``."""
    top = tl.max(x, 0)
    here = start + tl.min(tl.where(x == top, tl.arange(0, SIZE), SIZE), 0)
    return tl.where(top > seen, here.to(tl.float32), column), tl.maximum(seen, top)


@triton.jit
def add_columns(
    s_row, s_bias, s_scale, s_cap,
    t_row, t_bias, t_scale, t_cap, t_share,
    at, first, V,
    ids, K, id, next_id,
    m, d, d_1, S, count, E, best,
    m_t, d_t, best_t, A,
    inv_T,
    SIZE: tl.constexpr,  # a tile or a piece
    MASKED: tl.constexpr,  # some may lie past V
    HAS_IDS: tl.constexpr,  # those of a top-k teacher may be in this piece
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    T_CASE: tl.constexpr,
    COMPUTE_CE: tl.constexpr,
    SMOOTH: tl.constexpr,
    COMPUTE_METRICS: tl.constexpr,
    TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    S_BIAS: tl.constexpr, S_SCALE: tl.constexpr, S_CAP: tl.constexpr,
    T_BIAS: tl.constexpr, T_SCALE: tl.constexpr, T_CAP: tl.constexpr, T_MIXED: tl.constexpr,
):  # fmt: skip
    """What a row has by lane, sums, maxima and where these are, after SIZE more columns at ``at``;
    before it, where the next id is, and which."""
    columns = at + tl.arange(0, SIZE)
    s, _ = load_logits(s_row, columns, V, s_bias, s_scale, s_cap, MASKED, S_BIAS, S_SCALE, S_CAP)
    t = s
    if TEACHER == DENSE:
        t = load_target(
            s, t_row, columns, V, t_bias, t_scale, t_cap, t_share,
            MASKED, T_BIAS, T_SCALE, T_CAP, T_MIXED,
        )  # fmt: skip
    number = tl.full([LANES], SIZE // LANES, tl.float32)
    if MASKED:
        s = tl.where(columns < V, s, MASKED_LOGIT)
        number = lane_sum(to_lanes((columns < V).to(tl.float32), LANES, VECTOR))
    if HAS_IDS:
        end = tl.minimum(at + SIZE, V)  # an id past it is no column that could be missing
        s, gone, id, next_id = mask_ids(s, at, end, ids, K, id, next_id, LANES, VECTOR)
        number -= gone

    s = to_lanes(s, LANES, VECTOR)
    top = lane_max(s)
    m_new = tl.maximum(m, top)
    x = s - over_lanes(m_new)
    if COMPUTE_METRICS:
        best = tl.where(top > m, at - first, best)  # ties stay to the left
    move = m - m_new
    exp_T, exp_1 = exponentials(x, inv_T, T_CASE)
    decay_T, decay_1 = exponentials(move, inv_T, T_CASE)

    if TEACHER == DENSE:
        t = to_lanes(t, LANES, VECTOR)
        top_t = lane_max(t)
        if COMPUTE_METRICS:
            best_t = tl.where(top_t > m_t, at - first, best_t)
        m_t_new = tl.maximum(m_t, top_t)
        move_t = m_t - m_t_new
        y = t - over_lanes(m_t_new)
        exp_T_t = tl.exp2(y * inv_T)
        if DIVERGENCE == FORWARD_KL:
            A = rescale_cross(d_t, A, move_t, move, inv_T) + lane_sum(product(exp_T_t, y - x))
        if DIVERGENCE == REVERSE_KL:
            A = rescale_cross(d, A, move, move_t, inv_T) + lane_sum(product(exp_T, x - y))
        d_t = d_t * tl.exp2(move_t * inv_T) + lane_sum(exp_T_t)
        m_t = m_t_new

    if COMPUTE_CE:
        if SMOOTH:
            present = tl.where(s == MASKED_LOGIT, 0.0, x) if MASKED or HAS_IDS else x
            S += count * move + lane_sum(present)
            count += number
        if COMPUTE_METRICS:
            E = (E + d_1 * move) * decay_1
            E += lane_sum(exp_1 * tl.maximum(x, LOWEST))  # 0 * -inf is 0
        d_1 = d_1 * decay_1 + lane_sum(exp_1)
    d = d * decay_T + lane_sum(exp_T)
    return id, next_id, m_new, d, d_1, S, count, E, best, m_t, d_t, best_t, A


@triton.jit
def first_tile(m, best, top):
    """The tile that holds the maximum ``top`` of all lanes, the first if there are several."""
    none = 0x7FFFFFFF
    found = tl.min(tl.where(m == top, best, none), 0)
    return tl.where(found == none, 0, found)  # NaN is nobody's maximum


@triton.jit
def statistics_kernel(
    s_ptr, s_stride, s_bias, s_scale, s_cap,
    t_ptr, t_stride, t_bias, t_scale, t_cap, t_share,
    ids_ptr, K,
    labels_ptr, ignore_index,
    partials_ptr, N, V, inv_T,
    BLOCK: tl.constexpr,  # a multiple of a piece
    SEGMENT: tl.constexpr,  # a multiple of BLOCK
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    T_CASE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    COMPUTE_CE: tl.constexpr,
    SMOOTH: tl.constexpr,
    COMPUTE_METRICS: tl.constexpr,
    TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    S_BIAS: tl.constexpr, S_SCALE: tl.constexpr, S_CAP: tl.constexpr,
    T_BIAS: tl.constexpr, T_SCALE: tl.constexpr, T_CAP: tl.constexpr, T_MIXED: tl.constexpr,
):  # fmt: skip
    """Partial sums of one row over one segment of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    if HAS_LABELS:
        if tl.load(labels_ptr + row) == ignore_index:
            return
    inv_T = to_fp32(inv_T)
    s_scale, s_cap = to_fp32(s_scale), to_fp32(s_cap)
    t_scale, t_cap, t_share = to_fp32(t_scale), to_fp32(t_cap), to_fp32(t_share)
    s_row = s_ptr + row * s_stride
    t_row = s_row
    if TEACHER == DENSE:
        t_row = t_ptr + row * t_stride
    ids = ids_ptr
    if TEACHER == TOP_K:
        ids = ids_ptr + row * K

    none = tl.zeros([LANES], tl.float32)
    m, m_t = none + LOWEST, none + LOWEST
    d, d_1, S, count, E, A, d_t = none, none, none, none, none, none, none
    best = tl.zeros([LANES], tl.int32)
    best_t = best
    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, V)
    PIECE: tl.constexpr = LANES * VECTOR
    id, next_id = 0, 0
    if TEACHER == TOP_K:
        id = first_id_at(ids, K, first)
        next_id = id_at(ids, K, id)
    STEP: tl.constexpr = PIECE if TEACHER == TOP_K else BLOCK
    whole = first + (last - first) // STEP * STEP
    start = first
    while start < whole:  # once, or beside a top-k teacher once for every piece that has ids
        stop, end = whole, whole
        if TEACHER == TOP_K:
            stop = first + (tl.minimum(next_id, whole) - first) // PIECE * PIECE
            end = tl.minimum(stop + PIECE, whole)
        stop = start + (stop - start) // BLOCK * BLOCK
        for at in range(start, stop, BLOCK):
            id, next_id, m, d, d_1, S, count, E, best, m_t, d_t, best_t, A = add_columns(
                s_row, s_bias, s_scale, s_cap, t_row, t_bias, t_scale, t_cap, t_share,
                at, first, V, ids, K, id, next_id,
                m, d, d_1, S, count, E, best, m_t, d_t, best_t, A, inv_T,
                BLOCK, False, False,
                LANES, VECTOR, T_CASE, COMPUTE_CE, SMOOTH, COMPUTE_METRICS, TEACHER, DIVERGENCE,
                S_BIAS, S_SCALE, S_CAP, T_BIAS, T_SCALE, T_CAP, T_MIXED,
            )  # fmt: skip
        if TEACHER == TOP_K:
            for at in range(stop, end, PIECE):
                id, next_id, m, d, d_1, S, count, E, best, m_t, d_t, best_t, A = add_columns(
                    s_row, s_bias, s_scale, s_cap, t_row, t_bias, t_scale, t_cap, t_share,
                    at, first, V, ids, K, id, next_id,
                    m, d, d_1, S, count, E, best, m_t, d_t, best_t, A, inv_T,
                    PIECE, False, True,
                    LANES, VECTOR, T_CASE, COMPUTE_CE, SMOOTH, COMPUTE_METRICS, TEACHER, DIVERGENCE,
                    S_BIAS, S_SCALE, S_CAP, T_BIAS, T_SCALE, T_CAP, T_MIXED,
                )  # fmt: skip
        start = end
    for at in range(whole, last, PIECE):
        id, next_id, m, d, d_1, S, count, E, best, m_t, d_t, best_t, A = add_columns(
            s_row, s_bias, s_scale, s_cap, t_row, t_bias, t_scale, t_cap, t_share,
            at, first, V, ids, K, id, next_id,
            m, d, d_1, S, count, E, best, m_t, d_t, best_t, A, inv_T,
            PIECE, True, TEACHER == TOP_K,
            LANES, VECTOR, T_CASE, COMPUTE_CE, SMOOTH, COMPUTE_METRICS, TEACHER, DIVERGENCE,
            S_BIAS, S_SCALE, S_CAP, T_BIAS, T_SCALE, T_CAP, T_MIXED,
        )  # fmt: skip

    # Lanes to one, as tiles before.
    top = tl.max(m, 0)
    move = m - top
    decay_T, decay_1 = exponentials(move, inv_T, T_CASE)
    step = tl.num_programs(1).to(tl.int64) * N  # from one kind of partial sum to the next
    out = partials_ptr + segment.to(tl.int64) * N + row
    tl.store(out + MAXIMUM * step, top)
    tl.store(out + TOTAL * step, tl.sum(d * decay_T, 0))
    if COMPUTE_CE:
        tl.store(out + TOTAL_1 * step, tl.sum(d_1 * decay_1, 0))
        if SMOOTH:
            tl.store(out + PLAIN * step, tl.sum(S + count * move, 0))
            if TEACHER == TOP_K:
                tl.store(out + COUNT * step, tl.sum(count, 0))
        if COMPUTE_METRICS:
            tl.store(out + WEIGHTED * step, tl.sum((E + d_1 * move) * decay_1, 0))
    if COMPUTE_METRICS:  # of all columns: where an id is no smaller, merge takes the best id
        start = first + first_tile(m, best, top)
        column, seen = start.to(tl.float32), tl.full((), float("-inf"), tl.float32)
        for at in range(start, tl.minimum(start + BLOCK, last), PIECE):
            columns = at + tl.arange(0, PIECE)
            s, _ = load_logits(
                s_row, columns, last, s_bias, s_scale, s_cap, True, S_BIAS, S_SCALE, S_CAP
            )
            column, seen = first_argmax(s, at, column, seen, PIECE)
        tl.store(out + BEST * step, column)
    if TEACHER == DENSE:
        top_t = tl.max(m_t, 0)
        move_t = m_t - top_t
        tl.store(out + TEACHER_MAXIMUM * step, top_t)
        tl.store(out + TEACHER_TOTAL * step, tl.sum(d_t * tl.exp2(move_t * inv_T), 0))
        if DIVERGENCE == FORWARD_KL:
            tl.store(out + CROSS * step, tl.sum(rescale_cross(d_t, A, move_t, move, inv_T), 0))
        if DIVERGENCE == REVERSE_KL:
            tl.store(out + CROSS * step, tl.sum(rescale_cross(d, A, move, move_t, inv_T), 0))
        if COMPUTE_METRICS:
            start = first + first_tile(m_t, best_t, top_t)
            column, seen = start.to(tl.float32), tl.full((), float("-inf"), tl.float32)
            for at in range(start, tl.minimum(start + BLOCK, last), PIECE):
                columns = at + tl.arange(0, PIECE)
                s = tl.zeros([PIECE], tl.float32)
                if T_MIXED:
                    s, _ = load_logits(
                        s_row, columns, last, s_bias, s_scale, s_cap, True, S_BIAS, S_SCALE, S_CAP
                    )
                t = load_target(
                    s, t_row, columns, last, t_bias, t_scale, t_cap, t_share,
                    True, T_BIAS, T_SCALE, T_CAP, T_MIXED,
                )  # fmt: skip
                column, seen = first_argmax(t, at, column, seen, PIECE)
            tl.store(out + TEACHER_BEST * step, column)
