"""Losses from hidden states and a head, slice by slice of the vocabulary: never N x V logits."""

from __future__ import annotations

from torch import Tensor

from sad_kernels import _check
from sad_kernels._dispatch import resolve_impl
from sad_kernels._reduce import Leading, count_valid, distill_output, reduce_rows
from sad_kernels._statistics import RowResults, Task
from sad_kernels._torch import Side, head_tiles, row_losses, teacher_side
from sad_kernels.objective import DistillOutput, Head, Objective, Teacher


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> Tensor:
    head = Head(weight, bias, logit_scale, softcap, valid_vocab)
    objective = Objective(
        ce_weight=1.0, kd_weight=0.0, label_smoothing=label_smoothing, z_loss=z_loss
    )
    _check.require_reduction(reduction)
    leading, rows, num_tokens = _linear(
        hidden, head, labels, None, objective, False, ignore_index, chunk_bytes, impl
    )
    return reduce_rows(rows.loss, num_tokens, reduction, leading)


def linear_distill_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    objective: Objective,
    *,
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> DistillOutput:
    _check.require_rows("hidden", hidden)
    _check.require_num_items(num_items, hidden, "hidden")
    _, rows, num_tokens = _linear(
        hidden, head, labels, teacher, objective, True, ignore_index, chunk_bytes, impl
    )
    return distill_output(rows, num_tokens, num_items)


def _linear(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    objective: Objective,
    diagnostics: bool,
    ignore_index: int,
    chunk_bytes: int | None,
    impl: str,
) -> tuple[Leading, RowResults, Tensor]:
    _check.require_rows("hidden", hidden)
    _check.require_head(head, hidden)
    _check.require_labels(labels, hidden, "hidden")
    _check.require_teacher(teacher, hidden, "hidden")
    _check.require_objective(objective, teacher)
    _check.require_int("ignore_index", ignore_index)
    _check.require_chunk_bytes(chunk_bytes)
    vocab = _check.common_vocab(head.weight.shape[0], head.valid_vocab, teacher)
    resolve_impl(impl, hidden, head.weight, labels)

    leading = Leading(hidden)
    y = leading.flat(labels)
    student = Side(
        leading.rows(hidden), head.weight, head.bias, float(head.logit_scale), head.softcap
    )
    teacher_ = teacher_side(teacher, leading)
    rows = row_losses(
        Task(objective, vocab, classes=True, diagnostics=diagnostics),
        student,
        y,
        teacher_,
        ignore_index=ignore_index,
        shape=head_tiles(student, teacher_, objective, chunk_bytes),
    )
    return leading, rows, count_valid(y, ignore_index, rows.loss)
