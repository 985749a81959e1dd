"""The training loop of one student: windows of micro-batches, and what happens once in a while.

A *window* is the micro-batches of one optimizer step. Three counters, never mixed: ``micro_step``
counts micro-batches (learning rate, curriculum, data position), ``global_step`` closed windows
(logging, evaluation, saving), ``num_updates`` updates that were applied (EMA).

Nothing here waits for the device between two log lines, TAID excepted: sums and the gradient's norm
stay where they were computed, and the verdict on it comes to the host when it comes
(``sad.training.skips``). Places that do wait say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from sad_kernels import Objective
from sad_kernels._dispatch import choose_impl
from sad_kernels._torch.gemm import moves_setting
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sad.accumulate import GradientAccumulator
from sad.checkpoint.parts import RandomGenerators, State, TensorGroups, capture_parts
from sad.checkpoint.run_directory import RunDirectory, is_whole_export
from sad.checkpoint.snapshot import (
    HostBuffers,
    Snapshot,
    at_once,
    group_bytes,
    in_thread,
    snapshot,
)
from sad.checkpoint.store import Checkpoint, checkpoints_of, set_aside
from sad.config.schema import DistillConfig
from sad.curriculum import Curriculum
from sad.data.batch import Batch, LossCounts
from sad.distributed.sharding import reshard, set_last_backward, whole_state
from sad.distributed.shards import background_world, live_snapshot, write_shards
from sad.distributed.world import lost_ranks_explained
from sad.environment import StopSignals, memory_now
from sad.errors import (
    CheckpointError,
    DivergedError,
    OutputError,
    StoppedError,
    UsageError,
    is_out_of_memory,
    one_line,
    with_type,
)
from sad.losses.taid import TAIDSchedule
from sad.metrics import DEFAULT_BEST, KL_BOUND
from sad.optim.precision import Precision, structural_loss_parameters
from sad.optim.schedule import (
    Window,
    build_scheduler,
    check_foreign_scheduler,
    planned_length,
    step_scheduler,
)
from sad.report.log import RunLog
from sad.report.model_card import model_card
from sad.teachers.frozen import TeacherOutput
from sad.teachers.policy import TeacherPolicy, build_teacher_policy
from sad.teachers.prefetch import Prefetch
from sad.training.evaluate import evaluate_student
from sad.training.inputs import RunInputs
from sad.training.meters import Counters, ThroughputMeter, TrainMeter
from sad.training.on_policy import TERMS, answer_to, build_batches, rollout_terms
from sad.training.resume import Resumption, overtaken, plan_resumption
from sad.training.rollouts import Rollouts
from sad.training.self_teacher import build_self_teacher
from sad.training.skips import SkipWatch
from sad.training.speed import Speed
from sad.training.state import checkpoint_parts, restore_trainer
from sad.training.student import LossWeights, StepOutput, StudentWithLoss

MakeScheduler = Callable[[Optimizer], LRScheduler]
"""A scheduler of the caller's own, stepped as ``config.scheduler_unit`` says."""


class PendingSave(NamedTuple):
    """A save in flight: the checkpoint's path, once it is there, or what was raised."""

    path: Future[Path]
    state: tuple[int, int]  # which is saved: `Trainer._state_number`
    position: dict[str, Any]
    warnings: list[str]  # from the thread that writes


