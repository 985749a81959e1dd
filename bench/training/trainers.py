"""The contenders: every trainer trains the task's student, under the same monitor."""

from __future__ import annotations

import gc
import hashlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from sad_kernels import DistillOutput, Objective
from torch import Tensor

from bench.kernels.rss import _kib
from bench.kernels.timing import MIB, one_line
from bench.peers.base import Unsupported, require_attribute, require_module
from bench.training.task import Setup, Task, prepare, quality
from sad.checkpoint.run_directory import RunDirectory
from sad.data.batch import IGNORE_INDEX, Batch, LossCounts
from sad.optim.precision import Precision
from sad.report.log import RunLog
from sad.teachers.frozen import TeacherOutput
from sad.training.meters import ThroughputMeter
from sad.training.student import (
    NO_WEIGHTS,
    LossWeights,
    StepOutput,
    StudentWithLoss,
    build_student,
)
from sad.training.trainer import Trainer

OURS, NAIVE = "sad distill", "sad distill, naive loss"

Run = dict[str, Any]


def attempt(setup: Setup, name: str, seed: int) -> Run:
    """One run of one contender; an exception becomes its status and reason."""
    try:
        task = prepare(setup, seed)
        monitor = RunMonitor(task)
        with tempfile.TemporaryDirectory() as folder:
            CONTENDERS[name].train(task, monitor, folder)
        scores = quality(task) if setup.eval_rows else {}
        return {"status": "ok", "reason": None} | monitor.result() | scores
    except Unsupported as error:
        return {"status": "skipped", "reason": str(error)}
    except Exception as error:  # whatever a foreign trainer may raise
        return {"status": "failed", "reason": one_line(error)}


class RunMonitor:
    """Measures the time, memory and input tokens of a run.

    A contender calls ``begin`` before its first step and ``step`` after each, and appends the loss
    of each step to ``losses``.
    """

    def __init__(self, task: Task) -> None:
        self.setup = task.setup
        self.losses: list[Tensor] = []
        self._read: list[Tensor] = []
        self._times: list[float] = []
        self._steps = 0
        self._start = self._peak = 0.0
        embedding = task.student.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda _, inputs: self._record(*inputs))

    def _record(self, ids: Tensor) -> None:
        if (
            self._steps < self.setup.warmup + self.setup.steps
        ):  # later ones belong to the evaluation
            self._read.append(ids[:, : self.setup.length].clone())

    def begin(self) -> None:
        gc.collect()
        if self.setup.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated() / MIB
        else:
            Path("/proc/self/clear_refs").write_text("5")  # see bench.kernels.rss
            self._start = _kib("VmRSS") / 1024

    def step(self) -> None:
        self._steps += 1
        if self._steps not in (self.setup.warmup, self.setup.warmup + self.setup.steps):
            return
        # Wait for the device at the two ends of the timed steps only.
        if self.setup.device == "cuda":
            torch.cuda.synchronize()
            self._peak = torch.cuda.max_memory_allocated() / MIB
        else:
            self._peak = _kib("VmHWM") / 1024
        self._times.append(time.perf_counter())

    def result(self) -> Run:
        """Times, memory and losses; ``witness`` is a hash of all tokens that the student read."""
        setup = self.setup
        begin, end = self._times
        read = torch.cat(self._read).cpu().numpy()
        return {
            "tokens_per_s": setup.steps * setup.rows * setup.length / (end - begin),
            "start_mib": self._start,
            "peak_mib": self._peak,
            "losses": [float(loss) for loss in self.losses],
            "witness": hashlib.sha256(read.tobytes()).hexdigest()[:16],
        }


# Sad's loop


def sad_fused(task: Task, monitor: RunMonitor, folder: str) -> None:
    precision = Precision(task.config, task.inputs.device)
    student = build_student(task.config, task.student, task.setup.vocab, precision)
    _sad(task, monitor, folder, student, precision)


def sad_naive(task: Task, monitor: RunMonitor, folder: str) -> None:
    precision = Precision(task.config, task.inputs.device)
    _sad(task, monitor, folder, NaiveStudent(task.student, task.setup.vocab), precision)


