"""Evaluation: what a student knows, and how close it is to its teacher, on held-out rows.

Temperature 1, no smoothing, no z-loss, no dropout: one pass over a batch gives cross-entropy and
forward KL of every target. Sums are added in float64 on the device and divided once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from sad_kernels import DistillOutput, Objective, linear_distill_loss

from sad.data.batch import Batch
from sad.losses.base import Terms
from sad.losses.structural import StructuralLosses
from sad.models.heads import eval_no_grad
from sad.teachers.frozen import FrozenTeacher
from sad.training.meters import EvalMeter
from sad.training.student import StructuredStudent, StudentWithLoss

Variants = Mapping[str, Callable[[], AbstractContextManager[object]]]
"""Prefix of the metrics -> context under which the student has the weights to score."""


SCORING = Objective(ce_weight=1.0, kd_weight=1.0)
SCORING_ALONE = Objective(ce_weight=1.0, kd_weight=0.0)


def evaluate_student(
    student: StudentWithLoss,
    teacher: FrozenTeacher | None,
    batches: Iterator[Batch],
    variants: Variants,
    structural: StructuralLosses | None = None,
) -> dict[str, float]:
    """Score the student under each variant of its weights, running the teacher once for all.

    Returns ``<prefix>/nll`` (nats per target), ``perplexity = exp(nll)``, ``kl`` (forward KL to the
    teacher, nats per target), ``agreement`` and ``accuracy`` (shares of targets whose argmax is the
    teacher's, the label), ``entropy`` (nats) and ``bits_per_byte``; with a ``structural`` each of
    its terms under its name, unweighted, per unit. Without a teacher there is no ``kl`` and no
    ``agreement``. Training mode, queues and random generators are left as they were.
    """
    scores = {prefix: EvalMeter() for prefix in variants}
    if structural is None or teacher is None:
        root, scored = student, _score_logits(student, teacher)
    else:
        root = StructuredStudent(student, structural)
        scored = _score_structure(root, teacher)
    with eval_no_grad(root):
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
    every = dict.fromkeys(student.structural.losses, 1.0)
    capture = student.structural.teacher_capture(tuple(every))

    def score(batch: Batch, variants: Variants) -> Scored:
        seen = teacher.forward(batch, capture)
        for prefix, weights in variants.items():
            with weights():
                result = student(batch, seen, SCORING, every, batch.counts)
            yield prefix, (result.distill, result.terms)

    return score


@torch.no_grad()
def evaluate_teacher(
    teacher: FrozenTeacher, batches: Iterator[Batch], prefix: str = "eval_teacher"
) -> dict[str, float]:
    """Score the teacher itself: the mark that its student is measured against."""
    score = EvalMeter()
    for batch in batches:
        output = teacher(batch)
        out = linear_distill_loss(output.hidden, output.head, batch.labels, None, SCORING_ALONE)
        score.add(out, batch)
    return score.metrics(prefix, against_teacher=False)
