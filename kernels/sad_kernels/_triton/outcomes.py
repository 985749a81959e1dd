"""Rows that are compared by outcomes: a teacher of the student's columns, made of sums by outcome.

With p(o) and q(o) the sums of the softmaxes over the columns of each outcome, and o the outcome of
column v, take for a teacher

    p_v = q_v p(o)/q(o),    whose logits are    t_v = (s_v - top(o)) + T (log p(o) - log r(o))

up to a constant of the row, ``top(o)`` the largest of the student's logits in o and ``r(o)`` the
sum of its ``e^((s - top(o))/T)``. Then ``KL(p || q) = sum_o p(o) log p(o)/q(o)`` and
``q_v - p_v = q_v (1 - p(o)/q(o))``: the forward KL beside these logits, and its gradient, are those
of the outcomes, and every other kernel stays as it is. Three steps, on some rows at a time:

``outcome_sums``  logarithms of the sums of one side: maximum and argmax of a row, then its columns
                  in the order of their outcomes, tile by tile, summed up by a segmented scan in
                  which every outcome has its own maximum. One program per row, a fixed order
torch             what of it belongs to each outcome, [rows, count]; beside a top-k teacher to its
                  ids and to the rest
``spread``        the logits t, in fp32

Bytes, of e-byte logits with V and V_t columns: ``2 e (V + V_t)`` read and ``16 count`` written by
the sums, ``e V + 4 V`` by ``spread``, and 4 V read by each of the kernels that follow. Memory:
``outcome_row_bytes`` per row, of as many rows as fit ``ROWS_BYTES``, or of a chunk.

What no column can hold: an outcome with p(o) > 0 to which no column of the student belongs. It
makes the row's divergence infinite, and the row's gradient is that of the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sad_kernels._rows import LossSpec, RowTargets
from sad_kernels._tiles import outcome_row_bytes, pitch
from sad_kernels._triton import launch, rows
from sad_kernels._triton.launch import Forward, Logits, SortedTopK, ceil_div, on_device
from sad_kernels._triton.tile import LN_2, LOG2_E, LOWEST, LogitsRow, load_logits, to_fp32
from sad_kernels._triton.tile_sizes import power_of_2

BLOCK = 1024
SPREAD_BLOCK = 2048  # 16 bytes of bf16 for each of a program's threads, of which AMD has 256
SEGMENT = 8 * SPREAD_BLOCK  # columns of one program of ``spread``
NUM_WARPS = 4
ROWS_BYTES = 256 << 20
"""Of what is held at a time for rows of given logits."""

KD, AGREE = 1, 4  # in the parts of a ``Forward``


# --- Kernels -------------------------------------------------------------------------------------


@triton.jit
def joined(x_a, m_a, r_a, starts_a, x_b, m_b, r_b, starts_b):
    """Sums ``r 2^m`` of neighbouring ranges of columns; the second alone, if one starts there.

    ``x`` is the largest logit, and ``m`` what it is over T, rounded, in powers of 2.
    """
    m = tl.maximum(m_a, m_b)
    r = r_a * tl.exp2(m_a - m) + r_b * tl.exp2(m_b - m)
    starts = starts_b != 0
    x = tl.where(starts, x_b, tl.maximum(x_a, x_b))
    return x, tl.where(starts, m_b, m), tl.where(starts, r_b, r), starts_a | starts_b


@triton.jit
def raised(z, start, m, best, BLOCK: tl.constexpr):
    """The maximum of a row and its first column, after the tile at ``start``."""
    top = tl.max(z, 0)
    here = start + tl.min(tl.where(z == top, tl.arange(0, BLOCK), BLOCK), 0)
    best = tl.where(top > m, here, best).to(tl.int32)  # ties stay to the left
    return tl.maximum(m, top), best


@triton.jit
def spread_tile(
    student, table, tops, shifts, m, start, V,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The teacher's logits of a tile."""
    columns = start + tl.arange(0, BLOCK)
    s, _ = load_logits(student, columns, V, MASKED)
    if MASKED:
        outcome = tl.load(table + columns, mask=columns < V, other=0)
    else:
        outcome = tl.load(table + columns)
    top, shift = tl.load(tops + outcome), tl.load(shifts + outcome)
    t = (s - m - top) + shift
    # Mass where every logit of the student is -inf: any logit says that there is some.
    nothing = shift == float("-inf")
    return tl.where(top == float("-inf"), tl.where(nothing, float("-inf"), 0.0), t)


