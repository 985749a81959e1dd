"""How a run's teacher answers: as it is, with gates that learn, or several times.

=========================  ======================================================================
``routing.mode``           the student's targets
=========================  ======================================================================
teacher                    the frozen teacher's
student_aware              of all experts, mixed by gates that learn what this student can follow,
                           once per window, before the student does
knowledge_augmentation     of several passes in which other experts have their say
=========================  ======================================================================

The last two take a mixture-of-experts teacher: see ``sad.teachers.routing``. Evaluation scores
against the teacher as it answers in training, except that a single pass of its own routing stands
for ``knowledge_augmentation``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sad.config.schema import DistillConfig
from sad.data.batch import Batch, LossCounts
from sad.losses.capture import Capture
from sad.models.experts import all_experts, require_callable, require_moe
from sad.models.heads import eval_no_grad, split_head, with_valid_vocab
from sad.teachers.frozen import FrozenTeacher, TeacherOutput
from sad.teachers.routing import StudentAwareRouter, augmented

if TYPE_CHECKING:
    from sad.training.student import StudentWithLoss


class TeacherPolicy:
    """The frozen teacher as it is; the others refine it. It owns state that checkpoints hold."""

    def __init__(self, teacher: FrozenTeacher) -> None:
        self.teacher = teacher

    def prepare(
        self, batches: Callable[[], Iterable[Batch]], student: StudentWithLoss, counts: LossCounts
    ) -> None:
        """Called before a window's first micro-batch; ``batches`` are all of the window's."""

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        """The targets of a micro-batch in training."""
        return self.teacher.forward(batch, capture)

    def scoring(self) -> AbstractContextManager[object]:
        """Within, the bare teacher answers as evaluation wants it."""
        return nullcontext()

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and named tensors."""
        return {}, {}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from there, bit for bit."""


class StudentAwarePolicy(TeacherPolicy):
    """Gates first, then the student: alternating steps (arXiv 2502.12947)."""

    def __init__(self, config: DistillConfig, teacher: FrozenTeacher, valid_vocab: int) -> None:
        super().__init__(teacher)
        self.router = StudentAwareRouter(
            teacher.model,
            valid_vocab,
            learning_rate=config.routing.learning_rate,
            device=teacher.device,
            balance_weight=config.routing.balance_weight,
            chunk_bytes=config.chunk_bytes,
            impl=config.impl,
        )

    def prepare(
        self, batches: Callable[[], Iterable[Batch]], student: StudentWithLoss, counts: LossCounts
    ) -> None:
        if not counts.targets:  # momentum and the balance would move the gates all the same
            return
        _, head = split_head(student.model)
        head = with_valid_vocab(head, student.valid_vocab)
        for batch in batches():
            with eval_no_grad(
                student
            ):  # without dropout, without a gradient, without a random draw
                hidden = student.hidden(batch)
            self.router.backward(batch, hidden, head, counts)
        self.router.step()

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        with all_experts(self.teacher.model):
            return super().forward(batch, capture)

    def scoring(self) -> AbstractContextManager[object]:
        return all_experts(self.teacher.model)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state = self.router.state_dict()
        return {"optimizer": state["optimizer"]}, state["tensors"]

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if state:  # none: routing was another, and the configuration was allowed to change
            self.router.load_state_dict({**state, "tensors": tensors})


class AugmentedPolicy(TeacherPolicy):
    """Several passes per micro-batch, each with some experts that the gates would not choose."""

    def __init__(self, config: DistillConfig, teacher: FrozenTeacher) -> None:
        super().__init__(teacher)
        for block in require_moe(teacher.model, "routing.mode knowledge_augmentation").values():
            require_callable(block)
        self.passes, self.explore = config.routing.passes, config.routing.explore
        self.generator = torch.Generator().manual_seed(config.seed)

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        passes = []
        for i in range(self.passes):
            with augmented(self.teacher.model, self.generator, probability=self.explore):
                passes.append(self.teacher.forward(batch, None if i else capture))
        targets = tuple(target for seen in passes for target in seen.targets)
        return TeacherOutput(targets, passes[0].activations)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if "generator" in tensors:
            self.generator.set_state(tensors["generator"].clone())


def build_teacher_policy(
    config: DistillConfig, teacher: FrozenTeacher | None, valid_vocab: int
) -> TeacherPolicy | None:
    """What ``routing.mode`` asks for; ``UnfitError`` for a teacher that has no experts."""
    if teacher is None:
        return None
    match config.routing.mode:
        case "student_aware":
            return StudentAwarePolicy(config, teacher, valid_vocab)
        case "knowledge_augmentation":
            return AugmentedPolicy(config, teacher)
        case _:
            return TeacherPolicy(teacher)