def _sad(
    task: Task, monitor: RunMonitor, folder: str, student: StudentWithLoss, precision: Precision
) -> None:
    """``Trainer.train`` up to its final evaluation."""
    trainer = Trainer(task.config, student, task.inputs, precision, RunDirectory(folder))
    student.train()
    student.register_forward_hook(lambda *call: monitor.losses.append(call[-1].loss.detach()))
    with RunLog(folder, total_batches=trainer.run_length.micro_batches, stream=sys.stderr) as log:
        throughput = ThroughputMeter(trainer.counters.tokens)
        monitor.begin()
        while trainer.counters.micro_step < trainer.run_length.micro_batches:
            trainer.micro_batch()
            log.advance()
            if trainer.counters.global_step % task.config.logging_steps == 0:
                trainer.log_progress(log, throughput)
            monitor.step()


class NaiveStudent(StudentWithLoss):
    """Sad's student with a hand-written loss, without the accuracy metrics and their cost."""

    def forward(
        self,
        batch: Batch,
        teacher: TeacherOutput | None,
        objective: Objective,
        counts: LossCounts,
        weights: LossWeights = NO_WEIGHTS,
    ) -> StepOutput:
        assert teacher is not None and not weights.keys() - {"kd"}
        (target,) = teacher.targets
        ids, positions = batch.input_ids, batch.position_ids
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        teacher_logits = target.head(target.hidden)
        ce, kd, count = naive_sums(logits, teacher_logits, batch.labels, objective.temperature)
        loss = (objective.ce_weight * ce + objective.kd_weight * kd) / max(counts.targets, 1)
        none = torch.zeros_like(ce)
        out = DistillOutput(loss, ce.detach(), kd.detach(), none, count, none, none, none, none)
        return StepOutput(loss, out, {})


def naive_sums(
    logits: Tensor,  # [B, L, V]
    teacher_logits: Tensor,  # [B, L, V]
    labels: Tensor,  # [B, L]
    T: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of cross-entropy and forward KL over the tokens with a label, in fp32, and their number.

    Tokens without a label are masked in the sum: selecting the others would copy all logits.
    """
    keep = labels != IGNORE_INDEX
    logits, teacher_logits = logits.float(), teacher_logits.float()
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    log_q, log_p = F.log_softmax(logits / T, -1), F.log_softmax(teacher_logits / T, -1)
    per_token = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # [B, L]
    return ce, (per_token * keep).sum() * T**2, keep.sum()


# Trainers of transformers and TRL


class StepCallback(transformers.TrainerCallback):
    """Tells the monitor of every optimizer step."""

    def __init__(self, monitor: RunMonitor) -> None:
        self.monitor = monitor

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.monitor.step()


class RecipeTrainer(transformers.Trainer):
    """The usual recipe: teacher under ``no_grad``, fp32 softmax of both, a weighted sum."""

    def __init__(self, task: Task, monitor: RunMonitor, **options: Any) -> None:
        super().__init__(model=task.student, **options)
        self.teacher, self.objective, self.monitor = task.teacher, task.config.objective(), monitor

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, labels, objective = inputs["input_ids"], inputs["shift_labels"], self.objective
        with torch.no_grad():
            teacher_logits = self.teacher(input_ids=ids).logits
        logits = model(input_ids=ids).logits
        ce, kd, count = naive_sums(logits, teacher_logits, labels, objective.temperature)
        loss = (objective.ce_weight * ce + objective.kd_weight * kd) / count
        self.monitor.losses.append(loss.detach())
        return loss


def recipe(task: Task, monitor: RunMonitor, folder: str) -> None:
    require_module("accelerate", "accelerate")
    batch = task.inputs.train_rows.batch(task.order)
    rows: Any = [
        {"input_ids": ids, "shift_labels": labels}
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]
    arguments = transformers.TrainingArguments(**_arguments(task, folder))
    trainer = RecipeTrainer(
        task, monitor, args=arguments, train_dataset=rows, **_common_parts(task, monitor)
    )
    monitor.begin()
    trainer.train()


def trl_gkd(task: Task, monitor: RunMonitor, folder: str) -> None:
    """TRL's GKDTrainer. It shifts labels itself, so rows get one more token, which it drops."""
    with warnings.catch_warnings(action="ignore"):  # experimental API, deprecated argument names
        gkd = require_module("trl.experimental.gkd", "trl")
        arguments = gkd.GKDConfig(
            lmbda=0.0,  # learn from the text
            beta=0.0,  # forward KL
            gradient_checkpointing=False,
            **_arguments(task, folder),
        )
    objective = task.config.objective()

    class WithCrossEntropy(gkd.GKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **options: Any) -> Any:
            items = options["num_items_in_batch"]
            kd, outputs = super().compute_loss(model, inputs, True, items)
            labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
            ce = F.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten())
            loss = objective.ce_weight * ce + objective.kd_weight * kd
            monitor.losses.append(loss.detach())
            return loss

    batch = task.inputs.train_rows.batch(task.order)
    ids = F.pad(batch.input_ids, (0, 1))
    rows = {
        "input_ids": ids.tolist(),
        "attention_mask": torch.ones_like(ids).tolist(),  # padding is last, and unseen
        "labels": F.pad(batch.labels, (1, 0), value=IGNORE_INDEX).tolist(),
    }
    trainer = WithCrossEntropy(
        model=task.student,
        teacher_model=task.teacher,
        args=arguments,
        train_dataset=require_module("datasets", "datasets").Dataset.from_dict(rows),
        processing_class=task.inputs.tokenizer,
        **_common_parts(task, monitor),
    )
    monitor.begin()
    trainer.train()


