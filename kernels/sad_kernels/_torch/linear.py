"""Losses of hidden states and a head in the torch path: what ``linear.py`` calls."""

from __future__ import annotations

import torch
from torch import Tensor

from sad_kernels._rows import LossSpec, RowLayout, RowResults, RowTargets, arithmetic_dtype
from sad_kernels._tiles import (
    DEFAULT_CHUNK_BYTES,
    HeadBudget,
    TileShape,
    head_budget,
    head_tiles,
    outcome_rows,
    whole_rows,
)
from sad_kernels._torch.operators import (
    LossInputs,
    loss_inputs,
    mean_with_gradients,
    row_results,
)
from sad_kernels._torch.problem import ModelInput, TopKInput, head_input, teacher_input
from sad_kernels._torch.sources import splits_products
from sad_kernels.objective import Head, Teacher


def mean_loss(
    spec: LossSpec,
    hidden: Tensor,  # [N, D]
    head: Head,
    targets: RowTargets,
    teacher: Teacher | None,
    layout: RowLayout,
    items: Tensor,  # []
    chunk_bytes: int | None,
) -> tuple[Tensor, RowResults]:
    """``sum of row losses / items``, differentiable, and the row losses and parts, detached.

    Gradients that are wanted are made in forward, with logits of whole rows, if enough of these fit
    ``chunk_bytes``; those of fp16 are not, because what they are multiplied by in backward decides
    what of them is above 0.
    """
    inputs, at_a_time = _inputs(spec, hidden, head, targets, teacher, layout, chunk_bytes)
    want = [
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (hidden, head.weight, head.bias)
    ]
    if not any(want) or at_a_time == 0 or hidden.dtype == torch.float16:
        rows = row_results(inputs)
        return rows.loss.sum() / items, rows
    return mean_with_gradients(inputs, items, want, at_a_time)


def row_losses_from_hidden(
    spec: LossSpec,
    hidden: Tensor,
    head: Head,
    targets: RowTargets,
    teacher: Teacher | None,
    layout: RowLayout,
    chunk_bytes: int | None,
) -> RowResults:
    """The loss of every row, differentiable, and its parts, detached."""
    inputs, _ = _inputs(spec, hidden, head, targets, teacher, layout, chunk_bytes)
    return row_results(inputs)


def _inputs(
    spec: LossSpec,
    hidden: Tensor,
    head: Head,
    targets: RowTargets,
    teacher: Teacher | None,
    layout: RowLayout,
    chunk_bytes: int | None,
) -> tuple[LossInputs, int]:
    """The operators' common inputs, and how many whole rows of logits fit at a time."""
    student, other = head_input(hidden, head), teacher_input(teacher, layout)
    rows, shape = pieces_of(spec, student, other, chunk_bytes)
    return loss_inputs(spec, student, targets, other, shape), rows


def pieces_of(
    spec: LossSpec,
    student: ModelInput,
    teacher: ModelInput | TopKInput | None,
    chunk_bytes: int | None,
) -> tuple[int, TileShape]:
    """How many whole rows of logits fit at a time, 0 where these are too few; and the tiles by
    which the logits are made otherwise."""
    size = DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    numbers, N = size // arithmetic_dtype(student.x).itemsize, len(student.x)
    budget = _budget(spec, student, teacher)
    if spec.num_outcomes:
        shape = outcome_rows(N, spec.column_counts, numbers, budget)
        return shape.rows, shape
    tiles = head_tiles(N, spec.widest, numbers, budget)
    return whole_rows(N, spec.widest, numbers, budget), tiles


def _budget(
    spec: LossSpec, student: ModelInput, teacher: ModelInput | TopKInput | None
) -> HeadBudget:
    assert student.weight is not None
    made = isinstance(teacher, ModelInput) and teacher.weight is not None
    dtype = arithmetic_dtype(student.x)
    weights = [student.weight, *([teacher.weight] if made else [])]  # pyright: ignore
    splits = splits_products(student.x, student.weight)
    copied = 0 if spec.shard is None else 1 + isinstance(teacher, ModelInput)
    if made:
        splits = splits and splits_products(teacher.x, teacher.weight)  # pyright: ignore
    return head_budget(
        student_width=student.x.shape[1],
        teacher_width=teacher.x.shape[1] if made else 0,  # pyright: ignore
        converts=any(w.dtype != dtype for w in weights),  # pyright: ignore
        splits=splits,
        dense=isinstance(teacher, ModelInput),
        divergences=spec.objective.divergences,
        copied=copied,
    )
