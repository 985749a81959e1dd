"""Losses of logits in the torch path: the entry points that ``ce.py`` and ``kd.py`` call."""

from __future__ import annotations

from torch import Tensor

from sad_kernels._rows import (
    LogitTransform,
    LossSpec,
    RowLayout,
    RowResults,
    RowTargets,
    count_valid,
    distill_output,
    divisor_of,
)
from sad_kernels._tiles import logit_tiles, outcome_tiles
from sad_kernels._torch.operators import loss_inputs, row_results
from sad_kernels._torch.problem import ModelInput, teacher_input
from sad_kernels.objective import DistillOutput, Teacher


def row_losses_from_logits(
    spec: LossSpec,
    logits: Tensor,  # [N, >= V]
    transform: LogitTransform,
    targets: RowTargets,
    teacher: Teacher | None,
    layout: RowLayout,
) -> RowResults:
    """The loss of every row, differentiable by the logits, and its parts, detached."""
    student = ModelInput(logits, transform=transform)
    shape = outcome_tiles(spec.column_counts) if spec.num_outcomes else logit_tiles(spec.widest)
    inputs = loss_inputs(spec, student, targets, teacher_input(teacher, layout), shape)
    return row_results(inputs)


def mean_loss_from_logits(
    spec: LossSpec,
    logits: Tensor,
    transform: LogitTransform,
    targets: RowTargets,
    teacher: Teacher | None,
    layout: RowLayout,
    items: int | Tensor | None = None,
) -> DistillOutput:
    """``loss``: sum of row losses / max(items, 1), differentiable by the logits.

    Items are the rows that count, unless given. The other fields are as in ``DistillOutput``.
    """
    rows = row_losses_from_logits(spec, logits, transform, targets, teacher, layout)
    num_tokens = count_valid(targets.labels, spec.ignore_index, logits)
    loss = rows.loss.sum() / divisor_of(num_tokens, items)
    return distill_output(loss, rows, num_tokens, layout)
