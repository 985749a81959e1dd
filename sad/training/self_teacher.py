"""The student as its own teacher: its averaged weights, or the model under its adapters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from sad_kernels import TeacherHidden

from sad.config.schema import DistillConfig
from sad.data.batch import Batch
from sad.ema import ModelEMA
from sad.losses.capture import Capture
from sad.models.adapters import without_adapters
from sad.models.heads import eval_no_grad, split_head, with_valid_vocab
from sad.teachers.frozen import TeacherOutput
from sad.training.student import StudentWithLoss


class SelfTeacher:
    """A ``Teacher`` that is the student under other weights: ``weights()`` is a context in which it
    has them. No second model is there but a copy of the head, for as long as an answer is."""

    model = None

    def __init__(
        self, student: StudentWithLoss, weights: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._student, self._weights = student, weights

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput[TeacherHidden]:
        """The answer to a batch, in eval mode and without gradients."""
        assert capture is None, "structural losses compare two models"
        student = self._student
        with eval_no_grad(student), self._weights():
            hidden = student.hidden(batch)
            head = with_valid_vocab(split_head(student.model)[1], student.valid_vocab)
            # Outside of the context the weight is the student's own again.
            bias = None if head.bias is None else head.bias.clone()
            head = replace(head, weight=head.weight.clone(), bias=bias)
        return TeacherOutput((TeacherHidden(hidden, head),))

    def release(self) -> None:
        """Nothing is held."""


def build_self_teacher(
    config: DistillConfig, student: StudentWithLoss, ema: ModelEMA | None
) -> SelfTeacher | None:
    """The teacher that ``self_teacher`` names; None without the key."""
    match config.self_teacher:
        case "ema":
            assert ema is not None
            return SelfTeacher(student, ema.swapped)
        case "base":
            return SelfTeacher(student, lambda: without_adapters(student.model))
        case None:
            return None
