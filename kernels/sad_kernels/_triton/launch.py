"""Launches of the four kernels over rows: arguments, flags and grids, from tensors.

``forward`` and ``gradient`` are the only callers of these kernels. ``rows.py`` explains how the
kernels work together.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._divergence import teacher_outcomes
from sad_kernels._divergence_table import DIVERGENCES, missing
from sad_kernels._rows import LossSpec, RowTargets
from sad_kernels._triton import rows, shards, tile
from sad_kernels._triton.gradient import gradient_kernel
from sad_kernels._triton.merge import merge_kernel
from sad_kernels._triton.mixture import mixture_kernel
from sad_kernels._triton.rows import Flags
from sad_kernels._triton.statistics import statistics_kernel
from sad_kernels._triton.tile_sizes import choose_tile, power_of_2
from sad_kernels.objective import Tail
from sad_kernels.vocab import gathered

MERGE_NUMBERS = 128  # rows, or rows times ids, per program of ``merge``


T_CASES = {1.0: tile.ONE.value, 2.0: tile.TWO.value}


@dataclass(frozen=True)
class Logits:
    """One model's rows of logits, or of products that become logits by bias, scale and softcap."""

    x: Tensor  # [N, >= V], of column stride 1
    bias: Tensor | None = None  # [>= V]
    scale: float = 1.0
    softcap: float | None = None
    shifts: Tensor | None = None
    """[N, groups] fp32: x are codes, relative to their groups' maxima, and these how far each is
    below the row's; see ``codes.py``."""

    @property
    def arguments(self) -> tuple[object, ...]:
        """The kernels' five arguments for one side; None for a step that this model lacks."""
        scale = None if self.scale == 1 else float(self.scale)
        softcap = None if self.softcap is None else float(self.softcap)
        return self.x, self.x.stride(0), self.bias, scale, softcap


@dataclass(frozen=True)
class SortedTopK:
    """A top-k teacher with each row's ids in ascending order."""

    ids: Tensor  # [N, K] int32; rows.PAD_ID is padding
    log_p: Tensor  # [N, K] log-probabilities of the ids
    log_rest: Tensor  # [N] log-probability of everything else
    best: Tensor  # [N] int64, the likeliest id

    @classmethod
    def prepare(cls, ids: Tensor, log_probs: Tensor, tail: Tail, vocab: int) -> SortedTopK:
        """Sort the ids of each row, so that those of one tile lie next to each other."""
        log_p = log_probs.float()
        best = ids.gather(1, log_p.argmax(1, keepdim=True)).squeeze(1).long()
        # Padding sorts last. Foreign ids stay foreign in int32: -1 below, PAD_ID - 1 above.
        present = log_p != -torch.inf
        ids = ids.long().clamp(-1, rows.PAD_ID.value - 1).where(present, rows.PAD_ID.value)
        ids, order = ids.sort(dim=1, stable=True)
        log_p, log_rest = teacher_outcomes(log_p.gather(1, order), tail, vocab)
        return cls(ids.int(), log_p, log_rest, best)


class Forward(NamedTuple):
    """Row losses, and the numbers per row that the gradient needs."""

    loss: Tensor  # [N]
    parts: Tensor  # [PARTS, N]: ce, kd, z, correct, agree, entropy, lse
    saved: Tensor  # [SAVED, N]
    inside: Tensor  # [N, K], of a top-k teacher: the gradient by the ids' logits
    outside: Tensor  # [N]: and by all others, see merge.py


class Block(NamedTuple):
    """Some rows of a linear loss after forward, as ``gradient`` takes them."""

    forward: Forward
    student: Logits
    teacher: Logits | SortedTopK | None


class Selection(NamedTuple):
    """The rows of a launch: all of them, or those where ``other`` is ``wanted``."""

    other: Tensor | None  # [N] uint8
    wanted: int


