"""Kernel ``statistics``: partial sums of each row over each segment of the vocabulary.

The sums, and how they move with a running maximum, are explained in ``rows.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sad_kernels._triton.rows import (
    BEST,
    COUNT,
    CROSS,
    CROSS_REVERSE,
    DENSE,
    DIFFERENCE,
    MASKED_LOGIT,
    MAXIMUM,
    PLAIN,
    TEACHER_AT_BEST,
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
    rescale_difference,
    to_lanes,
)
from sad_kernels._triton.tile import (
    FORWARD_KL,
    JEFFREYS,
    LOWEST,
    REVERSE_KL,
    TVD,
    ClassShares,
    LogitsRow,
    exponential_difference,
    exponentials,
    load_logits,
    load_shares,
    require_mixture,
    teacher_side,
    to_fp32,
    to_target,
)


class LaneSums(NamedTuple):
    """What each lane has summed up of one row so far, [LANES] each, named as in ``rows.py``."""

    m: Any  # maximum of the student's logits
    m_t: Any  # and of the teacher's
    d: Any  # sum of e^(x/T)
    d_1: Any  # sum of e^x
    S: Any  # sum of x
    count: Any  # columns in S
    E: Any  # sum of e^x x
    A: Any  # cross sum of a KL
    C: Any  # cross sum of KL(q || p) beside that of KL(p || q)
    B: Any  # d_t - d
    d_t: Any  # sum of e^(y/T) over the teacher
    best: Any  # int32: where the tile that holds the maximum begins, from the segment's start
    best_t: Any


class IdCursor(NamedTuple):
    """The first of a top-k teacher's ids that no tile has reached."""

    position: Any  # among the row's K ids
    id: Any


