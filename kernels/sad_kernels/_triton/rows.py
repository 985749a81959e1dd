"""The four kernels over rows of logits. Together they are every loss and gradient of the package.

``statistics``  reads the logits once, in segments of the vocabulary, one program per row and
                segment, and writes a dozen partial sums for each
``merge``       puts the segments of a row together in their order and finishes its losses
``terms``       reads once more for the mixtures (JSD, the skews), which need both normalisers
``gradient``    reads once more and writes the gradient once, in any dtype

A row is always cut into the same segments, whether one program or many work on it, so its bits do
not depend on how many rows come with it, and few rows still fill the machine.

Every sum is kept relative to the running maxima ``m``, and when a maximum moves by ``move = m_old -
m_new``, with ``r = e^(move/T)``, it is carried along as follows (x = s - m, a and b the two sides
of a KL relative to their own maxima):

====================  ===============================  ====================================
sum over columns      after a move                     gives
====================  ===============================  ====================================
d = sum e^(x/T)       d r                              log-normaliser  log d
S = sum x             S + columns so far * move        smooth term     log d - S/V   (T = 1)
E = sum e^x x         (E + d move) r                   entropy         log d - E/d   (T = 1)
A = sum e^(a/T)(a-b)  (A + d_a (move_a - move_b)) r_a  KL(a||b) = A/(T d_a) - log (d_a/d_b)
====================  ===============================  ====================================

Maxima and sums belong to a thread ("lane"), which takes those of what it has loaded, and the lanes
are put together at the end of a segment: a tile costs no exchange between threads at all. What all
lanes load at once is a *piece*; a tile is one or a few. Of an argmax a lane keeps where its tile
begins, which is read once more in the end.

Beside a top-k teacher ``statistics`` sums up the columns without an id alone: what is outside the
ids then comes without cancellation, and does not underflow beside an id that stands far above it.
Tiles end before the next id, and only pieces are compared with ids: most columns cost as ever.
``merge``, which reads the K logits anyway, adds them to every sum.

Rows are 64-bit offsets, columns 32-bit. Programs of rows that do not count return at once, except
in ``gradient``, where they write zeros without reading.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.tile import (
    FORWARD_KL,
    LOG2_E,
    LOWEST,
    REVERSE_KL,
    SKEW_FORWARD_KL,
    divergence_terms,
    exponentials,
    finish,
    load_logits,
    load_target,
    mixture_parts,
    of_parts,
)

LEFT_OUT = tl.constexpr(-1.2345679e34)
"""In place of the logit of a column that is not to be counted: e^LEFT_OUT is 0, and no logit of 16
bits, nor one that a model has made, is this number."""

ABSENT = tl.constexpr(2**31 - 1)  # the id of padding: no column, and last in order
ID_CHUNK = tl.constexpr(128)  # ids looked at together

# Teachers
NO_TEACHER = tl.constexpr(0)
DENSE = tl.constexpr(1)
TOP_K = tl.constexpr(2)

# Partial sums, [PARTIALS, segments, N]
MAXIMUM = tl.constexpr(0)
TOTAL = tl.constexpr(1)  # d at T
TOTAL_1 = tl.constexpr(2)  # d at 1
PLAIN = tl.constexpr(3)  # S
WEIGHTED = tl.constexpr(4)  # E
BEST = tl.constexpr(5)  # argmax, or near it an id that is no smaller; exact in fp32 below 2^24
TEACHER_MAXIMUM = tl.constexpr(6)
TEACHER_TOTAL = tl.constexpr(7)
TEACHER_BEST = tl.constexpr(8)
CROSS = tl.constexpr(9)  # A
COUNT = tl.constexpr(6)  # columns in S, beside a TOP_K teacher
PARTIALS = 10

# What the gradient needs, [SAVED, N], in the numbering above for the first three
SAVED_TEACHER_MAXIMUM = tl.constexpr(3)
SAVED_TEACHER_TOTAL = tl.constexpr(4)
EXPECTATION = tl.constexpr(5)  # sum_u h_u of a dense divergence
SAVED = 6

# Parts of the loss, [PARTS, N]
PARTS = 6  # ce, kd, z, correct, agree, entropy


@triton.jit
def to_fp32(x):
    """A run-time number, which a compiler in front of us may hand over in fp64."""
    return tl.full((), x, tl.float32)


@triton.jit
def first_id_at(ids, K, column):
    """Where in the K ascending ``ids`` those of ``column`` and of later columns begin."""
    at = 0
    for k in range(0, K, ID_CHUNK):
        some = k + tl.arange(0, ID_CHUNK)
        at += tl.sum((tl.load(ids + some, mask=some < K, other=ABSENT) < column).to(tl.int32), 0)
    return at


@triton.jit
def id_at(ids, K, at):
    return tl.load(ids + at, mask=at < K, other=ABSENT)


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
def carried(total, cross, move, other_move, heat):
    """``A`` after both maxima have moved; 0 * inf is 0."""
    rate = tl.exp2(move * heat)
    return tl.where(rate > 0, (cross + total * (move - other_move)) * rate, 0.0)


@triton.jit
def in_lanes(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """[BLOCK] -> [tile's rows, LANES, VECTOR]: as threads have loaded it, VECTOR at a time."""
    return tl.reshape(x, [x.shape[0] // (LANES * VECTOR), LANES, VECTOR])


@triton.jit
def lane_sum(x):
    """Over what each thread has: [rows, LANES, VECTOR] -> [LANES]."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def over_lanes(x):
    """[LANES] -> [1, LANES, 1]"""
    return x[None, :, None]


@triton.jit
def product(weights, x):
    """0 where the weight is 0, whatever it multiplies."""
    return weights * tl.where(weights > 0, x, 0.0)


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


@triton.jit
def merge_kernel(
    partials_ptr, terms_ptr, num_segments, segment_length, N, V,
    s_ptr, s_stride, s_bias, s_scale, s_cap,
    ids_ptr, log_p_ptr, log_rest_ptr, top_id_ptr, K,
    labels_ptr, ignore_index,
    loss_ptr, parts_ptr, saved_ptr, inside_ptr, outside_ptr,
    heat, temperature, beta, smoothing, ce_weight, kd_weight, z_loss, kd_scale,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAT: tl.constexpr,
    FINAL: tl.constexpr,
    HAS_TERMS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    CLASSES: tl.constexpr,
    SMOOTH: tl.constexpr,
    DIAGNOSTICS: tl.constexpr,
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
    heat, temperature, beta = to_fp32(heat), to_fp32(temperature), to_fp32(beta)
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
        rate_hot, rate = exponentials(move, heat, HEAT)
        rate_hot_b, rate_b = exponentials(move_b, heat, HEAT)
        if DIAGNOSTICS:
            best_b = tl.load(of + BEST * step, mask=counts, other=0.0)
            best = tl.where(m_b > m, best_b, best)
        if TEACHER == DENSE:
            m_t_b = tl.load(of + TEACHER_MAXIMUM * step, mask=counts, other=LOWEST)
            d_t_b = tl.load(of + TEACHER_TOTAL * step, mask=counts, other=0.0)
            m_t_new = tl.maximum(m_t, m_t_b)
            move_t, move_t_b = m_t - m_t_new, m_t_b - m_t_new
            if DIAGNOSTICS:
                best_t_b = tl.load(of + TEACHER_BEST * step, mask=counts, other=0.0)
                best_t = tl.where(m_t_b > m_t, best_t_b, best_t)
            A_b = zero
            if (DIVERGENCE == FORWARD_KL) | (DIVERGENCE == REVERSE_KL):
                A_b = tl.load(of + CROSS * step, mask=counts, other=0.0)
            if DIVERGENCE == FORWARD_KL:
                A = carried(d_t, A, move_t, move, heat)
                A += carried(d_t_b, A_b, move_t_b, move_b, heat)
            if DIVERGENCE == REVERSE_KL:
                A = carried(d, A, move, move_t, heat)
                A += carried(d_b, A_b, move_b, move_t_b, heat)
            d_t = d_t * tl.exp2(move_t * heat) + d_t_b * tl.exp2(move_t_b * heat)
            m_t = m_t_new
        if CLASSES:
            d_1_b = tl.load(of + TOTAL_1 * step, mask=counts, other=0.0)
            if SMOOTH:
                S_b = tl.load(of + PLAIN * step, mask=counts, other=0.0)
                here = zero + tl.minimum(segment_length, V - segment * segment_length)
                if TEACHER == TOP_K:
                    here = tl.load(of + COUNT * step, mask=counts, other=0.0)
                S = (S + count * move) + (S_b + here * move_b)
                count += here
            if DIAGNOSTICS:
                E_b = tl.load(of + WEIGHTED * step, mask=counts, other=0.0)
                E = (E + d_1 * move) * rate + (E_b + d_1_b * move_b) * rate_b
            d_1 = d_1 * rate + d_1_b * rate_b
        d = d * rate_hot + d_b * rate_hot_b
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
        if DIAGNOSTICS:
            # Where an id is above all other columns, ``best`` may be any id, and is not looked at.
            best_id = tl.min(tl.where(z == top_z[:, None], ids, 0x7FFFFFFF), 1).to(tl.float32)
            first_of_both = tl.minimum(best, best_id)
            best = tl.where(top_z > m, best_id, tl.where(top_z == m, first_of_both, best))
        m_t, d_t = m, d  # of the columns without ids; from here on the others are in
        m = tl.maximum(m_t, top_z)
        move = m_t - m
        x = z - m[:, None]
        hot, below = x * heat, move * heat
        total = d_t * tl.exp2(below) + tl.sum(tl.exp2(hot), 1)
        if CLASSES:
            once = usable & ~repeated
            x = tl.where(once, x, float("-inf"))
            cold, rate = tl.exp2(x * LOG2_E), tl.exp2(move * LOG2_E)
            if SMOOTH:
                S += count * move + tl.sum(tl.where(once, x, 0.0), 1)
            if DIAGNOSTICS:
                E = (E + d_1 * move) * rate + tl.sum(product(cold, x), 1)
            d_1 = d_1 * rate + tl.sum(cold, 1)
        log_total = tl.log2(total)
        log_q = hot - log_total[:, None]
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
    if CLASSES:
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
            if HAS_TERMS:
                of = terms_ptr + rows
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
        if CLASSES:
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
            if DIAGNOSTICS:
                entropy = log_1 - E / d_1
        if DIAGNOSTICS:
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


@triton.jit
def sum_parts(
    s, t, log_d, log_d_t, m, m_t, heat, beta,
    LANES: tl.constexpr, VECTOR: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    log_q = (s - m) * heat - log_d
    log_p = (t - m_t) * heat - log_d_t
    _, u, v = mixture_parts(log_q, log_p, beta, DIVERGENCE, True)
    return lane_sum(in_lanes(u, LANES, VECTOR)), lane_sum(in_lanes(v, LANES, VECTOR))


@triton.jit
def terms_kernel(
    s_ptr, s_stride, s_bias, s_scale, s_cap,
    t_ptr, t_stride, t_bias, t_scale, t_cap, t_share,
    labels_ptr, ignore_index,
    saved_ptr, terms_ptr, N, V, heat, beta,
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
    heat, beta = to_fp32(heat), to_fp32(beta)
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
        u, v = sum_parts(s, t, log_d, log_d_t, m, m_t, heat, beta, LANES, VECTOR, DIVERGENCE)
        u_sum += u
        v_sum += v
    if whole < last:
        columns = whole + tl.arange(0, BLOCK)
        s, _ = load_logits(s_row, columns, V, s_bias, s_scale, s_cap, True, S_BIAS, S_SCALE, S_CAP)
        t = load_target(
            s, t_row, columns, V, t_bias, t_scale, t_cap, t_share,
            True, T_BIAS, T_SCALE, T_CAP, T_MIXED,
        )  # fmt: skip
        u, v = sum_parts(s, t, log_d, log_d_t, m, m_t, heat, beta, LANES, VECTOR, DIVERGENCE)
        u_sum += u
        v_sum += v
    out = terms_ptr + segment.to(tl.int64) * N + row
    value, expectation = of_parts(tl.sum(u_sum, 0), tl.sum(v_sum, 0), beta, DIVERGENCE)
    tl.store(out, value)
    tl.store(out + tl.num_programs(1).to(tl.int64) * N, expectation)


@triton.jit
def gradient_tile(
    s, slope, t, start, columns, label,
    m, d, m_t, d_t, log_d, log_d_t, expectation, outside,
    q_1_factor, smooth_share, label_share, kd,
    ids, inside, K, id, next_id,
    heat, beta,
    BLOCK: tl.constexpr,
    HEAT: tl.constexpr,
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
        g = tl.exp2((s - m_t) * heat) * outside
        while next_id < start + BLOCK:
            g = tl.where(columns == next_id, kd * tl.load(inside + id), g)
            id += 1
            next_id = id_at(ids, K, id)
    x = s - m
    hot, cold = exponentials(x, heat, HEAT)
    if TEACHER == DENSE:
        if DIVERGENCE == FORWARD_KL:
            g = hot * (kd / d) - tl.exp2((t - m_t) * heat) * (kd / d_t)
        else:
            log_q = x * heat - log_d
            log_p = (t - m_t) * heat - log_d_t
            if DIVERGENCE == REVERSE_KL:
                q = tl.exp2(log_q)
                _, h = divergence_terms(log_q, log_p, beta, DIVERGENCE)
            else:
                q, u, v = mixture_parts(
                    log_q, log_p, beta, DIVERGENCE, DIVERGENCE != SKEW_FORWARD_KL
                )
                _, h = of_parts(u, v, beta, DIVERGENCE)
            g = (h - q * expectation) * kd
    if HAS_CE:
        g += cold * q_1_factor - smooth_share
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
    heat, temperature, beta, smoothing, ce_weight, kd_weight, z_loss, kd_scale,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    HEAT: tl.constexpr,
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

    heat, beta = to_fp32(heat), to_fp32(beta)
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
            heat, beta,
            BLOCK, HEAT, HAS_CE, TEACHER, DIVERGENCE, S_CAP,
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
                heat, beta,
                BLOCK, HEAT, HAS_CE, TEACHER, DIVERGENCE, S_CAP,
            )  # fmt: skip
            g = tl.where(columns < V, g, 0.0)
        tl.store(g_row + columns, g.to(g_ptr.dtype.element_ty), mask=columns < last)