def _selections(
    spec: LossSpec, targets: RowTargets, teacher: Logits | SortedTopK | None
) -> list[tuple[LossSpec, Selection]]:
    """What to compute for which rows: one divergence for all, or each of two for its own."""
    if targets.other_rows is None or teacher is None:
        return [(spec, Selection(None, 0))]
    o, other_rows = spec.objective, targets.other_rows.contiguous().view(torch.uint8)
    first = replace(o, other_divergence=None)
    second = replace(first, divergence=o.other_divergence, beta=o.other_beta)
    return [
        (spec._replace(objective=objective), Selection(other_rows, wanted))
        for wanted, objective in enumerate((first, second))
    ]


def rows_of(side: Logits | SortedTopK, rows: slice) -> Logits | SortedTopK:
    """Some rows of a student's or teacher's."""
    if isinstance(side, Logits):
        return replace(side, x=side.x[rows])
    fields = side.ids, side.log_p, side.log_rest, side.best
    return SortedTopK(*(x[rows] for x in fields))


def empty_forward(student: Logits, teacher: Logits | SortedTopK | None) -> Forward:
    """Room for the results of all rows."""
    N, empty = len(student.x), student.x.new_empty(0, dtype=torch.float32)
    top_k = teacher if isinstance(teacher, SortedTopK) else None
    return Forward(
        loss=empty.new_empty(N),
        parts=empty.new_empty(rows.PARTS, N),
        saved=empty.new_empty(rows.SAVED, N),
        inside=empty.new_empty((0, 0) if top_k is None else top_k.ids.shape),
        outside=empty.new_empty(0 if top_k is None else N),
    )


def forward(
    spec: LossSpec, student: Logits, targets: RowTargets, teacher: Logits | SortedTopK | None
) -> Forward:
    """Compute all losses of all rows in one pass over the logits; a mixture takes a second."""
    result = empty_forward(student, teacher)
    if len(student.x) == 0:  # a grid must not be empty
        return result
    for selected_spec, selection in _selections(spec, targets, teacher):
        _forward(selected_spec, selection, student, targets, teacher, result)
    return result


