"""Kernel: partial sums of each row over each segment of the vocabulary."""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.rows import (
    BEST,
    COUNT,
    CROSS,
    DENSE,
    LEFT_OUT,
    MAXIMUM,
    PLAIN,
    TEACHER_BEST,
    TEACHER_MAXIMUM,
    TEACHER_TOTAL,
    TOP_K,
    TOTAL,
    TOTAL_1,
    WEIGHTED,
    carried,
    first_id_at,
    id_at,
    in_lanes,
    lane_max,
    lane_sum,
    over_lanes,
    product,
    to_fp32,
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
def without_ids(x, start, end, ids, K, at, next_id, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A piece ``x``, LEFT_OUT in the columns of ids below ``end``, and how many these are by lane;
    where the next id is, and which."""
    columns = start + tl.arange(0, LANES * VECTOR)
    gone = tl.zeros([LANES], tl.float32)
    before = -1
    while next_id < end:
        x = tl.where(columns == next_id, LEFT_OUT, x)
        lane = tl.where(next_id == before, -1, (next_id - start) // VECTOR)  # once if repeated
        gone += (tl.arange(0, LANES) == lane).to(tl.float32)
        before = next_id
        at += 1
        next_id = id_at(ids, K, at)
    return x, gone, at, next_id


@triton.jit
def first_best(x, start, column, seen, SIZE: tl.constexpr):
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
    heat,
    SIZE: tl.constexpr,  # a tile or a piece
    MASKED: tl.constexpr,  # some may lie past V
    HAS_IDS: tl.constexpr,  # those of a top-k teacher may be in this piece
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    HEAT: tl.constexpr,
    CLASSES: tl.constexpr,
    SMOOTH: tl.constexpr,
    DIAGNOSTICS: tl.constexpr,
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
        s = tl.where(columns < V, s, LEFT_OUT)
        number = lane_sum(in_lanes((columns < V).to(tl.float32), LANES, VECTOR))
    if HAS_IDS:
        end = tl.minimum(at + SIZE, V)  # an id past it is no column that could be missing
        s, gone, id, next_id = without_ids(s, at, end, ids, K, id, next_id, LANES, VECTOR)
        number -= gone

    s = in_lanes(s, LANES, VECTOR)
    top = lane_max(s)
    m_new = tl.maximum(m, top)
    x = s - over_lanes(m_new)
    if DIAGNOSTICS:
        best = tl.where(top > m, at - first, best)  # ties stay to the left
    move = m - m_new
    hot, cold = exponentials(x, heat, HEAT)
    rate_hot, rate = exponentials(move, heat, HEAT)

    if TEACHER == DENSE:
        t = in_lanes(t, LANES, VECTOR)
        top_t = lane_max(t)
        if DIAGNOSTICS:
            best_t = tl.where(top_t > m_t, at - first, best_t)
        m_t_new = tl.maximum(m_t, top_t)
        move_t = m_t - m_t_new
        y = t - over_lanes(m_t_new)
        hot_t = tl.exp2(y * heat)
        if DIVERGENCE == FORWARD_KL:
            A = carried(d_t, A, move_t, move, heat) + lane_sum(product(hot_t, y - x))
        if DIVERGENCE == REVERSE_KL:
            A = carried(d, A, move, move_t, heat) + lane_sum(product(hot, x - y))
        d_t = d_t * tl.exp2(move_t * heat) + lane_sum(hot_t)
        m_t = m_t_new

    if CLASSES:
        if SMOOTH:
            present = tl.where(s == LEFT_OUT, 0.0, x) if MASKED or HAS_IDS else x
            S += count * move + lane_sum(present)
            count += number
        if DIAGNOSTICS:
            E = (E + d_1 * move) * rate
            E += lane_sum(cold * tl.maximum(x, LOWEST))  # 0 * -inf is 0
        d_1 = d_1 * rate + lane_sum(cold)
    d = d * rate_hot + lane_sum(hot)
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
    partials_ptr, N, V, heat,
    BLOCK: tl.constexpr,  # a multiple of a piece
    SEGMENT: tl.constexpr,  # a multiple of BLOCK
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    HEAT: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    CLASSES: tl.constexpr,
    SMOOTH: tl.constexpr,
    DIAGNOSTICS: tl.constexpr,
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
    heat = to_fp32(heat)
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
                m, d, d_1, S, count, E, best, m_t, d_t, best_t, A, heat,
                BLOCK, False, False,
                LANES, VECTOR, HEAT, CLASSES, SMOOTH, DIAGNOSTICS, TEACHER, DIVERGENCE,
                S_BIAS, S_SCALE, S_CAP, T_BIAS, T_SCALE, T_CAP, T_MIXED,
            )  # fmt: skip
        if TEACHER == TOP_K:
            for at in range(stop, end, PIECE):
                id, next_id, m, d, d_1, S, count, E, best, m_t, d_t, best_t, A = add_columns(
                    s_row, s_bias, s_scale, s_cap, t_row, t_bias, t_scale, t_cap, t_share,
                    at, first, V, ids, K, id, next_id,
                    m, d, d_1, S, count, E, best, m_t, d_t, best_t, A, heat,
                    PIECE, False, True,
                    LANES, VECTOR, HEAT, CLASSES, SMOOTH, DIAGNOSTICS, TEACHER, DIVERGENCE,
                    S_BIAS, S_SCALE, S_CAP, T_BIAS, T_SCALE, T_CAP, T_MIXED,
                )  # fmt: skip
        start = end
    for at in range(whole, last, PIECE):
        id, next_id, m, d, d_1, S, count, E, best, m_t, d_t, best_t, A = add_columns(
            s_row, s_bias, s_scale, s_cap, t_row, t_bias, t_scale, t_cap, t_share,
            at, first, V, ids, K, id, next_id,
            m, d, d_1, S, count, E, best, m_t, d_t, best_t, A, heat,
            PIECE, True, TEACHER == TOP_K,
            LANES, VECTOR, HEAT, CLASSES, SMOOTH, DIAGNOSTICS, TEACHER, DIVERGENCE,
            S_BIAS, S_SCALE, S_CAP, T_BIAS, T_SCALE, T_CAP, T_MIXED,
        )  # fmt: skip

    # Lanes to one, as tiles before.
    top = tl.max(m, 0)
    move = m - top
    rate_hot, rate = exponentials(move, heat, HEAT)
    step = tl.num_programs(1).to(tl.int64) * N  # from one kind of partial sum to the next
    out = partials_ptr + segment.to(tl.int64) * N + row
    tl.store(out + MAXIMUM * step, top)
    tl.store(out + TOTAL * step, tl.sum(d * rate_hot, 0))
    if CLASSES:
        tl.store(out + TOTAL_1 * step, tl.sum(d_1 * rate, 0))
        if SMOOTH:
            tl.store(out + PLAIN * step, tl.sum(S + count * move, 0))
            if TEACHER == TOP_K:
                tl.store(out + COUNT * step, tl.sum(count, 0))
        if DIAGNOSTICS:
            tl.store(out + WEIGHTED * step, tl.sum((E + d_1 * move) * rate, 0))
    if DIAGNOSTICS:  # of all columns: where an id is no smaller, merge takes the best id
        start = first + first_tile(m, best, top)
        column, seen = start.to(tl.float32), tl.full((), float("-inf"), tl.float32)
        for at in range(start, tl.minimum(start + BLOCK, last), PIECE):
            columns = at + tl.arange(0, PIECE)
            s, _ = load_logits(
                s_row, columns, last, s_bias, s_scale, s_cap, True, S_BIAS, S_SCALE, S_CAP
            )
            column, seen = first_best(s, at, column, seen, PIECE)
        tl.store(out + BEST * step, column)
    if TEACHER == DENSE:
        top_t = tl.max(m_t, 0)
        move_t = m_t - top_t
        tl.store(out + TEACHER_MAXIMUM * step, top_t)
        tl.store(out + TEACHER_TOTAL * step, tl.sum(d_t * tl.exp2(move_t * heat), 0))
        if DIVERGENCE == FORWARD_KL:
            tl.store(out + CROSS * step, tl.sum(carried(d_t, A, move_t, move, heat), 0))
        if DIVERGENCE == REVERSE_KL:
            tl.store(out + CROSS * step, tl.sum(carried(d, A, move, move_t, heat), 0))
        if DIAGNOSTICS:
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
                column, seen = first_best(t, at, column, seen, PIECE)
            tl.store(out + TEACHER_BEST * step, column)
