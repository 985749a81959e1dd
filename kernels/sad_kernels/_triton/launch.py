"""From tensors to launches: tiles, warps and grids of the kernels over rows.

Tiles are fixed tables. Nothing is tuned at run time, so that two runs sum in the same order, and a
launch costs no search.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._divergence import teacher_outcomes
from sad_kernels._rows import LossSpec
from sad_kernels._triton import rows, tile
from sad_kernels._triton.gradient import gradient_kernel
from sad_kernels._triton.merge import merge_kernel
from sad_kernels._triton.mixture import mixture_kernel
from sad_kernels._triton.statistics import statistics_kernel
from sad_kernels.objective import MIXTURES, Divergence, Tail

SEGMENT = 16384
"""Columns that one program sums up. 256 rows of 128256 columns make 2048 programs."""

MERGE_NUMBERS = 128  # rows, or rows times ids, that one program of ``merge`` holds

DIVERGENCES: dict[Divergence, int] = {
    "forward_kl": tile.FORWARD_KL.value,
    "reverse_kl": tile.REVERSE_KL.value,
    "jsd": tile.JSD.value,
    "skew_forward_kl": tile.SKEW_FORWARD_KL.value,
    "skew_reverse_kl": tile.SKEW_REVERSE_KL.value,
}


T_CASES = {1.0: tile.ONE.value, 2.0: tile.TWO.value}


VECTOR_BYTES = 16  # the widest load of one thread
THREADS_PER_WARP = 64 if torch.version.hip else 32


class Tile(NamedTuple):
    """Columns at a time, the columns of one program (a multiple), and its warps."""

    block: int
    segment: int
    warps: int

    def lanes(self, *logits: Tensor) -> dict[str, int]:
        """Columns that a thread loads at once, and the threads that hold different ones.

        As Triton lays out the tiles of all that is read, so that a lane's sum stays within a thread
        and equal logits of two dtypes are summed in the same order.
        """
        vector = min(self.block, VECTOR_BYTES // min(x.element_size() for x in logits))
        return {
            "VECTOR": vector,
            "LANES": min(self.block // vector, THREADS_PER_WARP * self.warps),
        }


def choose_tile(kernel: str, vocab: int, pressure: int, *, ids: bool = False) -> Tile:
    """The one place where tiles are chosen.

    ``pressure`` counts what occupies registers: each tensor read, a softcap, a divergence that
    needs logarithms, and two for a top-k teacher. With ``ids`` of such a teacher to look for a
    program takes twice the columns, as it does for a gradient, which is written and not summed, so
    that few programs are as good as many. These tiles are the fastest on an H200 with 8192 rows, or
    within 2 % of it, a quarter faster than larger segments with 256, and spill in no loop; with two
    tensors only small programs keep enough resident. Times are in ``bench/LOG.md`` and come from
    ``python -m bench tiles``; what each kernel takes on sm_80 to sm_120 and gfx942 is in
    ``tests/contracts/budgets.json``.
    """
    match kernel:
        case "statistics":
            block, warps = (2048, 4) if pressure == 1 else (512, 1)
        case "gradient":
            block, warps = {1: (2048, 8), 2: (2048, 4)}.get(pressure, (1024, 4))
        case _:  # terms
            block, warps = 2048, 4
    block = min(block, max(128, power_of_2(vocab)))
    most = block // (8 * THREADS_PER_WARP)  # 16 bytes of 16-bit logits per thread
    segment = 2 * SEGMENT if ids or kernel == "gradient" else SEGMENT
    return Tile(block, segment, warps=max(1, min(warps, most)))


@dataclass(frozen=True)
class Logits:
    """Rows of one model: logits, or products that bias, scale and softcap make logits."""

    x: Tensor  # [N, >= V], columns next to each other
    bias: Tensor | None = None  # [>= V]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def arguments(self) -> tuple[object, ...]:
        bias = self.x if self.bias is None else self.bias
        return self.x, self.x.stride(0), bias, float(self.scale), float(self.softcap or 1.0)

    def flags(self, side: str) -> dict[str, bool]:
        return {
            f"{side}_BIAS": self.bias is not None,
            f"{side}_SCALE": self.scale != 1,
            f"{side}_CAP": self.softcap is not None,
        }


@dataclass(frozen=True)
class SortedTopK:
    """A teacher's ids in ascending order, and its log-probabilities there and everywhere else."""

    ids: Tensor  # [N, K] int32; rows.PAD_ID is padding
    log_p: Tensor  # [N, K]
    log_rest: Tensor  # [N]
    best: Tensor  # [N] int64

    @classmethod
    def prepare(cls, ids: Tensor, log_probs: Tensor, tail: Tail, vocab: int) -> SortedTopK:
        """Sort the ids of each row, so that a tile finds its own in one stretch."""
        log_p = log_probs.float()
        best = ids.gather(1, log_p.argmax(1, keepdim=True)).squeeze(1).long()
        present = log_p != -torch.inf
        ids = ids.long().clamp(-1, rows.PAD_ID.value - 1).where(present, rows.PAD_ID.value)
        ids, order = ids.sort(dim=1, stable=True)
        log_p, log_rest = teacher_outcomes(log_p.gather(1, order), tail, vocab)
        return cls(ids.int(), log_p, log_rest, best)