@triton.jit
def outcome_sums_kernel(
    z_ptr, z_stride, bias, scale, softcap,  # [N, >= V], one side; as in LogitsRow
    columns_ptr,  # [V] int32, in the order of their outcomes
    outcomes_ptr,  # [V] int32, these outcomes
    labels_ptr,  # None, or [N]
    ignore_index,
    kd_weights_ptr,  # None, or [N]
    tops_ptr,  # [N, count] fp32, written where an outcome has columns: max x, x = s - m
    logs_ptr,  # [N, count] fp32, likewise: log sum of e^((x - top)/T)
    maximum_ptr,  # [N] fp32, written
    best_ptr,  # [N] int32, written: the argmax
    V, count, inv_T,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of one row over the columns of each outcome."""
    row = tl.program_id(0).to(tl.int64)
    if labels_ptr is not None:
        if tl.load(labels_ptr + row) == ignore_index:
            return
    if kd_weights_ptr is not None:
        if tl.load(kd_weights_ptr + row) == 0:
            return
    inv_T = to_fp32(inv_T)
    x = LogitsRow(z_ptr + row * z_stride, bias, scale, softcap, None)
    lanes = tl.arange(0, BLOCK)
    m, best = tl.full((), LOWEST, tl.float32), tl.full((), 0, tl.int32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z, _ = load_logits(x, start + lanes, V, False)
        m, best = raised(z, start, m, best, BLOCK)
    if whole < V:
        z, _ = load_logits(x, whole + lanes, V, True)
        m, best = raised(z, whole, m, best, BLOCK)
    tl.store(maximum_ptr + row, m)
    tl.store(best_ptr + row, best)

    # An outcome may reach over the end of a tile: its sum so far is put before the next.
    x_open, m_open = tl.full((), LOWEST, tl.float32), tl.full((), LOWEST, tl.float32)
    r_open = tl.full((), 0, tl.float32)
    for start in range(0, V, BLOCK):
        at = start + lanes
        inside = at < V
        column = tl.load(columns_ptr + at, mask=inside, other=V)
        outcome = tl.load(outcomes_ptr + at, mask=inside, other=-1)
        before = tl.load(outcomes_ptr + at - 1, mask=inside & (at > 0), other=-2)
        after = tl.load(outcomes_ptr + at + 1, mask=at + 1 < V, other=-2)
        z, _ = load_logits(x, column, V, True)
        x_z = z - m
        x_z = tl.where(x_z == float("-inf"), LOWEST, x_z)  # -inf - -inf would be NaN
        m_z = x_z * inv_T
        r_z = tl.full([BLOCK], 1, tl.float32)
        goes_on = (lanes == 0) & (outcome == before)
        x_0, m_0, r_0, _ = joined(x_open, m_open, r_open, 0, x_z, m_z, r_z, 0)
        x_z, m_z = tl.where(goes_on, x_0, x_z), tl.where(goes_on, m_0, m_z)
        r_z = tl.where(goes_on, r_0, r_z)
        starts = (outcome != before).to(tl.int32)
        x_z, m_z, r_z, _ = tl.associative_scan((x_z, m_z, r_z, starts), 0, joined)
        x_open = tl.sum(tl.where(lanes == BLOCK - 1, x_z, 0.0), 0)
        m_open = tl.sum(tl.where(lanes == BLOCK - 1, m_z, 0.0), 0)
        r_open = tl.sum(tl.where(lanes == BLOCK - 1, r_z, 0.0), 0)
        ends = inside & (outcome != after)
        at = row * count + outcome
        tl.store(tops_ptr + at, tl.where(x_z == LOWEST, float("-inf"), x_z), mask=ends)
        tl.store(logs_ptr + at, tl.log2(r_z) * LN_2, mask=ends)


@triton.jit
def spread_kernel(
    s_ptr, s_stride, s_bias, s_scale, s_softcap,  # [N, >= V]; as in LogitsRow
    table_ptr,  # [V] int32
    tops_ptr,  # [N, count] fp32, of the student
    shifts_ptr,  # [N, count] fp32: T log p(o) less T times the student's log of the sum
    maximum_ptr,  # [N]
    labels_ptr,  # None, or [N]
    ignore_index,
    kd_weights_ptr,  # None, or [N]
    t_ptr, t_stride,  # [N, >= V] fp32, written
    V, count,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """One row's teacher over one segment of the student's columns."""
    row = tl.program_id(0).to(tl.int64)
    if labels_ptr is not None:
        if tl.load(labels_ptr + row) == ignore_index:
            return
    if kd_weights_ptr is not None:
        if tl.load(kd_weights_ptr + row) == 0:
            return
    student = LogitsRow(s_ptr + row * s_stride, s_bias, s_scale, s_softcap, None)
    m = tl.load(maximum_ptr + row)
    tops, shifts = tops_ptr + row * count, shifts_ptr + row * count
    out = t_ptr + row * t_stride
    first = tl.program_id(1) * SEGMENT
    last = tl.minimum(first + SEGMENT, V)
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        t = spread_tile(student, table_ptr, tops, shifts, m, start, V, BLOCK, False)
        tl.store(out + start + tl.arange(0, BLOCK), t)
    if whole < last:
        t = spread_tile(student, table_ptr, tops, shifts, m, whole, V, BLOCK, True)
        columns = whole + tl.arange(0, BLOCK)
        tl.store(out + columns, t, mask=columns < V)


# --- The teacher of the student's columns --------------------------------------------------------


class Sorted(NamedTuple):
    """One side's table in the order of its outcomes, [V] int32 each."""

    columns: Tensor
    outcomes: Tensor

    @classmethod
    def of(cls, table: Tensor) -> Sorted:
        ordered, columns = table.sort(stable=True)
        return cls(columns.int(), ordered.int())


class Tables(NamedTuple):
    """The tables of a call's outcomes; made once for all of its rows."""

    student: Tensor  # [V] int32
    teacher: Tensor  # [V_t] int32
    by_outcome: Sorted
    teacher_by_outcome: Sorted
    used: Tensor  # [count] bool: outcomes with a column of the student

    @classmethod
    def of(cls, spec: LossSpec, targets: RowTargets) -> Tables | None:
        """None where columns are compared."""
        if not spec.num_outcomes:
            return None
        assert targets.outcomes is not None and targets.teacher_outcomes is not None
        student = targets.outcomes[: spec.vocab].contiguous()
        teacher = targets.teacher_outcomes[: spec.teacher_columns].contiguous()
        used = student.new_zeros(spec.num_outcomes, dtype=torch.bool)
        used.index_fill_(0, student.long(), True)
        return cls(student, teacher, Sorted.of(student), Sorted.of(teacher), used)


class Sums(NamedTuple):
    """One side's rows."""

    tops: Tensor  # [N, count], the largest logit of each outcome less the row's; -inf for none
    logs: Tensor  # [N, count], of the sums relative to it
    maximum: Tensor  # [N]
    best: Tensor  # [N] int32


class Columns(NamedTuple):
    """A call that compares outcomes as one that compares columns."""

    spec: LossSpec
    teacher: Logits
    beyond: Tensor  # [N] what the columns do not show of the divergence: 0, inf or NaN
    agree: Tensor  # [N] whether both likeliest columns have one outcome

    def finish(self, result: Forward, targets: RowTargets) -> None:
        """Complete the results of the rows."""
        beyond = self.beyond
        if targets.kd_weights is not None:
            beyond = (beyond * targets.kd_weights).where(beyond != 0, 0)
        result.parts[KD] += beyond
        if self.spec.objective.kd_weight > 0:
            result.loss.add_(beyond)
        if self.spec.compute_metrics:
            result.parts[AGREE] = self.agree


def as_columns(
    spec: LossSpec,
    tables: Tables,
    student: Logits,
    targets: RowTargets,
    teacher: Logits | SortedTopK,
    slab: Tensor | None = None,  # [>= N, >= V] fp32, for the teacher
) -> Columns:
    """The teacher of the student's columns that stands for the sums by outcome."""
    N, V = len(student.x), spec.vocab
    labels, weights = (
        None if x is None else x.contiguous() for x in (targets.labels, targets.kd_weights)
    )
    which = labels, spec.ignore_index, weights
    ours = _sums(spec, student, tables.by_outcome, V, which)
    T = float(spec.objective.temperature)
    if isinstance(teacher, SortedTopK):
        of, beyond = _beside_ids(teacher, ours, T)
        choice = teacher.best
    else:
        width = spec.teacher_columns
        theirs = _sums(spec, teacher, tables.teacher_by_outcome, width, which)
        of, beyond = _beside_sums(theirs, ours, T)
        choice = tables.teacher[theirs.best.long()]
    # Where nothing of the teacher is in the student's columns the rest of the loss stays finite.
    unseen = ~((of.shifts > -math.inf) & tables.used).any(1, keepdim=True)
    unseen &= beyond[:, None] == math.inf
    of.tops.masked_fill_(unseen, 0)
    of.shifts.masked_fill_(unseen, 0)
    compared = torch.ones_like(beyond, dtype=torch.bool)
    if targets.labels is not None:
        compared = targets.labels != spec.ignore_index
    if targets.kd_weights is not None:
        compared = compared & (targets.kd_weights != 0)
    agree = (tables.student[ours.best.long()] == choice) & compared

    t = student.x.new_empty(N, pitch(V), dtype=torch.float32) if slab is None else slab[:N]
    if N > 0:
        with on_device(t.device):
            spread_kernel[(N, ceil_div(V, SEGMENT))](
                *student.arguments, tables.student, *of, ours.maximum, *which,
                t, t.stride(0), V, spec.num_outcomes,
                BLOCK=SPREAD_BLOCK, SEGMENT=SEGMENT, num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    of_columns = spec._replace(num_outcomes=0, teacher_columns=0)
    return Columns(of_columns, Logits(t[:, :V]), beyond.where(compared, 0), agree.float())


def _sums(spec: LossSpec, side: Logits, table: Sorted, V: int, which: tuple[object, ...]) -> Sums:
    N, count, x = len(side.x), spec.num_outcomes, side.x
    tops = x.new_full((N, count), -math.inf, dtype=torch.float32)
    best = tops.new_zeros(N, dtype=torch.int32)
    sums = Sums(tops, torch.zeros_like(tops), tops.new_zeros(N), best)
    if N > 0:
        with on_device(x.device):
            outcome_sums_kernel[(N,)](
                *side.arguments, *table, *which, *sums,
                V, count, LOG2_E.value / float(spec.objective.temperature),
                BLOCK=max(32, min(BLOCK, power_of_2(V))), num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )  # fmt: skip
    return sums


class Spread(NamedTuple):
    """What a teacher's logits ``t = (x - top) + shift`` are made of, [N, count] each."""

    tops: Tensor
    shifts: Tensor


def _beside_sums(theirs: Sums, ours: Sums, T: float) -> tuple[Spread, Tensor]:
    """A teacher of sums by outcome; and what no column shows of the divergence, [N]."""
    shifts = (theirs.logs - ours.logs).mul_(T).add_(theirs.tops)
    infinite = ((ours.tops == -math.inf) & (theirs.tops > -math.inf)).any(1)
    beyond = torch.zeros_like(ours.maximum).masked_fill_(infinite, math.inf)
    beyond.masked_fill_((theirs.logs + theirs.tops).isnan().any(1), math.nan)
    return Spread(ours.tops, shifts), beyond


def _beside_ids(teacher: SortedTopK, ours: Sums, T: float) -> tuple[Spread, Tensor]:
    """The same of a top-k teacher: its ids, and all other outcomes together."""
    count = ours.tops.shape[1]
    padding = teacher.ids == rows.PAD_ID.value
    foreign = ~padding & ((teacher.ids < 0) | (teacher.ids >= count))
    repeated = (teacher.ids[:, 1:] == teacher.ids[:, :-1]) & ~padding[:, 1:]
    # One more column for ids that are none.
    ids = teacher.ids.long().masked_fill(padding | foreign, count)
    tops = torch.nn.functional.pad(ours.tops, (0, 1), value=-math.inf)
    logs = torch.nn.functional.pad(ours.logs, (0, 1))
    outside = tops.scatter(1, ids, -math.inf)
    top = outside.amax(1, keepdim=True)
    none = top == -math.inf
    rest = (outside - top.masked_fill(none, 0)).div_(T).add_(logs).logsumexp(1, keepdim=True)

    at_ids = tops.gather(1, ids)
    log_p = torch.cat((teacher.log_p, teacher.log_rest[:, None]), 1)
    infinite = (log_p > -math.inf) & (torch.cat((at_ids, top), 1) == -math.inf)
    beyond = torch.zeros_like(ours.maximum).masked_fill_(infinite.any(1), math.inf)
    beyond.masked_fill_(foreign.any(1) | repeated.any(1), math.nan)

    inside = T * (teacher.log_p - logs.gather(1, ids))
    other = T * (teacher.log_rest[:, None] - rest.masked_fill(none, 0))
    tops = top.repeat(1, count + 1).scatter_(1, ids, at_ids)
    shifts = other.repeat(1, count + 1).scatter_(1, ids, inside)
    # Padding alone, and no rest: there is nothing to compare with, and 0 is its divergence.
    nothing = (log_p == -math.inf).all(1, keepdim=True)
    tops.masked_fill_(nothing, 0)
    shifts.masked_fill_(nothing, 0)
    return Spread(tops[:, :count].contiguous(), shifts[:, :count].contiguous()), beyond


# --- Rows of given logits ------------------------------------------------------------------------


def forward(
    spec: LossSpec, student: Logits, targets: RowTargets, teacher: Logits | SortedTopK | None
) -> Forward:
    """``launch.forward``, of outcomes some rows at a time."""
    tables = Tables.of(spec, targets)
    if tables is None:
        return launch.forward(spec, student, targets, teacher)
    assert teacher is not None
    result = launch.empty_forward(student, teacher)
    for part in _parts(spec, len(student.x)):
        s, y = launch.rows_of(student, part), targets.at(part)
        columns = as_columns(spec, tables, s, y, launch.rows_of(teacher, part))
        of_part = launch.forward(columns.spec, s, y, columns.teacher)
        columns.finish(of_part, y)
        result.loss[part], result.parts[:, part] = of_part.loss, of_part.parts
        result.saved[:, part] = of_part.saved
    return result


def gradient(
    spec: LossSpec,
    student: Logits,
    targets: RowTargets,
    teacher: Logits | SortedTopK | None,
    saved: Forward,
    upstream: Tensor,  # [N], or [1] for all rows
    out: Tensor,  # [N, >= V]
) -> None:
    """``launch.gradient``, likewise."""
    tables = Tables.of(spec, targets)
    if tables is None:
        return launch.gradient(spec, student, targets, teacher, saved, upstream, out)
    assert teacher is not None
    for part in _parts(spec, len(student.x)):
        s, y = launch.rows_of(student, part), targets.at(part)
        columns = as_columns(spec, tables, s, y, launch.rows_of(teacher, part))
        of_part = saved._replace(saved=saved.saved[:, part].contiguous())
        up = upstream if len(upstream) == 1 else upstream[part]
        launch.gradient(columns.spec, s, y, columns.teacher, of_part, up, out[part])


def _parts(spec: LossSpec, N: int) -> list[slice]:
    at_a_time = max(1, ROWS_BYTES // outcome_row_bytes(spec.column_counts))
    return [slice(i, min(i + at_a_time, N)) for i in range(0, N, at_a_time)]
