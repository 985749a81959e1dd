"""Teacher policies: which forward passes of the frozen teacher become the student's targets.

=========================  ======================================================================
``routing.mode``           the student's targets
=========================  ======================================================================
teacher                    one pass of the teacher as it is
student_aware              one pass with all experts active, mixed by gates that are trained, once
                           per window and before the student, towards what this student can follow
knowledge_augmentation     several passes, each with some experts that the gates would not choose
=========================  ======================================================================

The last two take a mixture-of-experts teacher: see ``sad.teachers.routing``. Evaluation scores
against the teacher as it answers in training, except that a single pass of its own routing stands
for ``knowledge_augmentation``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, assert_never

import torch

from sad.checkpoint.state import check_generator, tensors_like
from sad.config.schema import DistillConfig
from sad.data.batch import Batch, LossCounts
from sad.distributed.world import World
from sad.expected import Check, anything, record
from sad.losses.base import LossTerm, LossTerms
from sad.losses.capture import Capture
from sad.models.experts import all_experts, require_callable, require_moe
from sad.models.heads import eval_no_grad, split_head, with_valid_vocab
from sad.teachers.cached import CachedTeacher
from sad.teachers.frozen import FrozenTeacher, Teacher, TeacherOutput
from sad.teachers.routing import StudentAwareRouter, augmented

if TYPE_CHECKING:
    from sad.training.student import StudentWithLoss


class TeacherPolicy:
    """One pass of the teacher as it is; subclasses change its routing.

    ``teacher`` is None in a run that trains on the text alone: no targets are asked for then.
    """

    def __init__(self, teacher: Teacher | None) -> None:
        self._teacher = teacher

    @property
    def teacher(self) -> Teacher:
        if self._teacher is None:
            raise RuntimeError("a run needs a teacher to distil from, got none; set kd_weight: 0")
        return self._teacher

    diagnostics: tuple[str, ...] = ()
    """Names of what ``begin_window`` returns."""

    def begin_window(
        self, batches: Iterable[Batch], student: StudentWithLoss, counts: LossCounts
    ) -> LossTerms:
        """Prepare for a window, before its first forward pass; return terms for the train record.

        ``batches`` yields all of its micro-batches if it is iterated, ``counts`` are their units
        together.
        """
        return {}

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        """The targets of a micro-batch in training."""
        return self.teacher.forward(batch, capture)

    def release(self) -> None:
        """Called when the targets have been used, after the student's backward pass."""
        if self._teacher is not None:
            self._teacher.release()

    def has(self, places: range, world: World) -> bool:
        """Whether the targets of these places of the run are there, on every rank. Those that
        another process makes meanwhile are verified, and ``UnfitError`` raised on every rank."""
        teacher = self._teacher
        if not (isinstance(teacher, CachedTeacher) and teacher.grows):
            return True
        if world.any(not teacher.has(places.start, places.stop - 1)):
            return False
        teacher.open(places.start, places.stop - 1)
        return True

    def wait_for(self, places: range) -> None:
        """Wait until the targets of these places of the run are there.

        Raises ``StoppedError`` on every rank if they do not come.
        """
        if isinstance(self._teacher, CachedTeacher):
            self._teacher.wait_for(places.start, places.stop - 1)
            self._teacher.open(places.start, places.stop - 1)

    def needs_from(self, place: int) -> None:
        """Say that nothing before this place of the run will be asked for again."""
        if isinstance(self._teacher, CachedTeacher):
            self._teacher.needs_from(place)

    def evaluating(self) -> AbstractContextManager[object]:
        """A context in which ``teacher`` itself routes as evaluation wants it."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and named ``tensors``."""
        return {"tensors": {}}

    def check_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        """Raise ``CheckpointError`` or ``UnexpectedValueError`` unless this is a state of this
        policy; nothing changes."""
        record({"tensors": tensors_like({})})(state, where)

    @property
    def checks(self) -> tuple[Check, Check]:
        """What a state must be: one of this policy, and where it may be one of another."""

        def other(state: Mapping[str, Any], where: str) -> None:
            if self.is_own(state):
                self.check_state_dict(state, where)

        return self.check_state_dict, other

    def is_own(self, state: Mapping[str, Any]) -> bool:
        """Whether a state is one of this policy, not of another one."""
        return False

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there, bit for bit.

        A state of another policy is passed over: the configuration was allowed to change.
        """


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

    diagnostics = ("routing_loss", "routing_balance")

    def begin_window(
        self, batches: Iterable[Batch], student: StudentWithLoss, counts: LossCounts
    ) -> LossTerms:
        """Train the gates on the window that the student learns from next.

        Returns their divergence from the student, whose unit is targets, and their balance, a mean
        over tokens.
        """
        if not counts.targets:  # momentum and the balance would move the gates all the same
            return {}
        _, head = split_head(student.model)
        head = with_valid_vocab(head, student.valid_vocab)
        losses = []
        for batch in batches:
            with eval_no_grad(student):  # no dropout, no graph, and no random number drawn
                hidden = student.hidden(batch)
            loss = self.router.backward(batch, hidden, head, counts)
            losses.append((loss.kl, loss.balance * batch.counts.tokens))
        self.router.step()
        kl, balance = (torch.stack(sums).sum() for sums in zip(*losses, strict=True))
        return {
            "routing_loss": LossTerm(kl, counts.targets),
            "routing_balance": LossTerm(balance, counts.tokens),
        }

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        with all_experts(self.teacher.model):
            return super().forward(batch, capture)

    def evaluating(self) -> AbstractContextManager[object]:
        return all_experts(self.teacher.model)

    def state_dict(self) -> dict[str, Any]:
        return self.router.state_dict()

    def check_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        record({"optimizer": anything, "tensors": anything})(state, where)
        self.router.check_state_dict(state)

    def is_own(self, state: Mapping[str, Any]) -> bool:
        return "optimizer" in state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.is_own(state):
            self.router.load_state_dict(state)


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
        targets = tuple(target for output in passes for target in output.targets)
        return TeacherOutput(targets, passes[0].activations)

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {"generator": self.generator.get_state()}}

    def check_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        live = {"generator": self.generator.get_state()}
        record({"tensors": tensors_like(live)})(state, where)
        check_generator(state["tensors"], "generator", f"{where} tensor 'generator'")

    def is_own(self, state: Mapping[str, Any]) -> bool:
        return "generator" in state["tensors"]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.is_own(state):
            self.generator.set_state(state["tensors"]["generator"].clone())


def build_teacher_policy(
    config: DistillConfig, teacher: Teacher | None, valid_vocab: int
) -> TeacherPolicy:
    """The policy that ``routing.mode`` names; ``UnfitError`` for a teacher that has no experts."""
    if not isinstance(teacher, FrozenTeacher):  # a cache: the mode is checked to be `teacher`
        # A baseline is compared with nothing in training: it must wait for no targets, and a
        # teacher that makes them meanwhile must not take what it says for the student's word.
        learns = config.kd_weight or config.structural_weights
        return TeacherPolicy(teacher if learns else None)
    match config.routing.mode:
        case "student_aware":
            return StudentAwarePolicy(config, teacher, valid_vocab)
        case "knowledge_augmentation":
            return AugmentedPolicy(config, teacher)
        case "teacher":
            return TeacherPolicy(teacher)
        case _:
            assert_never(config.routing.mode)