class Forward(NamedTuple):
    """Row losses, and what the gradient needs of the rows."""

    loss: Tensor  # [N]
    parts: Tensor  # [6, N]: ce, kd, z, correct, agree, entropy
    saved: Tensor  # [SAVED, N]
    inside: Tensor  # [N, K], of a top-k teacher
    outside: Tensor  # [N]


def forward(
    spec: LossSpec, student: Logits, labels: Tensor | None, teacher: Logits | SortedTopK | None
) -> Forward:
    """All losses of all rows: one reading of the logits, for a mixture a second."""
    x, V = student.x, spec.vocab
    N = len(x)
    empty = x.new_empty(0, dtype=torch.float32)
    top_k = teacher if isinstance(teacher, SortedTopK) else None
    result = Forward(
        loss=empty.new_empty(N),
        parts=empty.new_empty(rows.PARTS, N),
        saved=empty.new_empty(rows.SAVED, N),
        inside=empty.new_empty((0, 0) if top_k is None else top_k.ids.shape),
        outside=empty.new_empty(0 if top_k is None else N),
    )
    if N == 0:
        return result
    kind, flags, dense = _teacher(spec, student, labels, teacher)
    objective, numbers, share = spec.objective, _numbers(spec), float(spec.objective.teacher_share)
    mixture = kind == rows.DENSE.value and objective.divergence in MIXTURES
    flags |= {"COMPUTE_CE": spec.compute_ce, "COMPUTE_METRICS": spec.compute_metrics}
    flags |= {"SMOOTH": spec.compute_ce and objective.label_smoothing > 0}

    pressure = _pressure(student, dense, teacher)
    shape = choose_tile("statistics", V, pressure, ids=top_k is not None)
    segments = ceil_div(V, shape.segment)
    partials = empty.new_empty(rows.PARTIALS, segments, N)
    ids, K = (partials, 0) if top_k is None else (top_k.ids, top_k.ids.shape[1])
    y = partials if labels is None else labels.contiguous()
    with on_device(x.device):
        statistics_kernel[(N, segments)](
            *student.arguments, *dense.arguments, share,
            ids, K, y, spec.ignore_index, partials, N, V, numbers[0],
            BLOCK=shape.block, SEGMENT=shape.segment, **shape.lanes(x, dense.x), **flags,
            **_target_flags(spec, dense), num_warps=shape.warps, enable_fp_fusion=True,
        )  # fmt: skip

    terms = partials
    block_k = 1 if top_k is None else power_of_2(top_k.ids.shape[1])
    rows_at_a_time = max(1, MERGE_NUMBERS // block_k)

    def merge(*, final: bool) -> None:
        log_p, log_rest, best = (
            (partials,) * 3 if top_k is None else (top_k.log_p, top_k.log_rest, top_k.best)
        )
        merge_kernel[(ceil_div(N, rows_at_a_time),)](
            partials, terms, segments, shape.segment, N, V, *student.arguments,
            ids, log_p, log_rest, best, K, y, spec.ignore_index,
            result.loss, result.parts, result.saved, result.inside, result.outside,
            *numbers,
            ROWS=rows_at_a_time, BLOCK_K=block_k, FINAL=final, HAS_MIXTURE=mixture and final,
            **flags, num_warps=4 if top_k is None else max(1, min(4, block_k // 128)),
            enable_fp_fusion=True,
        )  # fmt: skip

    with on_device(x.device):
        if mixture:
            merge(final=False)
            terms = _terms(spec, student, dense, y, result.saved, flags)
        merge(final=True)
    return result


def _terms(
    spec: LossSpec,
    student: Logits,
    teacher: Logits,
    y: Tensor,
    saved: Tensor,
    flags: dict[str, object],
) -> Tensor:
    N, V = len(student.x), spec.vocab
    (inv_T, _, beta, *_), share = _numbers(spec), float(spec.objective.teacher_share)
    shape = choose_tile("terms", V, 2)
    segments = ceil_div(V, shape.segment)
    terms = saved.new_empty(2, segments, N)
    needed = ("HAS_LABELS", "DIVERGENCE", "S_BIAS", "S_SCALE", "S_CAP")
    mixture_kernel[(N, segments)](
        *student.arguments, *teacher.arguments, share, y, spec.ignore_index,
        saved, terms, N, V, inv_T, beta,
        BLOCK=shape.block, SEGMENT=shape.segment, **shape.lanes(student.x, teacher.x),
        **{name: flags[name] for name in needed}, **_target_flags(spec, teacher),
        num_warps=shape.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return terms


def gradient(
    spec: LossSpec,
    student: Logits,
    labels: Tensor | None,
    teacher: Logits | SortedTopK | None,
    saved: Forward,
    upstream: Tensor,  # [N], or [1] for all rows
    out: Tensor,  # [N, >= V], columns next to each other
) -> None:
    """Write the gradient of ``sum(upstream * loss)`` by the student's logits, past V zeros."""
    N, V = len(student.x), spec.vocab
    if N == 0:
        return
    objective, numbers, share = spec.objective, _numbers(spec), float(spec.objective.teacher_share)
    if objective.kd_weight == 0:
        teacher = None
    _, flags, dense = _teacher(spec, student, labels, teacher)
    logarithms = dense is not student and objective.divergence != "forward_kl"
    pressure = _pressure(student, dense, teacher) + logarithms
    shape = choose_tile("gradient", V, pressure)
    top_k = teacher if isinstance(teacher, SortedTopK) else None
    ids, K = (saved.saved, 0) if top_k is None else (top_k.ids, top_k.ids.shape[1])
    y = saved.saved if labels is None else labels.contiguous()
    width = out.shape[1]
    flags |= {"HAS_CE": spec.compute_ce and (objective.ce_weight > 0 or objective.z_loss > 0)}
    with on_device(student.x.device):
        gradient_kernel[(N, ceil_div(width, shape.segment))](
            *student.arguments, *dense.arguments, share,
            ids, saved.inside, saved.outside, K, y, spec.ignore_index,
            saved.saved, upstream, upstream.stride(0) if len(upstream) == N else 0,
            out, out.stride(0), N, V, width,
            *numbers,
            BLOCK=shape.block, SEGMENT=shape.segment, **flags, **_target_flags(spec, dense),
            num_warps=shape.warps, enable_fp_fusion=True,
        )  # fmt: skip


def _pressure(student: Logits, dense: Logits, teacher: Logits | SortedTopK | None) -> int:
    """What ``choose_tile`` counts, but for the logarithms of a divergence."""
    capped = student.softcap is not None or dense.softcap is not None
    return 1 + capped + (2 if isinstance(teacher, SortedTopK) else teacher is not None)


def _numbers(spec: LossSpec) -> tuple[float, ...]:
    """Run-time numbers, in the kernels' order."""
    o = spec.objective
    T = float(o.temperature)
    weights = o.label_smoothing, o.ce_weight, o.kd_weight, o.z_loss, o.kd_scale
    return (tile.LOG2_E.value / T, T, float(o.beta), *map(float, weights))


def _teacher(
    spec: LossSpec, student: Logits, labels: Tensor | None, teacher: Logits | SortedTopK | None
) -> tuple[int, dict[str, object], Logits]:
    """Its kind, the flags that all kernels share, and what stands for its logits."""
    kind = rows.NO_TEACHER
    if isinstance(teacher, Logits):
        kind = rows.DENSE
    elif teacher is not None:
        kind = rows.TOP_K
    objective = spec.objective
    flags: dict[str, object] = {
        "T_CASE": T_CASES.get(objective.temperature, tile.ANY.value),
        "DIVERGENCE": DIVERGENCES[objective.divergence],
        "TEACHER": kind.value,
        "HAS_LABELS": labels is not None,
    }
    dense = teacher if isinstance(teacher, Logits) else student
    return kind.value, flags | student.flags("S"), dense


def _target_flags(spec: LossSpec, teacher: Logits) -> dict[str, bool]:
    return teacher.flags("T") | {"T_MIXED": spec.objective.teacher_share != 1}


# Triton's own take 20 microseconds each: they serve inside kernels too.


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors say."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
