"""Evaluation: what a student knows, and how close it is to its teacher, on held-out rows.

Temperature 1, no smoothing, no z-loss, no dropout: one pass over a batch gives cross-entropy and
forward KL of every target. Sums are added in float64 on the device and divided once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sad_kernels import DistillOutput, Objective, linear_distill_loss
from torch import Tensor, nn

from sad.configfile import load_config
from sad.data import Batch
from sad.distillation import FrozenTeacher, StudentWithLoss, build_student
from sad.errors import UsageError
from sad.heads import probing
from sad.materials import gather
from sad.models import load_student
from sad.precision import Precision
from sad.rundir import RunDirectory
from sad.structure import Structure, StructuredStudent, Terms

Variants = Mapping[str, Callable[[], AbstractContextManager[object]]]
"""Prefix of the metrics -> context under which the student has the weights to score."""

ResultRow = dict[str, Any]

TABLE = ("nll", "perplexity", "bits_per_byte", "kl", "agreement", "accuracy")
"""The metrics of the result table."""

SCORING = Objective(ce_weight=1.0, kd_weight=1.0)
SCORING_ALONE = Objective(ce_weight=1.0, kd_weight=0.0)


def evaluate_student(
    student: StudentWithLoss,
    teacher: FrozenTeacher | None,
    batches: Iterator[Batch],
    variants: Variants,
    structure: Structure | None = None,
) -> dict[str, float]:
    """Score the student under each variant of its weights, running the teacher once for all.

    Returns ``<prefix>/nll`` (nats per target), ``perplexity = exp(nll)``, ``kl`` (forward KL to the
    teacher, nats per target), ``agreement`` and ``accuracy`` (shares of targets whose argmax is the
    teacher's, the label), ``entropy`` (nats) and ``bits_per_byte``; with a ``structure`` each of
    its terms under its name, unweighted, per unit. Without a teacher there is no ``kl`` and no
    ``agreement``. Training mode, queues and random generators are left as they were.
    """
    scores = {prefix: _Scores() for prefix in variants}
    if structure is None or teacher is None:
        root, scored = student, _score_logits(student, teacher)
    else:
        root = StructuredStudent(student, structure)
        scored = _score_structure(root, teacher)
    with probing(root):
        for batch in batches:
            for prefix, (out, terms) in scored(batch, variants):
                scores[prefix].add(out, batch)
                scores[prefix].add_terms(terms)
    metrics: dict[str, float] = {}
    for prefix, score in scores.items():
        metrics |= score.metrics(prefix, against_teacher=teacher is not None)
    return metrics


Scored = Iterator[tuple[str, tuple[DistillOutput, Terms]]]


def _score_logits(
    student: StudentWithLoss, teacher: FrozenTeacher | None
) -> Callable[[Batch, Variants], Scored]:
    objective = SCORING_ALONE if teacher is None else SCORING

    def score(batch: Batch, variants: Variants) -> Scored:
        target = None if teacher is None else teacher(batch)
        for prefix, weights in variants.items():
            with weights():
                out = student(batch, target, objective, num_items=max(batch.num_targets, 1))
            yield prefix, (out, {})

    return score


def _score_structure(
    student: StructuredStudent, teacher: FrozenTeacher
) -> Callable[[Batch, Variants], Scored]:
    every = dict.fromkeys(student.structure.losses, 1.0)
    capture = student.structure.teacher_capture(tuple(every))

    def score(batch: Batch, variants: Variants) -> Scored:
        seen = teacher.observe(batch, capture)
        for prefix, weights in variants.items():
            with weights():
                result = student(batch, seen, SCORING, every, batch.units)
            yield prefix, (result.distill, result.terms)

    return score


@torch.no_grad()
def evaluate_teacher(
    teacher: FrozenTeacher, batches: Iterator[Batch], prefix: str = "eval_teacher"
) -> dict[str, float]:
    """Score the teacher itself: the mark that its student is measured against."""
    score = _Scores()
    for batch in batches:
        output = teacher(batch)
        out = linear_distill_loss(output.hidden, output.head, batch.labels, None, SCORING_ALONE)
        score.add(out, batch)
    return score.metrics(prefix, against_teacher=False)


def evaluate_run(run_dir: str | Path) -> list[ResultRow]:
    """Score the best student of a finished or stopped run again, from what the run left on disk.

    Student and tokenizer come from ``best/``, as their users load them; text and teacher are those
    of the run's configuration. Returns rows of the result table: the teacher, if there is one, and
    the student. Raises ``UsageError`` for a directory that holds no scored student.
    """
    run = RunDirectory(run_dir)
    if not (run.best / "config.json").exists():
        raise UsageError(
            f"RUN_DIR must hold a scored student, got {run.path} without best/; let "
            "`sad distill` reach its first evaluation"
        )
    config = load_config(run.path / "config.yaml")
    config = replace(config, student=str(run.best), student_init="pretrained", tokenizer=None)
    materials = gather(config)
    rows = []
    if materials.teacher is not None:
        scores = evaluate_teacher(materials.teacher, materials.eval_batches(config))
        rows.append(result_row("teacher", materials.teacher.model, scores, "eval_teacher"))
    model = load_student(config)
    precision = Precision(config, materials.device)
    student = build_student(config, model, materials.valid_vocab, precision)
    scores = evaluate_student(
        student, materials.teacher, materials.eval_batches(config), {"eval": nullcontext}
    )
    rows.append(result_row("student, best", model, scores, "eval"))
    return rows


def result_row(name: str, model: nn.Module, metrics: Mapping[str, float], prefix: str) -> ResultRow:
    """One line of the result table; a metric that does not apply is None."""
    scores = {metric: metrics.get(f"{prefix}/{metric}") for metric in TABLE}
    return {"name": name, "parameters": sum(p.numel() for p in model.parameters())} | scores


class _Scores:
    """Float64 sums of one pass over the held-out rows."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # [6]
        self.bytes = 0
        self.terms: dict[str, tuple[Tensor, int]] = {}

    def add(self, out: DistillOutput, batch: Batch) -> None:
        parts = (out.ce, out.kd, out.num_tokens, out.correct, out.agree, out.entropy)
        sums = torch.stack([part.double() for part in parts])
        self.sums = sums if self.sums is None else self.sums + sums
        self.bytes += batch.target_bytes

    def add_terms(self, terms: Terms) -> None:
        for name, term in terms.items():
            value, count = self.terms.get(name, (0.0, 0))
            self.terms[name] = (value + term.sum.double(), count + term.count)

    def metrics(self, prefix: str, *, against_teacher: bool) -> dict[str, float]:
        if self.sums is None:
            return {}
        ce, kd, targets, correct, agree, entropy = self.sums.tolist()
        nll = ce / targets
        result = {
            "nll": nll,
            "perplexity": math.exp(nll) if nll < 700 else math.inf,
            "bits_per_byte": ce / (math.log(2) * self.bytes) if self.bytes else math.nan,
            "accuracy": correct / targets,
            "entropy": entropy / targets,
        }
        if against_teacher:
            result |= {"kl": kd / targets, "agreement": agree / targets}
        result |= {
            name: float(value) / max(count, 1) for name, (value, count) in self.terms.items()
        }
        return {f"{prefix}/{name}": value for name, value in result.items()}
