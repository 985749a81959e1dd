"""Students of sparse targets against students of the whole teacher: gradients, and where they end.

The student is that of the recipe ``ablation``, whose teacher gives targets of K ids per token in
one of four forms:

==================  ================================================================================
zero                the K most likely ids, renormalised
bucket              the K most likely ids, and everything else as one further outcome
with replacement    K draws from the teacher, each of weight 1/K; repeated ids are merged
sampled             ``systematic_sample``: what a teacher cache holds
==================  ================================================================================

All but the third are encoded and decoded as in a cache, so that its rounding is part of the result.
A cache keeps one sample per token; here samples are drawn anew in each step, and no row of text is
met twice.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sad_kernels import Objective, TeacherTopK, linear_distill_loss
from torch import Tensor

from sad.checkpoint.run_directory import RunDirectory
from sad.config.load import load_config
from sad.config.schema import DistillConfig
from sad.data.batch import Batch
from sad.environment import seed_everything
from sad.losses.capture import Capture
from sad.models.heads import split_head, with_valid_vocab
from sad.models.load import load_student
from sad.optim.precision import Precision
from sad.teachers.cache import sparse
from sad.teachers.frozen import FrozenTeacher, TeacherOutput
from sad.training.evaluate import evaluate_student
from sad.training.inputs import RunInputs, load_inputs
from sad.training.student import StudentWithLoss, build_student
from sad.training.trainer import Trainer

Json = dict[str, Any]

FORMS = ("zero", "bucket", "with replacement", "sampled")
RANDOM = ("with replacement", "sampled")


@dataclass(frozen=True)
class Sizes:
    """How much is measured; smaller in tests."""

    steps: int = 150
    early: int = 50  # the step after which most gradients are taken
    rows: int = 6  # held-out rows of a gradient
    samples: int = 3  # per random form
    ks: tuple[int, ...] = (8, 16, 32, 64, 128)
    k: int = 64  # of the rows for another temperature and for the end of training
    eval_rows: int = 64
    documents: int | None = None  # of the standard library; None: all


class Arm(NamedTuple):
    """A student: the form of its targets and K. Without a K: ``full`` or ``CE alone``."""

    form: str
    k: int | None = None

    @property
    def name(self) -> str:
        return self.form if self.k is None else f"{self.form} {self.k}"


ARMS = (
    Arm("full"),
    Arm("sampled", 64),
    Arm("sampled", 8),
    Arm("bucket", 64),
    Arm("bucket", 8),
    Arm("zero", 8),
    Arm("CE alone"),
)


def sparse_target(
    form: str,
    logits: Tensor,  # [n, V]
    k: int,
    temperature: float,
    generator: torch.Generator,
) -> TeacherTopK:
    """The teacher's distribution at a temperature in one of ``FORMS``: ids and weights [n, K]."""
    vocab = logits.shape[1]
    if form in ("zero", "bucket"):
        record = sparse.encode(*sparse.top_k(logits, k, (temperature,)), vocab)
        return TeacherTopK(
            *sparse.decode(record, 0, temperature), tail="zero" if form == "zero" else "bucket"
        )
    p = (logits.double() / temperature).softmax(1)
    if form == "sampled":
        uniform = torch.rand(len(p), generator=generator, dtype=torch.float64)
        ids, weights = sparse.systematic_sample(p, k, uniform)
        return TeacherTopK(
            *sparse.decode(sparse.encode(ids, weights.log(), None, vocab)), tail="zero"
        )
    drawn = torch.multinomial(p, k, replacement=True, generator=generator).sort(1).values
    counts = (drawn[:, :, None] == drawn[:, None, :]).sum(2).float()
    repeated = torch.nn.functional.pad(drawn[:, 1:] == drawn[:, :-1], (1, 0))
    log_weights = (counts / k).log().masked_fill(repeated, -torch.inf)
    return TeacherTopK(drawn, log_weights, tail="zero")


class SparseTeacher(FrozenTeacher):
    """A teacher of which the student sees K ids per token."""

    def __init__(self, dense: FrozenTeacher, arm: Arm, temperature: float, seed: int) -> None:
        super().__init__(dense.model, dense.head().vocab_size, device=dense.device)
        self.arm, self.temperature = arm, temperature
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        (target,) = super().forward(batch).targets
        logits = target.head(target.hidden.flatten(0, 1)).float()
        assert self.arm.k is not None
        found = sparse_target(self.arm.form, logits, self.arm.k, self.temperature, self.generator)
        targets: Any = (_like(batch, found),)
        return TeacherOutput(targets)


def _like(batch: Batch, target: TeacherTopK) -> TeacherTopK:
    """The target of rows [B L, K] as one of the batch, [B, L, K]."""
    shape = batch.input_ids.shape
    ids, log_probs = (x.unflatten(0, shape) for x in (target.ids, target.log_probs))
    return replace(target, ids=ids, log_probs=log_probs)


# Gradients


