"""Logits as codes: which losses take them, and what is launched for a block of rows.

Where ``launch.py`` gets whole rows of fp32 logits, here every product is made a slab at a time and
becomes codes at once (``compress.py``). ``fold`` puts the groups of a row together; ``merge`` and
``gradient`` do what they always do. The gradient is written over the student's codes, so that a
number of either takes 2 bytes, and more rows share one product for dweight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sad_kernels import _tiles
from sad_kernels._rows import LossSpec, RowTargets
from sad_kernels._tiles import (
    COMPACT_CHUNK_BYTES,
    STUDENT_SUMS,
    TEACHER_SUMS,
    ChunkRows,
    compact_rows,
    has_codes,
    num_groups,
    pitch,
)
from sad_kernels._triton import launch
from sad_kernels._triton.compress import student_codes_kernel, teacher_codes_kernel
from sad_kernels._triton.fold import fold_groups_kernel
from sad_kernels._triton.gemm import HiddenWithHead
from sad_kernels._triton.launch import Block, Logits, Segments, SortedTopK, ceil_div, on_device
from sad_kernels._triton.shards import KINDS
from sad_kernels._triton.tile import LOG2_E
from sad_kernels._triton.tile_sizes import choose_tile, power_of_2

FOLD_NUMBERS = 2048  # of one kind that a program of ``fold`` holds: groups times rows
FOLD_WARPS = 8


def takes_codes(
    spec: LossSpec,
    student: HiddenWithHead,
    targets: RowTargets,
    teacher: HiddenWithHead | Logits | SortedTopK | None,
) -> bool:
    """Whether the logits of these models can be codes; what cannot takes fp32 logits."""
    kind = None if teacher is None else "hidden" if isinstance(teacher, HiddenWithHead) else "other"
    return (
        has_codes(student.hidden.dtype.itemsize, kind, spec.objective.divergences)
        and spec.width > 0
        # The softcap's derivative, 1 - (z/cap)^2, would lose its digits near the cap.
        and student.softcap is None
        # Sums by outcome, by class and of shards, and a choice of divergences by row, are made by
        # kernels that read logits.
        and (targets.outcomes is None and targets.class_weight is None)
        and (targets.other_rows is None and spec.shard is None)
        # Not tried outside these. At T = 64 a distance of 8192, which counts as inf, is e^-128.
        and 0.25 <= spec.objective.temperature <= 64
    )


class CodedRows:
    """Rows of logits as codes: those of one block at a time, like ``chunks.WholeRows``."""

    def __init__(
        self,
        spec: LossSpec,
        student: HiddenWithHead,
        targets: RowTargets,
        teacher: HiddenWithHead | Logits | SortedTopK | None,
        most: int,  # rows of a block
    ) -> None:
        assert teacher is None or isinstance(teacher, HiddenWithHead)
        self.spec, self.student, self.teacher = spec, student, teacher
        V, new = spec.width, student.hidden.new_empty
        self.slab = new(most, min(pitch(V), _tiles.SLAB_COLUMNS), dtype=torch.float32)
        if teacher is not None:
            self.teacher_codes = new(most, pitch(V), dtype=torch.int16)[:, :V]

    @staticmethod
    def sizes(
        spec: LossSpec,
        student: HiddenWithHead,
        teacher: HiddenWithHead | Logits | SortedTopK | None,
        chunk_bytes: int | None,
    ) -> ChunkRows:
        """The most rows of a block and of a chunk."""
        budget = COMPACT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        return compact_rows(spec.width, 1 if teacher is None else 2, budget)

    def forward(self, rows: slice, y: RowTargets, out: Tensor) -> Block:
        """The losses of some rows, whose codes are written to ``out``, where their gradient is to
        overwrite them."""
        spec, V = self.spec, self.spec.width
        N, groups, new = len(out), num_groups(V), self.slab.new_empty
        s = Logits(out.view(torch.int16)[:, :V], shifts=new(N, groups))
        t = None
        if self.teacher is not None:
            t = Logits(self.teacher_codes[:N], shifts=new(N, groups))
        flags = launch.forward_flags(spec, y, t)
        labels, kd_weights = (
            None if x is None else x.contiguous() for x in (y.labels, y.kd_weights)
        )
        if t is None:
            kd_weights = None
        which = labels, spec.ignore_index
        inv_T = LOG2_E.value / float(spec.objective.temperature)

        sums = new(STUDENT_SUMS, groups, N)
        codes = s.x, s.x.stride(0), sums
        for columns, x, how in self._slabs(self.student, rows, 1):
            student_codes_kernel[how.grid](
                x, x.stride(0), *_transforms(self.student), *codes,
                *which, columns.start, columns.stop, N, groups, inv_T,
                FLAGS=flags, **how.options,
            )  # fmt: skip
        t_codes = codes
        if self.teacher is not None and t is not None:
            t_codes = t.x, t.x.stride(0), new(TEACHER_SUMS, groups, N)
            share = float(spec.objective.teacher_share)
            for columns, x, how in self._slabs(self.teacher, rows, 2):
                teacher_codes_kernel[how.grid](
                    x, x.stride(0), *_transforms(self.teacher), None if share == 1 else share,
                    *codes, *t_codes,
                    *which, kd_weights, columns.start, columns.stop, N, groups, inv_T,
                    FLAGS=flags, **how.options,
                )  # fmt: skip

        result, folded, picked = launch.empty_forward(s, t), new(KINDS, 1, N), new(1, N)
        at_a_time = max(1, FOLD_NUMBERS // power_of_2(groups))
        with on_device(out.device):
            fold_groups_kernel[(ceil_div(N, at_a_time),)](
                *codes, *t_codes, *which, kd_weights, s.shifts, s.shifts if t is None else t.shifts,
                folded, picked, N, V, groups, inv_T,
                ROWS=at_a_time, GROUPS=power_of_2(groups), FLAGS=flags,
                num_warps=FOLD_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        row_arguments = *which, None, 0, kd_weights  # no choice of a divergence by row
        segments = Segments(folded, 1, V, picked)
        launch.merge(spec, s, y, None, row_arguments, flags, segments, result, mixture_sums=folded)
        return Block(result, s, t)

    def _slabs(
        self, side: HiddenWithHead, rows: slice, pressure: int
    ) -> Iterator[tuple[slice, Tensor, Launch]]:
        """The products of some rows, a slab at a time, with the device current: their columns,
        the slab, and the launch that makes codes of it before the next one."""
        V, width = self.spec.width, _tiles.SLAB_COLUMNS
        for first in range(0, V, width):
            columns = slice(first, min(first + width, V))
            x = side.products(rows, columns, self.slab)
            shape = choose_tile(x.device, "compress", x.shape[1], pressure).of_whole_groups()
            options = {"BLOCK": shape.block, "num_warps": shape.warps, "enable_fp_fusion": True}
            with on_device(x.device):
                yield columns, x, Launch((len(x), ceil_div(x.shape[1], shape.block)), options)


class Launch(NamedTuple):
    grid: tuple[int, int]
    options: dict[str, Any]


def _transforms(side: HiddenWithHead) -> tuple[object, ...]:
    """Bias, scale and softcap as kernels take them."""
    return Logits(side.hidden, side.bias, side.scale, side.softcap).arguments[2:]
