"""Distillation from logits: the divergences, and CE + KD jointly."""

from __future__ import annotations

from torch import Tensor

from sad_kernels import _check
from sad_kernels._dispatch import resolve_impl
from sad_kernels._reduce import Leading, count_valid, distill_output, reduce_rows
from sad_kernels._statistics import Task
from sad_kernels._tiles import logit_tiles
from sad_kernels._torch import Side, row_losses, teacher_side
from sad_kernels.objective import (
    DistillOutput,
    Divergence,
    Objective,
    Teacher,
    TeacherLogits,
)


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    scale_t2: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    _check.require_rows("student_logits", student_logits)
    teacher = TeacherLogits(teacher_logits, valid_vocab)
    _check.require_teacher(teacher, student_logits, "student_logits")
    if labels is not None:
        _check.require_labels(labels, student_logits, "student_logits")
    _check.require_int("ignore_index", ignore_index)
    _check.require_reduction(reduction)
    vocab = _check.common_vocab(student_logits.shape[-1], valid_vocab, teacher)
    objective = Objective(
        temperature=temperature, divergence=divergence, beta=beta, scale_t2=scale_t2
    )
    resolve_impl(impl, student_logits, teacher_logits)

    leading = Leading(student_logits)
    y = leading.flat(labels)
    rows = row_losses(
        Task(objective, vocab, classes=False, diagnostics=False),
        Side(leading.rows(student_logits)),
        y,
        teacher_side(teacher, leading),
        ignore_index=ignore_index,
        shape=logit_tiles(vocab),
    )
    return reduce_rows(rows.loss, count_valid(y, ignore_index, rows.loss), reduction, leading)


def distill_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher: Teacher | None,
    objective: Objective,
    *,
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> DistillOutput:
    _check.require_rows("student_logits", student_logits)
    _check.require_labels(labels, student_logits, "student_logits")
    _check.require_teacher(teacher, student_logits, "student_logits")
    _check.require_objective(objective, teacher)
    _check.require_num_items(num_items, student_logits, "student_logits")
    _check.require_int("ignore_index", ignore_index)
    vocab = _check.common_vocab(student_logits.shape[-1], None, teacher)
    resolve_impl(impl, student_logits, labels)

    leading = Leading(student_logits)
    y = leading.flat(labels)
    rows = row_losses(
        Task(objective, vocab, classes=True, diagnostics=True),
        Side(leading.rows(student_logits)),
        y,
        teacher_side(teacher, leading),
        ignore_index=ignore_index,
        shape=logit_tiles(vocab),
    )
    return distill_output(rows, count_valid(y, ignore_index, rows.loss), num_items)