class Trainer:
    """Trains one student. ``train()`` is the whole story, ``parts`` are what checkpoints hold.

    The same class trains the distilled student, the baseline without a teacher (``kd_weight=0``)
    and, from text alone, a teacher.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: StudentWithLoss,
        inputs: RunInputs,
        precision: Precision,
        run_dir: RunDirectory,
        make_scheduler: MakeScheduler | None = None,
        *,
        export_dtype: torch.dtype | None = None,
    ) -> None:
        """``export_dtype`` is that of exported weights, by default the one of the parameters."""
        self.config = config
        self.student = student
        self.inputs = inputs
        self.precision = precision
        self.run_dir = run_dir
        self.identity = inputs.identity(config)
        self.policy = build_teacher_policy(config, inputs.teacher, inputs.valid_vocab)
        self.prefetch = Prefetch()
        self.device = inputs.device
        self.world = inputs.world
        self.export_dtype = export_dtype

        rows = inputs.train_rows
        self.run_length = planned_length(config, len(rows), self.world.size)
        self.batches = build_batches(config, inputs, self.run_length, student)
        # The order matters: a scheduler built after the optimizer is loaded would overwrite the
        # first resumed learning rate.
        self.optimizer = precision.build_optimizer(student.model, student.structural)
        self.builds_scheduler = make_scheduler is None
        if make_scheduler is None:
            self.scheduler: LRScheduler = build_scheduler(self.optimizer, config, self.run_length)
        else:
            self.scheduler = make_scheduler(self.optimizer)
            check_foreign_scheduler(self.scheduler, self.run_length, config.scheduler_unit)
        self.ema = precision.build_ema(student.model) if config.use_ema else None
        if own := build_self_teacher(config, student, self.ema):
            self.policy = TeacherPolicy(own)
        self.accumulator = GradientAccumulator(config.gradient_accumulation_steps)
        self.curriculum = Curriculum(
            {"kd": config.kd_weight} | config.structural_weights,
            self.run_length.micro_batches,
            config.curriculum.schedules(),
        )
        self.taid = _taid(config)
        self.counters = Counters()
        logged = (*student.term_names, *student.diagnostics, *self.policy.diagnostics)
        if config.lmbda:
            logged += TERMS
        self.meter = TrainMeter(logged, self.device)
        self.window_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.generators = RandomGenerators("rng")
        self.parts = checkpoint_parts(self)
        self.watch = SkipWatch(self.device)
        self.speed = Speed.of(config, student.model, inputs)
        # Saves talk in the background, beside training.
        self._writers = background_world(self.world)
        self.logged: dict[str, float] = {}  # the losses of the last train record
        self.buffers = HostBuffers(pinned=self.device.type == "cuda")
        self._preparing: Future[None] | None = None  # of the buffers
        self._pending: PendingSave | None = None
        self._saved: tuple[tuple[int, int], Path] | None = None  # the newest that is there
        self._failed_saves = self._failed_exports = 0
        self._superseded: Path | None = None  # a checkpoint that counts other micro-batches

    # The story

    def train(self, log: RunLog, signals: StopSignals) -> None:
        """Train to the end of the run, or until a signal asks to stop: the state is then saved."""
        lost_ranks = lost_ranks_explained(self.world, self._in_window)
        with lost_ranks, self._finishing_saves(log), self.prefetch:
            self._train(log, signals)

    def _train(self, log: RunLog, signals: StopSignals) -> None:
        self.student.train()
        if self._evaluation_is_missing():
            self._evaluate_or_stop(log, signals)
        throughput = ThroughputMeter(self.counters.tokens)
        self.policy.needs_from(self._place(self.counters.micro_step))
        stops_all = self.world.begin_any(False)
        while self.counters.micro_step < self.run_length.micro_batches:
            if not self.accumulator.pending:
                self._await_targets(log, signals)
                stops_all = self.world.begin_any(signals.requested is not None)
            closed = self.micro_batch()
            log.advance()
            if closed and self._preparing is None and self._saves_before_the_end():
                self.prepare_saves()
            self.finish_save(log)
            if closed and self.watch.in_a_row >= self.config.max_nonfinite_steps:
                self._stop_diverged(log, throughput)

            # Once in a while: log, evaluate, save. Evaluation comes before saving, so that a
            # checkpoint knows the metrics of its own position.
            if closed and self._every(self.config.logging_steps):
                self.log_progress(log, throughput)
            if closed and self._every(self.config.eval_steps):
                with throughput.paused():
                    self._evaluate_or_stop(log, signals)
            if self._save_is_due(closed):
                with throughput.paused():
                    self.save(log)
            if self._stops_here(signals, closed, stops_all):
                self._save_and_stop(log, signals)

        if self.watch.last() >= self.config.max_nonfinite_steps:
            self._stop_diverged(log, throughput)
        if self.counters.evaluated_at != self.counters.micro_step:
            self._evaluate_or_stop(log, signals)
        self.save(log, must=True)

    def _stops_here(
        self, signals: StopSignals, closed: bool, stops_all: Callable[[], bool]
    ) -> bool:
        """Whether to stop now. A process of its own does so in the middle of a window, too: its
        gradients are saved. Several do at its end, if a signal came to any before it began."""
        if self.world.size == 1:
            return signals.requested is not None
        return closed and stops_all()

    def _await_targets(self, log: RunLog, signals: StopSignals) -> None:
        """Wait for the next window's targets, where another process makes them meanwhile. If they
        do not come the state is saved, and the run ends."""
        window = self._window(self.counters.micro_step)
        end = window.first_micro_step + window.size
        places = range(self._place(window.first_micro_step), self._place(end))
        if self.policy.has(places, self.world):
            return
        self.finish_save(log, wait=True)  # what is saved need not be kept: there is room for more
        try:
            self.policy.wait_for(places)
        except StoppedError as error:
            self._save_and_stop(log, signals, error)

    def _in_window(self) -> str:
        return f" in window {self.counters.global_step + 1}"

    def _save_and_stop(
        self, log: RunLog, signals: StopSignals, why: StoppedError | None = None
    ) -> NoReturn:
        path = self.save(log, must=True)
        if why is not None and signals.requested is None:
            raise StoppedError(f"{why}; the state is saved in {path}") from why
        requested = signals.requested or "a signal to another process"
        raise StoppedError(
            f"training must finish to give a student, got {requested} after "
            f"micro-batch {self.counters.micro_step}; the state is saved in {path}: the "
            "same command with --resume_from_checkpoint auto goes on"
        )

    def micro_batch(self) -> bool:
        """Consume one micro-batch; return whether it closed its window."""
        counters, accumulator = self.counters, self.accumulator
        window = self._window(counters.micro_step)
        self.batches.begin(window)  # what is on-policy in it is written now, or after a resumption
        counts = self.batches.counts(window)
        if not accumulator.pending:
            accumulator.open_window(window.size, counts.targets)
            batches = self.batches.window(window)
            self.meter.terms.add(self.policy.begin_window(batches, self.student, counts))

        # What was written again by another machine may be of another length: the divisor stays.
        counts = counts._replace(targets=accumulator.num_items)

        # Forward and backward. The weights are those at the window's first micro-batch, so that a
        # window has one objective; the loss is divided by the units of the whole window.
        batch = self.batches.batch(counters.micro_step)
        weights = self.weights(window.first_micro_step)
        closes = accumulator.should_step()
        if self.world.size > 1:
            set_last_backward(self.student, last=closes, sync_each=self.config.sync_each_batch)
        written = self.batches.rollouts(counters.micro_step)
        if written is None:
            result = self._forward(batch, weights, counts)
        else:
            result = self._forward_on_policy(written, weights, counts)
        self.precision.backward(result.loss)
        self.policy.release()
        self.prefetch.wait()  # from here to the next one nobody runs the teacher but evaluations
        if written is None:
            self.meter.add(result.distill, result.terms, accumulator.num_items)
        else:
            self.meter.terms.add(result.terms | rollout_terms(written, result.distill.kd))
        self.window_loss += result.distill.loss.detach()

        # The optimizer steps at the window's end, the scheduler there or after each micro-batch.
        if closes:
            self._close_window(empty=accumulator.num_items == 0)
        if closes or self.config.scheduler_unit == "batch":
            step_scheduler(self.scheduler)
        accumulator.advance()
        counters.tokens += self.batches.targets(counters.micro_step)
        counters.micro_step += 1
        return closes

    def _forward(self, batch: Batch, weights: LossWeights, counts: LossCounts) -> StepOutput:
        """The loss of a micro-batch, as its share of the window's, whose units are ``counts``."""
        teacher = self._targets(batch, weights)
        if self.config.teacher_prefetch:
            self._prefetch_next()
        return self.student(batch, teacher, self.objective(weights), counts, weights)

    def _forward_on_policy(
        self, written: Rollouts, weights: LossWeights, counts: LossCounts
    ) -> StepOutput:
        """The same on text that the student has written, which is compared with the teacher
        alone."""
        teacher = answer_to(self.policy, written, self.student.teacher_capture(weights))
        objective = self.config.on_policy_objective()
        return self.student(written.batch, teacher, objective, counts, weights)

    def _targets(self, batch: Batch, weights: LossWeights) -> TeacherOutput | None:
        """The teacher's answer to the present micro-batch."""
        if not self._is_taught(weights):
            return None
        ahead = self.prefetch.take((self.counters.micro_step, weights))
        return ahead or self.policy.forward(batch, self.student.teacher_capture(weights))

    def _is_taught(self, weights: LossWeights) -> bool:
        """Whether anything is compared with the teacher: only then it runs."""
        return bool(weights["kd"] or self.student.active_losses(weights))

    def _prefetch_next(self) -> None:
        """Let the teacher begin with the next micro-batch, if there is one that it is needed in."""
        step = self.counters.micro_step + 1
        if step == self.run_length.micro_batches:
            return
        weights = self.weights(self._window(step).first_micro_step)
        places = range(self._place(step), self._place(step + 1))
        if not self._is_taught(weights) or not self.policy.has(places, self.world):
            return
        # Made here: hooks are tried on a teacher that rests, and only one thread makes batches.
        capture, batch = self.student.teacher_capture(weights), self.batches.host_batch(step)
        self.prefetch.begin((step, weights), partial(self.policy.forward, batch, capture))
        computes_on_cpu = choose_impl(self.config.impl, self.device.type, double=False) == "torch"
        if computes_on_cpu and moves_setting():  # in the loss, for a while
            self.prefetch.wait()

    def weights(self, micro_step: int) -> dict[str, float]:
        """Weights of the divergence and the structural losses, in the window that begins at
        ``micro_step``."""
        return self.curriculum.weights(micro_step if self.config.use_curriculum else None)

    def objective(self, weights: LossWeights) -> Objective:
        """The objective on logits of a window with these weights."""
        share = 1.0 if self.taid is None else self.taid.value
        return self.config.objective(kd_weight=weights["kd"], teacher_share=share)

    def _close_window(self, *, empty: bool) -> None:
        """Take the optimizer step: unscale, clip, check, update, average, drop the gradients."""
        self.meter.lr = self.optimizer.param_groups[0]["lr"]
        if not empty:  # a zero gradient would still apply decay and momentum
            # Whether the gradient is finite is decided on the device: optimizer and average skip a
            # bad update there, and the host learns of it with the next train record.
            update = self.precision.step(self.optimizer, self.config.max_grad_norm)
            if self.ema is not None:
                self.ema.update(update.ok)
            self.meter.add_update(update)
            self.watch.add(self.meter.skipped[1])
        self.precision.zero_grad(self.optimizer)
        self.counters.global_step += 1
        if self.taid is not None:
            progress = (self.counters.micro_step + 1) / self.run_length.micro_batches
            # Waits for the device: the teacher's share of the next window follows this loss.
            self.taid.update(float(self.world.sum_(self.window_loss)), progress)
        self.window_loss.zero_()

    # Once in a while

    def log_progress(self, log: RunLog, throughput: ThroughputMeter) -> None:
        """Write a train record. Waits for the device, as nothing else here does but TAID."""
        self.meter.collect(self.world)
        window = self._window(self.counters.micro_step - 1)
        weights = self.weights(window.first_micro_step)
        term_weights = self.student.term_weights(weights)
        losses = self.meter.losses(term_weights)  # waits for the device, as do the next lines
        skipped = int(self.meter.skipped[0])
        rate = throughput.rate(self.counters.tokens)
        with_teacher = self._is_taught(weights)
        on_policy = {TERMS[0]: 1.0} if self.config.lmbda else {}
        record = self._position() | {
            "tokens": self.counters.tokens,
            **losses,
            "weights": _weights(self.objective(weights)) | term_weights | on_policy,
            "lr": self.meter.lr,
            "grad_norm": float(self.meter.grad_norm),
            "loss_scale": self.precision.loss_scale,
            "skipped": skipped,
            "tokens_per_second": rate,
            **self.speed.record(rate, with_teacher=with_teacher),
            **self.batches.writing(throughput.seconds),
            **memory_now(self.device),
        }
        if self.taid is not None:
            record["teacher_share"] = self.taid.value
        if self.ema is not None:
            record |= {"num_updates": self.ema.num_updates, "ema_decay": self.ema.effective_decay}
        log.train(record)
        self.logged = losses
        self.meter.reset()

    def _stop_diverged(self, log: RunLog, throughput: ThroughputMeter) -> NoReturn:
        """Raise ``DivergedError``, after a train record of what there is to see."""
        if self.world.any(bool(self.meter.sums.any())):  # else such a record has just been written
            self.log_progress(log, throughput)
        losses = self.logged
        named = ("ce", "kd", *self.student.term_names)
        values = ", ".join(f"{name} {losses[name]:.4g}" for name in named if name in losses)
        raise DivergedError(
            f"updates must be finite, got {self.watch.in_a_row} updates in a row that were not, by "
            f"their gradient or learning rate ({values}); lower learning_rate, lengthen the "
            "warm-up, or train in bf16 or fp32"
        )

    def _evaluate_or_stop(self, log: RunLog, signals: StopSignals) -> None:
        """Evaluate. A signal ends it as if it had not begun: the resumed run does it instead."""
        before = replace(self.counters)
        try:
            self.evaluate(log)
        except StoppedError:
            vars(self.counters).update(vars(before))
            self._save_and_stop(log, signals)

    def _evaluation_is_missing(self) -> bool:
        """Whether the run was stopped in the evaluation that is due at its position."""
        position = self.counters.micro_step
        if not position or self.accumulator.pending or self.counters.evaluated_at == position:
            return False
        return self._every(self.config.eval_steps)

    def evaluate(self, log: RunLog) -> None:
        """Score the raw and the averaged weights; export the best. Training is left untouched."""
        config, counters = self.config, self.counters
        variants: dict[str, Any] = {"eval": nullcontext}
        if self.ema is not None:
            variants["eval_ema"] = self.averaged
        batches = self.inputs.eval_batches(config)
        weights = self.weights(min(counters.micro_step, self.run_length.micro_batches - 1))
        losses = tuple(config.structural_weights)
        if not config.eval_all_losses:
            losses = self.student.active_losses(weights)
        with self.policy.evaluating():  # waits for the device at its end
            metrics = evaluate_student(
                self.student, self.inputs.eval_teacher, batches, variants, losses, self.world
            )

        # The held-out counterpart of the training loss: the same weights, on unsmoothed parts.
        divergence = "kl" if "eval/kl" in metrics else KL_BOUND
        parts = {"nll": config.objective().ce_weight, divergence: weights["kd"]}
        parts |= self.student.term_weights(weights)
        for prefix in variants:
            values = {name: metrics.get(f"{prefix}/{name}", 0.0) for name in parts}
            # A part without a weight may be infinite: 0 times that would be NaN.
            metrics[f"{prefix}/loss"] = sum(w * values[name] for name, w in parts.items() if w)
        counters.metrics, counters.evaluated_at = metrics, counters.micro_step
        log.evaluation(self._position() | metrics)
        _require_scores(metrics, variants, counters.micro_step)

        if self.metric_for_best not in metrics:
            raise UsageError(
                f"metric_for_best_model must name what an evaluation reports, got "
                f"{self.metric_for_best}; it reported {', '.join(metrics)}"
            )
        value = metrics[self.metric_for_best]
        # A tie keeps the earlier one, NaN never wins.
        if value < counters.best_value and self._export_best(log):
            counters.best_value, counters.best_micro_step = value, counters.micro_step
            counters.best_metric = self.metric_for_best

    def _export_best(self, log: RunLog) -> bool:
        """Export the student to ``best/``; return whether it is there.

        A disk that refuses once is a warning. A second refusal, and a student that cannot be
        exported, end the run, with its state saved.
        """
        try:
            self.export(self.run_dir.best)
        except StoppedError:
            raise
        except Exception as error:
            self._failed_exports += 1
            if isinstance(error, OutputError) and self._failed_exports == 1:
                log.warning(f"{error}; training goes on until the next better score")
                # The last evaluation has no next one.
                last = self.counters.micro_step == self.run_length.micro_batches
                return last and self._export_best(log)
            try:
                self.save(log, must=True)
            except CheckpointError as another:  # what ends the run is the first error
                log.warning(f"the state could not be saved either: {another}")
            raise
        self._failed_exports = 0
        return True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the student has its averaged weights."""
        assert self.ema is not None
        reshard(self.student)
        with self.ema.swapped():
            yield
            reshard(self.student)

    def export(self, target: Path) -> None:
        """Write the student that was scored: the averaged weights if those are what is compared."""
        averaged = self.metric_for_best.startswith("eval_ema/")
        facts = {
            "metric": self.metric_for_best,
            "value": self.counters.metrics[self.metric_for_best],
            "weights": "ema" if averaged else "raw",
            "micro_step": self.counters.micro_step,
            # It stays what it was where a resumption with other sizes counts anew.
            "micro_batch_rows": self.run_length.batch_size,
        }
        with self.averaged() if averaged and self.ema else nullcontext():
            export = partial(
                self.run_dir.export,
                target,
                self.student.model,
                self.inputs.tokenizer,
                self.inputs.valid_vocab,
                facts,
                self.export_dtype,
                merge_adapters=self.config.merge_adapters,
                card=model_card(self.config, self.counters.metrics, facts),
            )
            if self.world.size > 1:
                export = partial(export, state=whole_state(self.student.model, self.world))
            self.world.from_main(export)

    def save(self, log: RunLog, *, must: bool = False) -> Path | None:
        """Save a checkpoint. One periodic failure is a warning; a second, or a last one, stops.

        With ``async_save`` training waits for a copy of its state alone; the files are written in
        the background, and ``finish_save`` hears of them. One save is in flight: this one waits for
        the last. A save that ``must`` succeed is over when this returns its path.
        """
        self.finish_save(log, wait=True, give_up=not must)  # the buffers are in use until then
        if must and self._saved is not None and self._saved[0] == self._state_number():
            return self._saved[1]
        self.meter.collect(self.world)
        state, tensors = self.capture()  # waits for the device
        taken = Snapshot(self.counters.micro_step, state, tensors)
        copied = self._copy(taken, log) if self.config.async_save and not must else None
        warnings: list[str] = []
        if copied is None:
            taken = live_snapshot(*taken, self.world)
        job = partial(self._write, copied or taken, warnings.append)
        path = in_thread(job) if copied else at_once(job)
        self._pending = PendingSave(path, self._state_number(), self._position(), warnings)
        return None if copied else self.finish_save(log, wait=True, must=must)

    def _copy(self, taken: Snapshot, log: RunLog) -> Snapshot | None:
        """A copy that can be written while training goes on; None if there is no memory for it."""
        copied = self._own_copy(taken, log)
        return None if self.world.any(copied is None) else copied

    def _own_copy(self, taken: Snapshot, log: RunLog) -> Snapshot | None:
        try:
            if self._preparing is not None:
                self._preparing.result()
            return snapshot(*taken, self.buffers)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.buffers.clear()
            log.warning(
                f"no host memory for a copy of the state, got {one_line(error)}; training waits "
                "until the checkpoint is written (async_save: false does so without trying)"
            )
            return None

    def _state_number(self) -> tuple[int, int]:
        """Equal for equal states of one run: an evaluation changes the counters, too."""
        return self.counters.micro_step, self.counters.evaluated_at

    def prepare_saves(self) -> None:
        """Begin to make room for copies of the state, once the optimizer has one, in a thread."""
        _, tensors = self.capture()  # waits for the device
        self._preparing = in_thread(partial(self.buffers.prepare, group_bytes(tensors)))

    def _write(self, taken: Snapshot, warn: Callable[[str], None]) -> Path:
        """Everything of a save that touches the disk, in this order; in the background, too."""
        limit = self.config.save_total_limit
        path = write_shards(
            self.run_dir.path, taken, self._writers, save_total_limit=limit, report=warn
        )
        if self.world.main and self._superseded not in (None, path):
            set_aside([self._superseded], warn)
        self._superseded = None
        try:
            self.run_dir.write_status("running", checkpoint=path.name)  # it is there
        except OutputError as error:
            warn(str(error))
        return path

    def finish_save(
        self, log: RunLog, *, wait: bool = False, must: bool = False, give_up: bool = True
    ) -> Path | None:
        """Log the save in flight if it is over, and return its path if it succeeded.

        ``wait`` until it is over. A failure is a warning; it is raised if the save ``must``
        succeed, or if the one before it has failed, too, and that is a reason to ``give_up``.
        """
        pending = self._pending
        if pending is None or not (wait or not self.world.any(not pending.path.done())):
            return None
        self._pending = None
        try:
            path = pending.path.result()
        except CheckpointError as error:
            self._failed_saves += 1
            if must or (give_up and self._failed_saves > 1):
                raise
            log.warning(f"{error}; training goes on until the next save")
            return None
        finally:
            for warning in pending.warnings:
                log.warning(warning)
        self._failed_saves = 0
        self._saved = pending.state, path
        self.policy.needs_from(self._place(pending.position["micro_step"]))
        log.saved(pending.position | {"path": path.name})
        return path

    @contextmanager
    def _finishing_saves(self, log: RunLog) -> Iterator[None]:
        """Within, whatever is raised waits for the save in flight: nothing is written after it."""
        try:
            yield
        except BaseException:
            try:
                self.finish_save(log, wait=True, give_up=False)
            except Exception as error:  # what ends the run is the first error
                log.warning(f"the last save failed, too: {with_type(error)}")
            raise

    # Checkpoints

    def capture(self) -> tuple[State, TensorGroups]:
        """The state of all parts, as plain values and named tensors: the live ones, not copies."""
        return capture_parts(self.parts)

    def restore(
        self, checkpoint: Checkpoint | Resumption, warn: Callable[[str], None]
    ) -> Resumption:
        """Continue exactly where ``checkpoint`` was taken; every tensor is filled in place.

        Raises ``UsageError`` if the configuration or the data would take another course, unless
        ``allow_config_change`` says that this is meant and the data can go on, and
        ``CheckpointError`` for a checkpoint that lacks a part or holds other tensors.

        The run's other checkpoints are set aside if their numbers count other micro-batches than
        this run's; ``checkpoint`` itself, if its number does, with the next save.
        """
        resumption = checkpoint
        if isinstance(resumption, Checkpoint):
            resumption = plan_resumption(
                resumption,
                self.config,
                self.inputs.train_rows,
                builds_scheduler=self.builds_scheduler,
                world_size=self.world.size,
            )
        restore_trainer(self, resumption, warn)
        self.batches.forget()
        counters = self.counters
        is_whole = partial(is_whole_export, self.run_dir.best)
        if math.isfinite(counters.best_value) and not self.world.from_main(is_whole):
            warn(f"{self.run_dir.best} is not what was exported: the next evaluation writes it")
            counters.best_value = math.inf
            if counters.micro_step == self.run_length.micro_batches:
                counters.evaluated_at = -1  # there is a next one
        ours, resumed = checkpoints_of(self.run_dir.path), resumption.checkpoint.path.resolve()
        self.world.from_main(lambda: set_aside(overtaken(ours, resumption), warn))
        if resumption.renumbered:
            self._superseded = next((path for path in ours if path.resolve() == resumed), None)
        return resumption

    # Details

    def trained_parameters(self) -> dict[str, Tensor]:
        """Every parameter that collects gradients, by its name in checkpoints."""
        ours: dict[str, Tensor] = dict(self.student.model.named_parameters())
        return ours | structural_loss_parameters(self.student.structural)

    def _place(self, micro_step: int) -> int:
        """The place of a micro-batch's first row in the order of the run."""
        return micro_step * self.run_length.batch_size

    def _window(self, micro_step: int) -> Window:
        return self.run_length.window(micro_step, self.counters.window_begins)

    def _every(self, steps: int | None) -> bool:
        last = self.counters.micro_step == self.run_length.micro_batches
        return bool(steps) and (last or self.counters.global_step % steps == 0)

    def _saves_before_the_end(self) -> bool:
        """Whether checkpoints are written in the background at all: the last one is not."""
        several = self.run_length.batches_per_epoch < self.run_length.micro_batches
        return self.config.async_save and (several or self.config.save_steps is not None)

    def _save_is_due(self, closed: bool) -> bool:
        """Whether it is time for a periodic save. At the end of the run another one follows."""
        step, length = self.counters.micro_step, self.run_length
        if not closed or step == length.micro_batches:
            return False
        return self._every(self.config.save_steps) or step % length.batches_per_epoch == 0

    def _position(self) -> dict[str, Any]:
        epoch, batch = self.run_length.position(self.counters.micro_step)
        return {
            "micro_step": self.counters.micro_step,
            "global_step": self.counters.global_step,
            "epoch": epoch + batch / self.run_length.batches_per_epoch,
        }

    @property
    def metric_for_best(self) -> str:
        prefix = "eval" if self.ema is None else "eval_ema"
        return self.config.metric_for_best_model or f"{prefix}/{DEFAULT_BEST}"


def _taid(config: DistillConfig) -> TAIDSchedule | None:
    section = config.taid
    if not section.enabled:
        return None
    return TAIDSchedule(section.start, section.end, section.alpha, section.beta)


def _require_scores(metrics: Mapping[str, float], variants: Iterable[str], micro_step: int) -> None:
    """Raise ``DivergedError`` for a student that gives the held-out text no likelihood."""
    for prefix in variants:
        nll, kl = metrics.get(f"{prefix}/nll", 0.0), metrics.get(f"{prefix}/kl", 0.0)
        if not math.isfinite(nll) or math.isnan(kl):
            name, value = ("kl", kl) if math.isfinite(nll) else ("nll", nll)
            raise DivergedError(
                f"{prefix}/{name} must be finite, got {value} in the evaluation after micro-batch "
                f"{micro_step:,}: the student's outputs overflow or are no numbers; go on from an "
                "earlier checkpoint with a lower learning_rate, or train in bf16 or fp32"
            )


def _weights(objective: Objective) -> dict[str, float]:
    weights = {"ce": objective.ce_weight, "kd": objective.kd_weight}
    return weights | {"z": objective.z_loss} if objective.z_loss else weights