def gradients(sizes: Sizes) -> Json:
    """Distance of the gradient of the student's parameters from that of full distillation.

    Of the KD term alone, on held-out rows; ``error`` is relative to the full gradient's norm and
    ``cosine`` its cosine, both means over the samples of random forms. ``tail`` is the teacher's
    mean mass beyond K ids.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = _config(sizes, folder, seed=0)
        inputs = load_inputs(config)
        trainer = _trainer(config, inputs, folder)
        _train(trainer, sizes.early)
        rows = [
            row for k in sizes.ks for row in _gradient_rows(trainer, sizes, sizes.early, k, 1.0)
        ]
        rows += _gradient_rows(trainer, sizes, sizes.early, sizes.k, 2.0)
        _train(trainer, sizes.steps)
        rows += _gradient_rows(trainer, sizes, sizes.steps, sizes.k, 1.0)
    return {"rows": rows}


def _gradient_rows(
    trainer: Trainer, sizes: Sizes, step: int, k: int, temperature: float
) -> list[Json]:
    inputs, student = trainer.inputs, trainer.student
    assert inputs.frozen_teacher is not None
    numbers = inputs.eval_row_numbers(trainer.config)[: sizes.rows]
    batch = inputs.eval_rows.batch(numbers)
    (dense,) = inputs.frozen_teacher.forward(batch).targets
    objective = Objective(temperature=temperature)
    full, kl = _gradient(student, batch, dense, objective)
    with torch.no_grad():
        logits = dense.head(dense.hidden.flatten(0, 1)).float()
    tail = sparse.top_k(logits, k, (temperature,))[2].mean().item()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for form in FORMS:
        errors, cosines = [], []
        for _ in range(sizes.samples if form in RANDOM else 1):
            target = _like(batch, sparse_target(form, logits, k, temperature, generator))
            gradient, _ = _gradient(student, batch, target, objective)
            errors.append(((gradient - full).norm() / full.norm()).item())
            cosines.append(torch.cosine_similarity(gradient, full, dim=0).item())
        row = {"step": step, "temperature": temperature, "k": k, "kl": kl, "tail": tail}
        row |= {"form": form, "error": _mean(errors), "cosine": _mean(cosines)}
        rows.append(row)
    return rows


def _gradient(
    student: StudentWithLoss, batch: Batch, target: Any, objective: Objective
) -> tuple[Tensor, float]:
    """The gradient of all of the student's parameters as one vector in float64, and the loss."""
    hidden = student.hidden(batch)
    head = with_valid_vocab(split_head(student.model)[1], student.valid_vocab)
    out = linear_distill_loss(hidden, head, batch.labels, target, objective)
    parts = torch.autograd.grad(out.loss, [p for p in student.parameters() if p.requires_grad])
    return torch.cat([part.flatten().double() for part in parts]), out.loss.item()


# Students


def train_student(arm: Arm, seed: int, sizes: Sizes) -> Json:
    """Train by the recipe with this arm's targets; the averaged student's scores on held-out text,
    against the whole teacher."""
    with tempfile.TemporaryDirectory() as folder:
        config = _config(sizes, folder, seed)
        if arm.form == "CE alone":
            config = replace(config, kd_weight=0.0)
        inputs = load_inputs(config)
        assert inputs.frozen_teacher is not None
        if arm.k is not None:
            teacher = SparseTeacher(inputs.frozen_teacher, arm, config.temperature, seed)
            trainer = _trainer(config, replace(inputs, teacher=teacher), folder)
        else:
            trainer = _trainer(config, inputs, folder)
        _train(trainer, sizes.steps)
        scores = evaluate_student(
            trainer.student,
            inputs.eval_teacher,
            inputs.eval_batches(config),
            {"ema": trainer.averaged},
        )
    return {name: scores[f"ema/{name}"] for name in ("kl", "nll", "agreement")}


def _config(sizes: Sizes, folder: str, seed: int) -> DistillConfig:
    words = {"output_dir": folder, "seed": seed}
    words |= {"max_steps": sizes.steps, "max_eval_rows": sizes.eval_rows}
    if sizes.documents is not None:
        words |= {"data.max_documents": sizes.documents}
    if sizes.steps <= 20:  # the recipe's warm-up would be the whole run
        words |= {"warmup_steps": 0}
    return load_config("ablation", [w for k, v in words.items() for w in (f"--{k}", str(v))])


def _trainer(config: DistillConfig, inputs: RunInputs, folder: str) -> Trainer:
    seed_everything(config.seed)
    precision = Precision(config, inputs.device)
    student = build_student(config, load_student(config), inputs.valid_vocab, precision)
    trainer = Trainer(config, student, inputs, precision, RunDirectory(Path(folder) / "run"))
    student.train()
    return trainer


def _train(trainer: Trainer, steps: int) -> None:
    """Train up to this step."""
    while trainer.counters.micro_step < steps:
        trainer.micro_batch()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