@triton.jit
def mask_ids(x, start, end, ids, K, cursor, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Write MASKED_LOGIT to ``x`` in the columns of the ids below ``end``.

    Returns ``x``, the number of columns that were masked by lane, and the next id.
    """
    columns = start + tl.arange(0, LANES * VECTOR)
    position, next_id = cursor.position, cursor.id
    masked = tl.zeros([LANES], tl.float32)
    previous = -1
    while next_id < end:
        x = tl.where(columns == next_id, MASKED_LOGIT, x)
        lane = tl.where(next_id == previous, -1, (next_id - start) // VECTOR)  # once if repeated
        masked += (tl.arange(0, LANES) == lane).to(tl.float32)
        previous = next_id
        position += 1
        next_id = id_at(ids, K, position)
    return x, masked, IdCursor(position, next_id)


@triton.jit
def first_argmax(x, start, column, seen, SIZE: tl.constexpr):
    """The first column, exact in fp32, of the largest ``seen``, after the piece at ``start``."""
    top = tl.max(x, 0)
    here = start + tl.min(tl.where(x == top, tl.arange(0, SIZE), SIZE), 0)
    return tl.where(top > seen, here.to(tl.float32), column), tl.maximum(seen, top)


@triton.jit
def add_columns(
    sums, cursor, student, teacher, t_share, shares, start, first, V, ids, K, inv_T,
    SIZE: tl.constexpr,  # a tile or a piece
    MASKED: tl.constexpr,  # some columns may lie past V
    HAS_IDS: tl.constexpr,  # ids of a top-k teacher may be among the columns
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Add the SIZE columns at ``start`` to the sums; returns these, and the next id."""
    columns = start + tl.arange(0, SIZE)
    s, _ = load_logits(student, columns, V, MASKED)
    t = s
    if FLAGS.TEACHER == DENSE:
        t, _ = load_logits(teacher, columns, V, MASKED)
    number = tl.full([LANES], SIZE // LANES, tl.float32)
    if MASKED:
        s = tl.where(columns < V, s, MASKED_LOGIT)
        number = lane_sum(to_lanes((columns < V).to(tl.float32), LANES, VECTOR))
    if HAS_IDS:
        end = tl.minimum(start + SIZE, V)  # an id past it is no column that could be missing
        s, masked, cursor = mask_ids(s, start, end, ids, K, cursor, LANES, VECTOR)
        number -= masked

    # The new maxima, and by how much they move what has been summed up.
    s = to_lanes(s, LANES, VECTOR)
    top = lane_max(s)
    m = tl.maximum(sums.m, top)
    x = s - over_lanes(m)
    best = sums.best
    if FLAGS.COMPUTE_METRICS or FLAGS.TWO_PASSES:
        best = tl.where(top > sums.m, start - first, best)  # ties stay to the left
    move = sums.m - m
    exp_T, exp_1 = exponentials(x, inv_T, FLAGS.T_CASE)
    decay_T, decay_1 = exponentials(move, inv_T, FLAGS.T_CASE)

    m_t, d_t, best_t, A, B, C = sums.m_t, sums.d_t, sums.best_t, sums.A, sums.B, sums.C
    if FLAGS.TEACHER == DENSE:
        t = to_lanes(t, LANES, VECTOR)
        top_t = lane_max(to_target(s, t, t_share))
        if FLAGS.COMPUTE_METRICS:
            best_t = tl.where(top_t > m_t, start - first, best_t)
        m_t = tl.maximum(m_t, top_t)
        move_t = sums.m_t - m_t
        y, apart = teacher_side(x, s, t, t_share, over_lanes(m), over_lanes(m_t))
        exp_T_t, decay_T_t = tl.exp2(y * inv_T), tl.exp2(move_t * inv_T)
        if FLAGS.DIVERGENCE == FORWARD_KL:
            A = rescale_cross(d_t, A, move_t, move, inv_T) + lane_sum(product(exp_T_t, apart))
        elif FLAGS.DIVERGENCE == REVERSE_KL:
            A = rescale_cross(sums.d, A, move, move_t, inv_T) + lane_sum(product(exp_T, -apart))
        elif FLAGS.DIVERGENCE == JEFFREYS:
            A = rescale_cross(d_t, A, move_t, move, inv_T) + lane_sum(product(exp_T_t, apart))
            C = rescale_cross(sums.d, C, move, move_t, inv_T) + lane_sum(product(exp_T, -apart))
        elif FLAGS.DIVERGENCE != TVD:
            require_mixture(FLAGS.DIVERGENCE)  # takes a second reading, see ``mixture.py``
        if not FLAGS.TWO_PASSES or FLAGS.DIVERGENCE == TVD:
            difference = exponential_difference(exp_T, exp_T_t, apart, t_share, inv_T)
            B = rescale_difference(d_t, B, decay_T_t, decay_T) + lane_sum(difference)
        d_t = d_t * decay_T_t + lane_sum(exp_T_t)

    d_1, S, count, E = sums.d_1, sums.S, sums.count, sums.E
    if FLAGS.COMPUTE_CE:
        if FLAGS.SMOOTH:
            if shares is None:
                present = tl.where(s == MASKED_LOGIT, 0.0, x) if MASKED or HAS_IDS else x
            else:
                a = to_lanes(load_shares(shares, columns, V, MASKED), LANES, VECTOR)
                present = tl.where(a != 0, a * x, 0.0)
                number = lane_sum(a)
            S += count * move + lane_sum(present)
            count += number
        if FLAGS.COMPUTE_METRICS:
            E = (E + d_1 * move) * decay_1
            E += lane_sum(exp_1 * tl.maximum(x, LOWEST))  # 0 * -inf is 0
        d_1 = d_1 * decay_1 + lane_sum(exp_1)
    d = sums.d * decay_T + lane_sum(exp_T)
    return LaneSums(m, m_t, d, d_1, S, count, E, A, C, B, d_t, best, best_t), cursor


@triton.jit
def first_tile(m, best, top):
    """The tile that holds the maximum ``top`` of all lanes, the first if there are several."""
    none = 0x7FFFFFFF
    found = tl.min(tl.where(m == top, best, none), 0)
    return tl.where(found == none, 0, found)  # no lane's maximum equals NaN


@triton.jit
def statistics_kernel(
    s_ptr, s_stride, s_bias, s_scale, s_softcap,  # [N, >= V]; what follows as in LogitsRow
    t_ptr, t_stride, t_bias, t_scale, t_softcap,  # [N, >= V] of a DENSE teacher
    t_share,  # None, or the teacher's share of the target
    ids_ptr, K,  # [N, K] int32 of a TOP_K teacher, ascending in each row
    labels_ptr,  # None, or [N]
    ignore_index,
    other_rows_ptr, wanted,  # None, or [N]: only rows with the wanted number are computed
    kd_weights_ptr,  # None, or [N]: of the divergence; the teacher's row is not read where it is 0
    soft_ptr, soft_stride,  # None, or [N, >= V] probabilities of the classes
    class_weight_ptr,  # None, or [V]
    partials_ptr,  # [PARTIALS, segments, N] fp32, written
    N, V, inv_T, smoothing,
    classes,  # None, or those of all shards, of which V are here
    BLOCK: tl.constexpr,  # columns of a tile: a multiple of a piece
    SEGMENT: tl.constexpr,  # columns of a program: a multiple of BLOCK
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Partial sums of one row over one segment of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    if labels_ptr is not None:
        if tl.load(labels_ptr + row) == ignore_index:
            return
    if other_rows_ptr is not None:
        if tl.load(other_rows_ptr + row) != wanted:
            return
    inv_T = to_fp32(inv_T)
    student = LogitsRow(s_ptr + row * s_stride, s_bias, s_scale, s_softcap, None)
    teacher = student
    is_read = None
    if kd_weights_ptr is not None:
        is_read = (tl.load(kd_weights_ptr + row) != 0).to(tl.int32)
        K *= is_read
    if FLAGS.TEACHER == DENSE:
        teacher = LogitsRow(t_ptr + row * t_stride, t_bias, t_scale, t_softcap, is_read)
    shares = None
    if soft_ptr is not None:
        smoothing = to_fp32(smoothing)
        soft = soft_ptr + row * soft_stride
        if classes is None:
            classes = V
        shares = ClassShares(soft, class_weight_ptr, 1 - smoothing, smoothing / classes)
    elif class_weight_ptr is not None:
        shares = ClassShares(None, class_weight_ptr, 0.0, 1.0)
    ids = ids_ptr
    if FLAGS.TEACHER == TOP_K:
        ids = ids_ptr + row * K

    none = tl.zeros([LANES], tl.float32)
    lowest = none + LOWEST
    start_of_tile = tl.zeros([LANES], tl.int32)
    sums = LaneSums(
        m=lowest, m_t=lowest, d=none, d_1=none, S=none, count=none, E=none, A=none, C=none,
        B=none, d_t=none, best=start_of_tile, best_t=start_of_tile,
    )  # fmt: skip
    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, V)
    PIECE: tl.constexpr = LANES * VECTOR
    cursor = IdCursor(0, 0)
    if FLAGS.TEACHER == TOP_K:
        position = first_id_at(ids, K, first)
        cursor = IdCursor(position, id_at(ids, K, position))

    # Whole tiles, read without a mask. Beside a top-k teacher they end before the next id; the
    # pieces with ids follow, and then tiles again.
    STEP: tl.constexpr = PIECE if FLAGS.TEACHER == TOP_K else BLOCK
    whole = first + (last - first) // STEP * STEP
    start = first
    while start < whole:  # once, or beside a top-k teacher once for every piece that has ids
        stop, end = whole, whole
        if FLAGS.TEACHER == TOP_K:
            stop = first + (tl.minimum(cursor.id, whole) - first) // PIECE * PIECE
            end = tl.minimum(stop + PIECE, whole)
        stop = start + (stop - start) // BLOCK * BLOCK
        for at in range(start, stop, BLOCK):
            sums, cursor = add_columns(
                sums, cursor, student, teacher, t_share, shares, at, first, V, ids, K, inv_T,
                BLOCK, False, False, LANES, VECTOR, FLAGS,
            )  # fmt: skip
        if FLAGS.TEACHER == TOP_K:
            for at in range(stop, end, PIECE):
                sums, cursor = add_columns(
                    sums, cursor, student, teacher, t_share, shares, at, first, V, ids, K, inv_T,
                    PIECE, False, True, LANES, VECTOR, FLAGS,
                )  # fmt: skip
        start = end
    # The rest, in pieces, of which the last may reach past V.
    for at in range(whole, last, PIECE):
        sums, cursor = add_columns(
            sums, cursor, student, teacher, t_share, shares, at, first, V, ids, K, inv_T,
            PIECE, True, FLAGS.TEACHER == TOP_K, LANES, VECTOR, FLAGS,
        )  # fmt: skip

    # From lanes to one number each, with the rules by which tiles were added.
    top = tl.max(sums.m, 0)
    move = sums.m - top
    decay_T, decay_1 = exponentials(move, inv_T, FLAGS.T_CASE)
    step = tl.num_programs(1).to(tl.int64) * N  # from one kind of partial sum to the next
    out = partials_ptr + segment.to(tl.int64) * N + row
    tl.store(out + MAXIMUM * step, top)
    tl.store(out + TOTAL * step, tl.sum(sums.d * decay_T, 0))
    if FLAGS.COMPUTE_CE:
        tl.store(out + TOTAL_1 * step, tl.sum(sums.d_1 * decay_1, 0))
        if FLAGS.SMOOTH:
            tl.store(out + PLAIN * step, tl.sum(sums.S + sums.count * move, 0))
            if FLAGS.TEACHER == TOP_K or shares is not None:
                tl.store(out + COUNT * step, tl.sum(sums.count, 0))
        if FLAGS.COMPUTE_METRICS:
            tl.store(out + WEIGHTED * step, tl.sum((sums.E + sums.d_1 * move) * decay_1, 0))
    if FLAGS.COMPUTE_METRICS or FLAGS.TWO_PASSES:
        # The argmax: one tile is read once more. It is that of all columns, a teacher's ids
        # included: where an id is no smaller, merge takes the best id.
        start = first + first_tile(sums.m, sums.best, top)
        column, seen = start.to(tl.float32), tl.full((), float("-inf"), tl.float32)
        for at in range(start, tl.minimum(start + BLOCK, last), PIECE):
            s, _ = load_logits(student, at + tl.arange(0, PIECE), last, True)
            column, seen = first_argmax(s, at, column, seen, PIECE)
        tl.store(out + BEST * step, column)
        if FLAGS.TWO_PASSES:
            t_at_best = load_logits(teacher, column.to(tl.int32), V, False)[0]
            tl.store(out + TEACHER_AT_BEST * step, t_at_best)
    if FLAGS.TEACHER == DENSE:
        top_t = tl.max(sums.m_t, 0)
        move_t = sums.m_t - top_t
        tl.store(out + TEACHER_MAXIMUM * step, top_t)
        decay_T_t = tl.exp2(move_t * inv_T)
        tl.store(out + TEACHER_TOTAL * step, tl.sum(sums.d_t * decay_T_t, 0))
        if not FLAGS.TWO_PASSES or FLAGS.DIVERGENCE == TVD:
            B = rescale_difference(sums.d_t, sums.B, decay_T_t, decay_T)
            tl.store(out + DIFFERENCE * step, tl.sum(B, 0))
        if FLAGS.DIVERGENCE == FORWARD_KL:
            A_out = out + CROSS * step
            tl.store(A_out, tl.sum(rescale_cross(sums.d_t, sums.A, move_t, move, inv_T), 0))
        elif FLAGS.DIVERGENCE == REVERSE_KL:
            A_out = out + CROSS * step
            tl.store(A_out, tl.sum(rescale_cross(sums.d, sums.A, move, move_t, inv_T), 0))
        elif FLAGS.DIVERGENCE == JEFFREYS:
            A_out, C_out = out + CROSS * step, out + CROSS_REVERSE * step
            tl.store(A_out, tl.sum(rescale_cross(sums.d_t, sums.A, move_t, move, inv_T), 0))
            tl.store(C_out, tl.sum(rescale_cross(sums.d, sums.C, move, move_t, inv_T), 0))
        if FLAGS.COMPUTE_METRICS:
            start = first + first_tile(sums.m_t, sums.best_t, top_t)
            column, seen = start.to(tl.float32), tl.full((), float("-inf"), tl.float32)
            for at in range(start, tl.minimum(start + BLOCK, last), PIECE):
                columns = at + tl.arange(0, PIECE)
                s = tl.zeros([PIECE], tl.float32)
                if t_share is not None:
                    s, _ = load_logits(student, columns, last, True)
                t, _ = load_logits(teacher, columns, last, True)
                t = to_target(s, t, t_share)
                column, seen = first_argmax(t, at, column, seen, PIECE)
            tl.store(out + TEACHER_BEST * step, column)