def trl_distillation(task: Task, monitor: RunMonitor, folder: str) -> None:
    require_attribute(require_module("trl", "trl"), "DistillationTrainer", "trl")
    raise Unsupported(
        "learns only from texts that the student writes, and cannot be given these rows"
    )


def _common_parts(task: Task, monitor: RunMonitor) -> dict[str, Any]:
    return {
        "data_collator": transformers.default_data_collator,
        "optimizers": task.optimizers(),
        "callbacks": [StepCallback(monitor)],
    }


def _arguments(task: Task, folder: str) -> dict[str, Any]:
    """Fields of ``TrainingArguments``. No autocast: parameters have the compute dtype."""
    return {
        "output_dir": folder,
        "max_steps": task.config.max_steps,
        "per_device_train_batch_size": task.setup.rows,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": task.config.max_grad_norm,
        "logging_steps": task.config.logging_steps,
        "bf16": False,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": task.setup.device == "cuda",
        "use_cpu": task.setup.device == "cpu",
        "seed": task.config.seed,
    }


class Contender(NamedTuple):
    word: str  # on the command line
    what: str
    train: Callable[[Task, RunMonitor, str], None]


CONTENDERS = {
    OURS: Contender(
        "ours", "The loop of `sad distill`: the loss from hidden states and heads.", sad_fused
    ),
    NAIVE: Contender(
        "naive", "The same loop with the loss of both models' whole logits.", sad_naive
    ),
    "transformers.Trainer": Contender(
        "transformers",
        "A subclass whose `compute_loss` takes that naive loss of whole logits.",
        recipe,
    ),
    "trl GKDTrainer": Contender(
        "gkd",
        "Off-policy with forward KL, in the dtype of the logits; a subclass adds the cross-entropy "
        "that it lacks.",
        trl_gkd,
    ),
    "trl DistillationTrainer": Contender(
        "distillation", "TRL's trainer of its stable part.", trl_distillation
    ),
}


def named(words: Sequence[str], among: Sequence[str] = tuple(CONTENDERS)) -> list[str]:
    """The contenders of ``among`` that have these words, in its order; without words all."""
    known = {CONTENDERS[name].word: name for name in among}
    for word in words:
        if word not in known:
            raise SystemExit(
                f"error: --only must be some of {', '.join(known)}, got {word!r}; choose of these"
            )
    return [name for word, name in known.items() if not words or word in words]
