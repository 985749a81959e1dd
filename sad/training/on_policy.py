"""The micro-batches of a run of which a share is written by the student itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from sad_kernels import Objective, TeacherHidden
from sad_kernels.objective import Divergence

from sad.config.schema import DistillConfig
from sad.data.batch import Batch, LossCounts
from sad.data.prompts import Prompt, Prompts, load_prompts
from sad.data.tokenizers import document_end_id
from sad.errors import UnfitError, is_out_of_memory, with_type
from sad.losses.base import LossTerm, LossTerms
from sad.losses.capture import Capture
from sad.models.heads import eval_no_grad
from sad.optim.schedule import RunLength, Window
from sad.teachers.frozen import Teacher, TeacherOutput
from sad.teachers.policy import TeacherPolicy
from sad.training.batches import TrainBatches, steps_of
from sad.training.inputs import RunInputs
from sad.training.rollouts import (
    RolloutMeter,
    Rollouts,
    Sampling,
    at_student_positions,
    is_on_policy,
    on_policy_before,
    rollout_seed,
    write_rollouts,
)
from sad.training.student import StudentWithLoss

TERMS = ("on_policy_kd", "completion_length", "completed")
"""What a train record says of text that the student has written: its divergence from the teacher
per token, tokens per completion, and the share of completions that came to an end of text."""


class OnPolicyBatches(TrainBatches):
    """Micro-batches of the data, and between them such as the student writes; see
    ``sad.training.rollouts``.

    ``begin`` must be called before anything of a window is asked for: it writes what is on-policy
    in it, with the weights that the student has then.
    """

    def __init__(
        self,
        config: DistillConfig,
        inputs: RunInputs,
        run_length: RunLength,
        student: StudentWithLoss,
        prompts: Prompts,
    ) -> None:
        super().__init__(config, inputs.train_rows, run_length, inputs.device)
        self.prompts = prompts
        self.speed = RolloutMeter()
        self._config = config
        self._share, self._rows = config.lmbda, config.rows_per_process()
        self._student = student
        ends = inputs.train_rows.end_tokens
        ends = ends or [document_end_id(inputs.tokenizer, config.data.document_end)]
        self._sampling = Sampling.of(config, ends)
        self._window: Window | None = None
        self._written: dict[int, Rollouts] = {}

    def is_on_policy(self, micro_step: int) -> bool:
        return is_on_policy(micro_step, self._share)

    def begin(self, window: Window) -> None:
        """Write the on-policy micro-batches of a window, unless it is the one begun last."""
        if window == self._window:
            return
        steps = steps_of(window)
        written = {step: self.write(step) for step in steps if self.is_on_policy(step)}
        self._window, self._written = window, written

    def forget(self) -> None:
        self._window, self._written = None, {}

    def write(self, micro_step: int) -> Rollouts:
        """What the student writes in this micro-batch, by the weights that it has now."""
        with self.speed.timed(self._rows):
            return self._write(micro_step)

    def _write(self, micro_step: int) -> Rollouts:
        first = on_policy_before(micro_step, self._share) * self._rows
        prompts = self.prompts.at(range(first, first + self._rows))
        seed = rollout_seed(self._seed, micro_step)
        return write_rollouts(self._student, prompts, self._sampling, seed)

    def rollouts(self, micro_step: int) -> Rollouts | None:
        return self._written.get(micro_step)

    def host_batch(self, micro_step: int) -> Batch:
        written = self._written.get(micro_step)
        return super().host_batch(micro_step) if written is None else written.batch

    def window(self, window: Window) -> Iterator[Batch]:
        self.begin(window)
        return super().window(window)

    def counts(self, window: Window) -> LossCounts:
        """The units in all micro-batches of a window, those included that the student writes."""
        self.begin(window)
        from_data = [step for step in steps_of(window) if step not in self._written]
        every = [self.rows.counts(self.row_numbers(step)) for step in from_data]
        return _sum(every + [rollouts.batch.counts for rollouts in self._written.values()])

    def writing(self, elapsed: float) -> dict[str, float]:
        return self.speed.record(elapsed)

    def describe(self, micro_step: int) -> str:
        """What the student will write from here on, in words, with the speed of one trial.

        Raises ``UnfitError`` for a student that cannot write.
        """
        step = micro_step
        while not self.is_on_policy(step):
            step += 1
        begin = time.perf_counter()
        try:
            trial = self._write(step)
        except Exception as error:  # a family's own code may raise anything
            if is_out_of_memory(error):
                raise
            raise UnfitError(
                f"the student must be able to write text for lmbda above 0, got "
                f"{with_type(error)}; set lmbda: 0"
            ) from error
        seconds = max(time.perf_counter() - begin, 1e-9)
        config, lengths = self._config, self.prompts.lengths
        own = self.prompts.for_teacher
        others = f", {own:,} of them with another for the teacher" if own else ""
        return (
            f"{self._share:.3g} of the micro-batches, {config.on_policy_divergence}: "
            f"{self._rows} prompts of {len(lengths):,} ({lengths.mean():.0f} tokens on average, "
            f"{lengths.max():,} at most{others}), up to {config.max_completion_length} tokens "
            f"after each; a first trial wrote {trial.completion_tokens:,} tokens in {seconds:.2f} "
            f"s, {trial.num_rows / seconds:.1f} rollouts/s"
        )

    def knows(self, window: Window) -> bool:
        return not any(map(self.is_on_policy, steps_of(window)))

    def targets(self, micro_step: int) -> int:
        written = self._written.get(micro_step)
        return super().targets(micro_step) if written is None else written.batch.num_targets


def _sum(every: Sequence[LossCounts]) -> LossCounts:
    return LossCounts(
        targets=sum(c.targets for c in every),
        tokens=sum(c.tokens for c in every),
        sequences=sum(c.sequences for c in every),
        max_segments=max(c.max_segments for c in every),
    )


def build_batches(
    config: DistillConfig, inputs: RunInputs, run_length: RunLength, student: StudentWithLoss
) -> TrainBatches:
    """The micro-batches of a run: from the data, or also from the student."""
    if not config.lmbda:
        return TrainBatches(config, inputs.train_rows, run_length, inputs.device, inputs.world)
    micro_batches = on_policy_before(run_length.micro_batches, config.lmbda)
    count = max(micro_batches * config.rows_per_process(), 1)
    prompts = load_prompts(config, inputs.tokenizer, count)
    if prompts.for_teacher and config.structural_weights:
        raise UnfitError(
            "structural losses must be off where records have a teacher_prompt, got "
            f"{', '.join(config.structural_weights)}, which compare positions; set their weights "
            "to 0, or leave the field out"
        )
    if config.self_teacher and config.lmbda == 1 and not prompts.for_teacher:
        raise UnfitError(
            f"records must have a teacher_prompt with self_teacher {config.self_teacher} and lmbda "
            "1, got none: student and teacher begin equal, and stay so; add the field, or lower "
            "lmbda"
        )
    return OnPolicyBatches(config, inputs, run_length, student, prompts)


@torch.no_grad()
def answer_to(
    policy: TeacherPolicy, rollouts: Rollouts, capture: Capture | None = None
) -> TeacherOutput:
    """The teacher's answer to what the student has written, at the positions of the student's rows.

    Where the teacher has prompts of its own, it has read them instead.
    """
    theirs, shift = rollouts.teacher_batch, rollouts.shift
    if theirs is None or shift is None:
        return policy.forward(rollouts.batch, capture)
    output = policy.forward(theirs, None)
    length = rollouts.batch.input_ids.shape[1]
    (target,) = output.targets
    assert isinstance(target, TeacherHidden)  # a cache is refused
    hidden = at_student_positions(target.hidden, shift, length)
    weights = output.kd_weights
    if weights is not None:
        weights = at_student_positions(weights, shift, length)
    return output._replace(targets=(replace(target, hidden=hidden),), kd_weights=weights)


def rollout_terms(rollouts: Rollouts, divergence: torch.Tensor) -> LossTerms:
    """``TERMS`` of a micro-batch, whose divergence from the teacher has this sum over targets."""
    rows, device = rollouts.num_rows, divergence.device

    def number(value: float) -> torch.Tensor:
        return torch.tensor(float(value), device=device)

    values = (
        (divergence, rollouts.batch.num_targets),
        (number(rollouts.completion_tokens), rows),
        (number(rollouts.finished), rows),
    )
    return {name: LossTerm(*value) for name, value in zip(TERMS, values, strict=True)}


def score_rollouts(
    student: StudentWithLoss,
    teacher: Teacher,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    seed: int,
    rows: int,
    divergence: Divergence = "reverse_kl",
) -> dict[str, float]:
    """How far the student is from the teacher on what it writes itself after ``prompts``, ``rows``
    at a time: the divergence in nats per token at temperature 1 (``reverse_kl``), tokens per
    completion, and the share of completions that come to an end of text.

    With reverse KL this is, per token, the expectation of log q - log p under the student's own
    text q: what a student does to its own mistakes counts, as it does not on given text.
    """
    objective = Objective(kd_weight=1.0, divergence=divergence)
    total = tokens = finished = 0.0
    for turn, start in enumerate(range(0, len(prompts), rows)):
        some = prompts[start : start + rows]
        written = write_rollouts(student, some, sampling, rollout_seed(seed, turn))
        answer = answer_to(TeacherPolicy(teacher), written)
        with eval_no_grad(student):
            out = student(written.batch, answer, objective, written.batch.counts)
        total += float(out.distill.kd)
        tokens += written.completion_tokens
        finished += written.finished
    return {
        divergence: total / tokens,
        "completion_length": tokens / len(prompts),
        "completed": finished / len(prompts),
    }
