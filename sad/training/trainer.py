"""The training loop: one student, its windows of micro-batches, and everything a checkpoint holds.

A *window* is the micro-batches of one optimizer step. Three counters, never mixed: ``micro_step``
counts micro-batches (learning rate, curriculum, data position), ``global_step`` closed windows
(logging, evaluation, saving), ``num_updates`` updates that were applied (EMA).

Nothing here waits for the device between two log lines: sums, the gradient's norm and the verdict
on it stay where they were computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sad_kernels import Objective
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sad.accumulate import GradientAccumulator
from sad.checkpoint.run_directory import RunDirectory
from sad.checkpoint.state import (
    gradient_tensors,
    load_gradients,
    load_model,
    load_optimizer,
    load_rng,
    load_tensors,
    model_tensors,
    optimizer_state,
    rng_state,
)
from sad.checkpoint.store import Checkpoint, save_checkpoint
from sad.config.identity import require_same_run
from sad.config.schema import DistillConfig
from sad.curriculum import Curriculum
from sad.data.batch import Batch, LossCounts
from sad.data.rows import epoch_permutation
from sad.environment import StopSignals, memory_now
from sad.errors import CheckpointError, DivergedError, StoppedError
from sad.losses.structural import StructuralLosses
from sad.losses.taid import TAIDSchedule
from sad.metrics import DEFAULT_BEST
from sad.optim.precision import Precision, structural_loss_parameters
from sad.optim.schedule import (
    RunLength,
    Window,
    build_scheduler,
    check_foreign_scheduler,
    step_scheduler,
)
from sad.report.log import RunLog
from sad.teachers.policy import build_teacher_policy
from sad.training.evaluate import evaluate_student
from sad.training.inputs import RunInputs
from sad.training.meters import LOGGED, ThroughputMeter
from sad.training.student import StepOutput, StructuredStudent, StudentWithLoss

OPTIONS = ("initial_lr", "weight_decay", "betas", "eps")
"""What the configuration says of an optimizer's group; its ``lr`` follows from the scheduler."""


@dataclass
class Counters:
    """Where the run stands. Everything here is a plain number and goes into the checkpoint."""

    micro_step: int = 0
    global_step: int = 0
    tokens: int = 0
    """Targets seen so far."""
    best_value: float = math.inf
    best_micro_step: int = -1
    evaluated_at: int = -1
    """``micro_step`` of the newest evaluation, whose figures are ``metrics``."""
    metrics: dict[str, float] = field(default_factory=dict)


MakeScheduler = Callable[[Optimizer], LRScheduler]
"""A scheduler of the caller's own, stepped as ``config.scheduler_unit`` says."""