def _forward(
    spec: LossSpec,
    selection: Selection,
    student: Logits,
    targets: RowTargets,
    teacher: Logits | SortedTopK | None,
    result: Forward,
) -> None:
    """Write the results of the selected rows."""
    x, V = student.x, spec.width
    N = len(x)
    empty = result.loss
    top_k = teacher if isinstance(teacher, SortedTopK) else None
    flags = forward_flags(spec, targets, teacher)
    dense = teacher if isinstance(teacher, Logits) else student
    numbers = _numbers(spec)

    # Statistics: one program per row and segment. Where there is no teacher, no ids, the pointers
    # are of tensors that exist and the kernel does not read them.
    pressure = _pressure(student, teacher, targets)
    shape = choose_tile(x.device, "statistics", V, pressure, ids=top_k is not None)
    segments = ceil_div(V, shape.segment)
    partials = empty.new_empty(rows.PARTIALS, segments, N)
    ids, K = (partials, 0) if top_k is None else (top_k.ids, top_k.ids.shape[1])
    own_ids = ids if top_k is None else _own_ids(top_k.ids, spec)
    which = _adjacent(targets.labels), spec.ignore_index, *selection
    kd_weights, class_weight = _adjacent(targets.kd_weights), targets.class_weight
    if teacher is None:
        kd_weights = None
    soft = _soft_arguments(targets)
    read = x, dense.x if targets.soft is None else targets.soft
    if segments > 0:  # a shard may have no column
        with on_device(x.device):
            statistics_kernel[(N, segments)](
                *student.arguments, *dense.arguments, _target_share(spec),
                own_ids, K, *which, kd_weights, *soft, _own_classes(class_weight, spec),
                partials, N, V, numbers[0], float(spec.objective.label_smoothing), _classes(spec),
                BLOCK=shape.block, SEGMENT=shape.segment, **shape.lanes(*read), FLAGS=flags,
                num_warps=shape.warps, enable_fp_fusion=True,
            )  # fmt: skip

    # Shards of the vocabulary take the place of segments.
    found = Segments(partials, segments, shape.segment)
    if spec.shard is not None:
        block_k, rows_at_a_time, warps = _merge_tile(top_k)
        folded = empty.new_empty(shards.KINDS, N)
        picked = empty.new_zeros(1 + K, N)
        with on_device(x.device):
            shards.fold_kernel[(ceil_div(N, rows_at_a_time),)](
                partials, segments, shape.segment, N, V, *student.arguments, own_ids, K, *which,
                spec.first, folded, picked, numbers[0],
                ROWS=rows_at_a_time, BLOCK_K=block_k,
                SHARES=targets.soft is not None or class_weight is not None, FLAGS=flags,
                num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
        partials, picked = shards.exchanged(
            folded, picked, flags, targets.labels is not None, spec.shard.group
        )
        found = Segments(partials, partials.shape[1], shape.segment, picked)

    call = spec, student, targets, top_k, (*which, kd_weights), flags, found, result
    if flags.TWO_PASSES:  # the normalisers first, then the second pass, which needs them
        merge(*call, mixture_sums=None)
        sums = _mixture(spec, student, dense, (*which, kd_weights), result.saved, flags.DIVERGENCE)
        merge(*call, mixture_sums=sums)
    else:
        merge(*call, mixture_sums=partials)  # which it does not read


class Segments(NamedTuple):
    """Sums of all rows over segments of the vocabulary."""

    partials: Tensor  # [kinds, segments, N]
    number: int
    length: int
    picked: Tensor | None = None  # [1 + K, N] logits of labels and ids; None: they can be read


def merge(
    spec: LossSpec,
    student: Logits,
    targets: RowTargets,
    top_k: SortedTopK | None,
    which: tuple[object, ...],  # the kernel's arguments that say which rows it computes
    flags: Flags,
    segments: Segments,
    result: Forward,
    *,
    mixture_sums: Tensor | None,  # None: not yet; only what ``mixture`` has to know is written
) -> None:
    """Put the segments of the rows together and write their results."""
    N, partials = len(student.x), segments.partials
    block_k, rows_at_a_time, warps = _merge_tile(top_k)
    ids, K, log_p, log_rest, best = partials, 0, partials, partials, partials
    if top_k is not None:
        ids, K = top_k.ids, top_k.ids.shape[1]
        log_p, log_rest, best = top_k.log_p, top_k.log_rest, top_k.best
    *selected, kd_weights = which
    with on_device(student.x.device):
        merge_kernel[(ceil_div(N, rows_at_a_time),)](
            partials, partials if mixture_sums is None else mixture_sums, segments.picked,
            segments.number, segments.length, N, spec.vocab,
            *student.arguments, _target_share(spec),
            ids, log_p, log_rest, best, K, *selected,
            _adjacent(targets.token_weights), kd_weights, targets.soft, targets.class_weight,
            result.loss, result.parts, result.saved, result.inside, result.outside,
            *_numbers(spec),
            ROWS=rows_at_a_time, BLOCK_K=block_k, FINAL=mixture_sums is not None, FLAGS=flags,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


def _merge_tile(top_k: SortedTopK | None) -> tuple[int, int, int]:
    """A power of 2 from K on, and rows and warps of a program: a few rows, fewer beside a top-k
    teacher, whose K ids it holds."""
    if top_k is None:
        return 1, MERGE_NUMBERS, 4
    block_k = power_of_2(top_k.ids.shape[1])
    return block_k, max(1, MERGE_NUMBERS // block_k), max(1, min(4, block_k // 128))


def _mixture(
    spec: LossSpec,
    student: Logits,
    teacher: Logits,
    which: tuple[object, ...],  # the kernel's arguments that say which rows it computes
    saved: Tensor,
    divergence: int,
) -> Tensor:  # [2, segments, N]
    """The sums of a mixture's divergence over each segment, see ``mixture.py``; or each shard."""
    x, V = student.x, spec.width
    N = len(x)
    inv_T, _, beta, *_ = _numbers(spec)
    shape = choose_tile(x.device, "mixture", V, 2)
    segments = ceil_div(V, shape.segment)
    sums = saved.new_empty(2, segments, N)
    if segments > 0:
        mixture_kernel[(N, segments)](
            *student.arguments, *teacher.arguments, _target_share(spec), *which,
            saved, sums, N, V, inv_T, beta,
            BLOCK=shape.block, SEGMENT=shape.segment, **shape.lanes(x, teacher.x),
            DIVERGENCE=divergence, num_warps=shape.warps, enable_fp_fusion=True,
        )  # fmt: skip
    if spec.shard is None:
        return sums
    return gathered(sums.sum(1), spec.shard.group).transpose(0, 1).contiguous()


def gradient(
    spec: LossSpec,
    student: Logits,
    targets: RowTargets,
    teacher: Logits | SortedTopK | None,
    saved: Forward,
    upstream: Tensor,  # [N], or [1] for all rows
    out: Tensor,  # [N, >= V], columns next to each other
) -> None:
    """Write the gradient of ``sum(upstream * loss)`` by the student's logits to ``out``.

    Columns from V on get zeros.
    """
    if out.numel() == 0:
        return
    if spec.objective.kd_weight == 0:  # its logits need not be read
        teacher = None
    for selected_spec, selection in _selections(spec, targets, teacher):
        _gradient(selected_spec, selection, student, targets, teacher, saved, upstream, out)


def _gradient(
    spec: LossSpec,
    selection: Selection,
    student: Logits,
    targets: RowTargets,
    teacher: Logits | SortedTopK | None,
    saved: Forward,
    upstream: Tensor,
    out: Tensor,
) -> None:
    """Write the gradient of the selected rows."""
    N, V = len(student.x), spec.width
    objective = spec.objective
    dense = teacher if isinstance(teacher, Logits) else student
    smoothed = targets.class_weight is not None and objective.label_smoothing > 0
    flags = _flags(spec, teacher)._replace(
        COMPUTE_CE=spec.compute_ce and (objective.ce_weight > 0 or objective.z_loss > 0),
        SMOOTH=smoothed or targets.soft is not None,  # without these it takes the same of all
    )
    # Tiles are those that were timed when every divergence but forward_kl took logarithms.
    more = isinstance(teacher, Logits) and objective.divergence != "forward_kl"
    pressure = _pressure(student, teacher, targets) + more
    shape = choose_tile(student.x.device, "gradient", V, pressure)
    share, groups = _target_share(spec), 0
    if student.shifts is not None:  # whole groups; the teacher's codes are those of the target
        shape, share, groups = shape.of_whole_groups(), None, student.shifts.shape[1]
    top_k = teacher if isinstance(teacher, SortedTopK) else None
    ids, K = (saved.saved, 0) if top_k is None else (top_k.ids, top_k.ids.shape[1])
    if top_k is not None:
        ids = _own_ids(ids, spec)
    width = out.shape[1]
    weights = None if teacher is None else _adjacent(targets.kd_weights)
    with on_device(student.x.device):
        gradient_kernel[(N, ceil_div(width, shape.segment))](
            *student.arguments, *dense.arguments, share, student.shifts, dense.shifts, groups,
            ids, saved.inside, saved.outside, K,
            _adjacent(targets.labels), spec.ignore_index, *selection,
            _adjacent(targets.token_weights), weights, *_soft_arguments(targets),
            _own_classes(targets.class_weight, spec),
            saved.saved, upstream, upstream.stride(0) if len(upstream) == N else 0,
            out, out.stride(0), N, V, width,
            None if spec.shard is None else spec.first, _classes(spec),
            *_numbers(spec),
            BLOCK=shape.block, SEGMENT=shape.segment, FLAGS=flags,
            num_warps=shape.warps, enable_fp_fusion=True,
        )  # fmt: skip


def _adjacent(x: Tensor | None) -> Tensor | None:
    """A number per row, as kernels read it."""
    return None if x is None else x.contiguous()


def _classes(spec: LossSpec) -> int | None:
    """The kernels' argument of that name: None where all columns are here."""
    return None if spec.shard is None else spec.vocab


def _own_ids(ids: Tensor, spec: LossSpec) -> Tensor:
    """A top-k teacher's ids from the first column that is here. PAD_ID stays past the last one."""
    return ids if spec.shard is None else ids - spec.first


def _own_classes(weight: Tensor | None, spec: LossSpec) -> Tensor | None:
    """The weights of classes from the first column that is here."""
    return weight if weight is None or spec.shard is None else weight[spec.first :]


def _soft_arguments(targets: RowTargets) -> tuple[Tensor | None, int]:
    """Labels that are probabilities, of column stride 1, and their row stride."""
    return targets.soft, 0 if targets.soft is None else targets.soft.stride(0)


def _pressure(student: Logits, teacher: Logits | SortedTopK | None, targets: RowTargets) -> int:
    """The register pressure as ``choose_tile`` counts it, without a divergence's logarithms."""
    match teacher:
        case Logits():
            tensors, capped = 2, student.softcap is not None or teacher.softcap is not None
        case SortedTopK():
            tensors, capped = 3, student.softcap is not None
        case None:
            tensors, capped = 1, student.softcap is not None
    tensors += targets.soft is not None
    return tensors + capped


def _numbers(spec: LossSpec) -> tuple[float, ...]:
    """The kernels' run-time numbers in their order, ``inv_T`` to ``kd_scale``."""
    o = spec.objective
    T = float(o.temperature)
    weights = o.label_smoothing, o.ce_weight, o.kd_weight, o.z_loss, o.kd_scale
    return (tile.LOG2_E.value / T, T, float(o.beta), *map(float, weights))


def _target_share(spec: LossSpec) -> float | None:
    """The teacher's share of the target; None: the teacher alone."""
    share = float(spec.objective.teacher_share)
    return None if share == 1 else share


def forward_flags(
    spec: LossSpec, targets: RowTargets, teacher: Logits | SortedTopK | None
) -> Flags:
    """The flags of ``forward``."""
    by_class = targets.labels is not None and spec.objective.label_smoothing > 0
    return _flags(spec, teacher)._replace(
        COMPUTE_CE=spec.compute_ce,
        COMPUTE_METRICS=spec.compute_metrics,
        SMOOTH=spec.compute_ce and (by_class or targets.soft is not None),
    )


def _flags(spec: LossSpec, teacher: Logits | SortedTopK | None) -> Flags:
    """The flags that ``forward`` and ``gradient`` share."""
    objective = spec.objective
    match teacher:
        case Logits():
            kind = rows.DENSE
        case SortedTopK():
            kind = rows.TOP_K
        case None:
            kind = rows.NO_TEACHER
    return Flags(
        TEACHER=kind.value,
        DIVERGENCE=_divergence_code(objective.divergence),
        T_CASE=T_CASES.get(objective.temperature, tile.ANY.value),
        TWO_PASSES=_takes_two_passes(spec, teacher),
    )


def _takes_two_passes(spec: LossSpec, teacher: Logits | SortedTopK | None) -> bool:
    """Whether forward reads the logits twice, as beside a dense teacher only."""
    divergence = DIVERGENCES[spec.objective.divergence]
    return isinstance(teacher, Logits) and divergence.forward_passes == 2


def _divergence_code(divergence: str) -> int:
    if divergence not in tile.DIVERGENCE_CODES:
        raise missing(divergence, "impl='triton' (sad_kernels/_triton/tile.py)")
    return tile.DIVERGENCE_CODES[divergence]


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up; Triton's own takes 20 microseconds, because it serves kernels too."""
    return -(-a // b)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context with ``device`` current: Triton launches there, whatever device tensors are on."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