class Trainer:
    """Trains one student. What it owns is what a checkpoint holds; ``train()`` is the whole story.

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
        structural: StructuralLosses | None = None,
    ) -> None:
        self.config = config
        self.student = student
        self.structural = structural
        self.structural_student = (
            None if structural is None else StructuredStudent(student, structural)
        )
        self.inputs = inputs
        self.precision = precision
        self.run_dir = run_dir
        self.identity = inputs.identity(config)
        self.policy = build_teacher_policy(config, inputs.teacher, inputs.valid_vocab)
        self.train_rows = inputs.train_rows
        self.device = inputs.device

        self.run_length = RunLength(
            num_rows=len(self.train_rows),
            batch_size=config.per_device_train_batch_size,
            accumulation_steps=config.gradient_accumulation_steps,
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
        )
        # The order matters: a scheduler built after the optimizer is loaded would overwrite the
        # first resumed learning rate.
        self.optimizer = precision.build_optimizer(student.model, structural)
        if make_scheduler is None:
            self.scheduler: LRScheduler = build_scheduler(self.optimizer, config, self.run_length)
        else:
            self.scheduler = make_scheduler(self.optimizer)
            check_foreign_scheduler(self.scheduler, self.run_length, config.scheduler_unit)
        self.ema = precision.build_ema(student.model) if config.use_ema else None
        self.accumulator = GradientAccumulator(config.gradient_accumulation_steps)
        self.curriculum = Curriculum(
            {"kd": config.kd_weight} | config.structural_weights,
            self.run_length.micro_batches,
            config.curriculum.schedules(),
        )
        self.taid = _taid(config)
        self.counters = Counters()
        self.sums = torch.zeros(len(LOGGED), dtype=torch.float64, device=self.device)
        # Of the structural terms: sums on the device, units on the host.
        self.term_names = () if structural is None else structural.names
        self.term_sums = torch.zeros(len(self.term_names), dtype=torch.float64, device=self.device)
        self.term_counts = [0] * len(self.term_names)
        self.window_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        # Updates skipped for a non-finite gradient: in all, in a row just now, in a row at most.
        self.skipped = torch.zeros(3, dtype=torch.int64, device=self.device)
        self._lr = 0.0
        self._grad_norm = torch.zeros(())
        self._failed_saves = 0
        self._order: tuple[int, np.ndarray] | None = None

    # The story

    def train(self, log: RunLog, signals: StopSignals) -> None:
        """Train to the horizon, or until a signal asks to stop (then the state is saved first)."""
        self.student.train()
        throughput = ThroughputMeter(self.counters.tokens)
        while self.counters.micro_step < self.run_length.micro_batches:
            closed = self.micro_batch()
            log.advance()

            if closed and self._every(self.config.logging_steps):
                self.log_progress(log, throughput)
            if closed and self._every(self.config.eval_steps):
                with throughput.paused():
                    self.evaluate(log)
            if closed and (self._every(self.config.save_steps) or self._epoch_ends()):
                with throughput.paused():
                    self.save(log)
            if signals.requested:
                path = self.save(log, must=True)
                raise StoppedError(
                    f"training must finish to give a student, got {signals.requested} after "
                    f"micro-batch {self.counters.micro_step}; the state is saved in {path}: the "
                    "same command with --resume_from_checkpoint auto goes on"
                )

        if self.counters.evaluated_at != self.counters.micro_step:
            self.evaluate(log)
        self.save(log, must=True)

    def micro_batch(self) -> bool:
        """Consume one micro-batch; return whether it closed its window."""
        counters, accumulator = self.counters, self.accumulator
        window = self.run_length.window(counters.micro_step)
        counts = self._counts(window)
        if not accumulator.pending:
            accumulator.open_window(window.size, counts.targets)
            if self.policy is not None:
                self.policy.prepare(lambda: self._batches(window), self.student, counts)

        batch = self._batch(counters.micro_step)
        weights = self.weights(window.first_micro_step)
        result = self._forward(batch, weights, counts)
        self.precision.backward(result.loss)
        self._add_to_sums(result, accumulator.num_items)

        closes = accumulator.should_step()
        if closes:
            self._close_window(empty=accumulator.num_items == 0)
        if closes or self.config.scheduler_unit == "batch":
            step_scheduler(self.scheduler)
        accumulator.advance()
        counters.micro_step += 1
        counters.tokens += batch.num_targets
        return closes

    def _forward(self, batch: Batch, weights: dict[str, float], counts: LossCounts) -> StepOutput:
        """The loss of a micro-batch, its share of the window's."""
        objective = self.objective(weights)
        names = () if self.structural is None else self.structural.active(weights)
        if self.structural is None or self.structural_student is None or not names:
            teacher = None
            if self.policy is not None and objective.kd_weight:
                teacher = self.policy.forward(batch).teacher
            out = self.student(batch, teacher, objective, num_items=max(counts.targets, 1))
            return StepOutput(out.loss, out, {})
        assert self.policy is not None
        seen = self.policy.forward(batch, self.structural.teacher_capture(names))
        return self.structural_student(batch, seen, objective, weights, counts)

    def weights(self, micro_step: int) -> dict[str, float]:
        """Of the divergence and the structural losses, in the window that begins at
        ``micro_step``."""
        return self.curriculum.weights(micro_step if self.config.use_curriculum else None)

    def objective(self, weights: dict[str, float]) -> Objective:
        """What a window with these weights minimises on logits: one objective for all of it."""
        share = 1.0 if self.taid is None else self.taid.value
        return self.config.objective(kd_weight=weights["kd"], teacher_share=share)

    def _close_window(self, *, empty: bool) -> None:
        """Unscale, clip, check, update, average, clear. Only TAID waits for the device: its
        share of the teacher follows the loss."""
        self._lr = self.optimizer.param_groups[0]["lr"]
        if not empty:  # a zero gradient would still apply decay and momentum
            update = self.precision.step(self.optimizer, self.config.max_grad_norm)
            if self.ema is not None:
                self.ema.update(update.ok)
            self._grad_norm = update.norm
            total, streak, longest = self.skipped
            streak = (streak + 1) * update.skipped
            self.skipped = torch.stack(
                [total + update.skipped, streak, torch.maximum(longest, streak)]
            )
        self.precision.zero_grad(self.optimizer)
        self.counters.global_step += 1
        if self.taid is not None:
            progress = (self.counters.micro_step + 1) / self.run_length.micro_batches
            self.taid.update(float(self.window_loss), progress)  # waits for the device
        self.window_loss.zero_()

    # Once in a while

    def evaluate(self, log: RunLog) -> None:
        """Score the raw and the averaged weights; export the best. Training is left untouched."""
        config, counters = self.config, self.counters
        variants: dict[str, Any] = {"eval": nullcontext}
        if self.ema is not None:
            variants["eval_ema"] = self.ema.swapped
        batches = self.inputs.eval_batches(config)
        teacher = self.inputs.teacher
        with nullcontext() if self.policy is None else self.policy.scoring():
            metrics = evaluate_student(self.student, teacher, batches, variants, self.structural)
        weights = self.weights(min(counters.micro_step, self.run_length.micro_batches - 1))
        parts = {"nll": self.config.objective().ce_weight, "kl": weights["kd"]}
        if self.structural is not None:
            parts |= self.structural.weights(weights)
        for prefix in variants:
            values = {name: metrics.get(f"{prefix}/{name}", 0.0) for name in parts}
            metrics[f"{prefix}/loss"] = sum(w * values[name] for name, w in parts.items())
        counters.metrics, counters.evaluated_at = metrics, counters.micro_step
        log.evaluation(self._position() | metrics)

        value = metrics[self.metric_for_best]
        if value < counters.best_value:  # a tie keeps the earlier one, NaN never wins
            counters.best_value, counters.best_micro_step = value, counters.micro_step
            self.export(self.run_dir.best)

    def export(self, target: Path) -> None:
        """Write the student that was scored: the averaged weights if those are what is compared."""
        averaged = self.metric_for_best.startswith("eval_ema/")
        facts = {
            "metric": self.metric_for_best,
            "value": self.counters.metrics[self.metric_for_best],
            "weights": "ema" if averaged else "raw",
            "micro_step": self.counters.micro_step,
        }
        with self.ema.swapped() if averaged and self.ema else nullcontext():
            self.run_dir.export(
                target,
                self.student.model,
                self.inputs.tokenizer,
                self.inputs.valid_vocab,
                facts,
            )

    def save(self, log: RunLog, *, must: bool = False) -> Path | None:
        """Write a checkpoint. One periodic failure is a warning; a second, or a last one, stops."""
        try:
            state, tensors = self.capture()
            path = save_checkpoint(
                self.run_dir.path,
                self.counters.micro_step,
                state,
                tensors,
                save_total_limit=self.config.save_total_limit,
                report=log.warning,
            )
        except CheckpointError as error:
            self._failed_saves += 1
            if must or self._failed_saves > 1:
                raise
            log.warning(f"{error}; training goes on until the next save")
            return None
        self._failed_saves = 0
        log.saved(self._position() | {"path": path.name})
        self.run_dir.write_status("running", checkpoint=path.name)
        return path

    # What a checkpoint holds

    def capture(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Everything that decides how training goes on, as plain values and named tensors."""
        optimizer, moments = optimizer_state(self.optimizer, self.precision.optimizer_parameters)
        rng, generators = rng_state()
        policy, gates = ({}, {}) if self.policy is None else self.policy.state_dict()
        ema = None if self.ema is None else self.ema.state_dict()
        shadow = {} if ema is None else ema.pop("shadow")
        state = {
            "identity": self.identity,
            "counters": asdict(self.counters),
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.precision.state_dict(),
            "curriculum": self.curriculum.state_dict(),
            "ema": ema,
            "rng": rng,
            "sums": self.sums.tolist(),
            "terms": {"sums": self.term_sums.tolist(), "counts": list(self.term_counts)},
            "window_loss": float(self.window_loss),
            "teaching": policy,
            "taid": None if self.taid is None else self.taid.state_dict(),
            "skipped": self.skipped.tolist(),
            **self.accumulator.state_dict(),
        }
        masters = self.precision.masters
        tensors = {
            "model": model_tensors(self.student.model),
            "masters": {} if masters is None else masters.separate,
            "optimizer": moments,
            "ema": shadow,
            "teaching": gates,
            "structure": {} if self.structural is None else model_tensors(self.structural),
            "grads": gradient_tensors(self._trained()),
            "rng": generators,
        }
        return state, tensors

    def restore(self, checkpoint: Checkpoint, warn: Callable[[str], None]) -> None:
        """Continue exactly where ``checkpoint`` was taken; every tensor is filled in place.

        Raises ``UsageError`` if the configuration or the data would take another course, unless
        ``allow_config_change`` says that this is meant, and ``CheckpointError`` for other tensors.
        """
        state, tensors = checkpoint.state, checkpoint.tensors
        changed = require_same_run(state["identity"], self.identity, self.config, warn)
        configured = [{key: group[key] for key in OPTIONS} for group in self.optimizer.param_groups]
        decay = None if self.ema is None else (self.ema.decay, self.ema.warmup)
        load_model(self.student.model, tensors["model"])
        if self.structural is not None:
            load_tensors(model_tensors(self.structural), tensors.get("structure", {}), "structure")
        if self.policy is not None:
            self.policy.load_state_dict(state.get("teaching", {}), tensors.get("teaching", {}))
        if self.precision.masters is not None:
            load_tensors(self.precision.masters.separate, tensors["masters"], "master")
        load_optimizer(
            self.optimizer,
            self.precision.optimizer_parameters,
            state["optimizer"],
            tensors["optimizer"],
        )
        self.scheduler.load_state_dict(state["scheduler"])
        self.precision.load_state_dict(state["scaler"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"] | {"shadow": tensors["ema"]})
        if changed:  # what the new configuration says wins over what the old one left behind
            for group, options in zip(self.optimizer.param_groups, configured, strict=True):
                group.update(options)
            self.scheduler.base_lrs = [options["initial_lr"] for options in configured]
            if self.ema is not None and decay is not None:
                self.ema.decay, self.ema.warmup = decay
        else:
            self.curriculum.load_state_dict(state["curriculum"])
        self.accumulator.load_state_dict(state)
        load_gradients(self._trained(), tensors["grads"])
        if self.taid is not None and state.get("taid") is not None:
            self.taid.load_state_dict(state["taid"])
        self.window_loss.fill_(state.get("window_loss", 0.0))
        terms = state.get("terms", {"sums": [], "counts": []})  # none before there were any
        if len(terms["counts"]) == len(self.term_counts):  # else the losses have changed
            self.term_sums.copy_(torch.tensor(terms["sums"], dtype=torch.float64))
            self.term_counts = list(terms["counts"])
        self.counters = Counters(**state["counters"])
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.skipped.copy_(torch.tensor(state["skipped"]))
        lacking = load_rng(state["rng"], tensors["rng"])  # last: building objects draws numbers
        if lacking:
            warn(f"random numbers of {', '.join(lacking)} start anew: there is no such device here")

    # Details

    def _rows(self, micro_step: int) -> np.ndarray:
        """The numbers of the rows in a micro-batch: a pure function of seed and position."""
        epoch, batch = self.run_length.position(micro_step)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_permutation(self.config.seed, epoch, len(self.train_rows))
        size = self.config.per_device_train_batch_size
        return self._order[1][batch * size : (batch + 1) * size]

    def _batch(self, micro_step: int) -> Batch:
        return self.train_rows.batch(self._rows(micro_step)).to(self.device)

    def _batches(self, window: Window) -> Iterator[Batch]:
        for step in range(window.first_micro_step, window.first_micro_step + window.size):
            yield self._batch(step)

    def _counts(self, window: Window) -> LossCounts:
        """What all micro-batches of a window hold: a pure function of its position."""
        steps = range(window.first_micro_step, window.first_micro_step + window.size)
        return self.train_rows.counts(np.concatenate([self._rows(step) for step in steps]))

    def _trained(self) -> dict[str, Tensor]:
        """Every parameter that collects gradients, by its name in checkpoints."""
        ours: dict[str, Tensor] = dict(self.student.model.named_parameters())
        return ours | structural_loss_parameters(self.structural)

    def _every(self, steps: int | None) -> bool:
        last = self.counters.micro_step == self.run_length.micro_batches
        return bool(steps) and (last or self.counters.global_step % steps == 0)

    def _epoch_ends(self) -> bool:
        return self.counters.micro_step % self.run_length.batches_per_epoch == 0

    def _position(self) -> dict[str, Any]:
        epoch, batch = self.run_length.position(self.counters.micro_step)
        return {
            "micro_step": self.counters.micro_step,
            "global_step": self.counters.global_step,
            "epoch": epoch + batch / self.run_length.batches_per_epoch,
        }

    def _add_to_sums(self, result: StepOutput, num_items: int) -> None:
        out = result.distill
        loss = out.loss.detach() * num_items
        parts = (loss, out.ce, out.kd, out.z, out.num_tokens, out.correct, out.agree)
        self.sums += torch.stack([part.double() for part in parts])
        self.window_loss += out.loss.detach()
        for i, name in enumerate(self.term_names):
            if name in result.terms:
                term = result.terms[name]
                self.term_sums[i] += term.sum.detach()
                self.term_counts[i] += term.count

    def log_progress(self, log: RunLog, throughput: ThroughputMeter) -> None:
        """One record, and the only place where the loop waits for the device."""
        loss, ce, kd, z, targets, correct, agree = self.sums.tolist()
        skipped, _, longest = self.skipped.tolist()
        window = self.run_length.window(self.counters.micro_step - 1)
        weights = self.weights(window.first_micro_step)
        objective = self.objective(weights)
        shown = _weights(objective)
        per_target = 1 / targets if targets else math.nan
        terms, structural = self._terms(), 0.0
        if self.structural is not None:
            of_terms = self.structural.weights(weights)
            structural = sum(w * terms[name] for name, w in of_terms.items() if name in terms)
            shown |= of_terms
        record = self._position() | {
            "tokens": self.counters.tokens,
            "loss": loss * per_target + structural,
            "ce": ce * per_target,
            "kd": kd * per_target,
            "z": z * per_target,
            "accuracy": correct * per_target,
            "agreement": agree * per_target,
            **terms,
            "weights": shown,
            "lr": self._lr,
            "grad_norm": float(self._grad_norm),
            "loss_scale": self.precision.loss_scale,
            "skipped": skipped,
            "tokens_per_second": throughput.rate(self.counters.tokens),
            **memory_now(self.device),
        }
        if self.taid is not None:
            record["teacher_share"] = self.taid.value
        if self.ema is not None:
            record |= {"num_updates": self.ema.num_updates, "ema_decay": self.ema.effective_decay}
        log.train(record)
        self.sums.zero_()
        self.term_sums.zero_()
        self.term_counts = [0] * len(self.term_names)
        self.skipped[2] = self.skipped[1]
        if longest >= self.config.max_nonfinite_steps:
            values = {"ce": ce * per_target, "kd": kd * per_target} | terms
            raise DivergedError(
                f"gradients must be finite, got {longest} updates in a row whose gradient was not "
                f"({', '.join(f'{name} {value:.4g}' for name, value in values.items())}); "
                "lower learning_rate, lengthen the warm-up, or train in bf16 or fp32"
            )

    def _terms(self) -> dict[str, float]:
        """The mean of each structural term since the last log line, over its own units."""
        sums = zip(self.term_names, self.term_sums.tolist(), self.term_counts, strict=True)
        return {name: value / count for name, value, count in sums if count}

    @property
    def metric_for_best(self) -> str:
        prefix = "eval" if self.ema is None else "eval_ema"
        return self.config.metric_for_best_model or f"{prefix}/{DEFAULT_BEST}"


def _taid(config: DistillConfig) -> TAIDSchedule | None:
    section = config.taid
    if not section.enabled:
        return None
    return TAIDSchedule(section.start, section.end, section.alpha, section.beta)


def _weights(objective: Objective) -> dict[str, float]:
    weights = {"ce": objective.ce_weight, "kd": objective.kd_weight}
    return weights | {"z": objective.z_loss} if objective.z_loss else weights
