"""Evaluation on held-out rows: what a student knows, and how close it is to its teacher.

Temperature 1, no smoothing, no z-loss, no dropout: one pass over a batch gives cross-entropy and
forward KL of every target. Sums are added in float64 on the device and divided once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from sad_kernels import Objective, TeacherHidden, TeacherTopK, linear_distill_loss

from sad.data.batch import Batch
from sad.distributed.world import ALONE, World
from sad.errors import UnfitError
from sad.metrics import KL_BOUND
from sad.models.heads import eval_no_grad
from sad.teachers.frozen import Teacher
from sad.teachers.vocabulary import scored_labels
from sad.training.meters import EvalMetrics
from sad.training.student import StudentWithLoss

Variants = Mapping[str, Callable[[], AbstractContextManager[object]]]
"""Prefix of the metrics -> context under which the student has the weights to score."""


OBJECTIVE = Objective(ce_weight=1.0, kd_weight=1.0)
OBJECTIVE_CE_ONLY = Objective(ce_weight=1.0, kd_weight=0.0)


def evaluate_student(
    student: StudentWithLoss,
    teacher: Teacher | None,
    batches: Iterator[Batch],
    variants: Variants,
    losses: Sequence[str] = (),
    world: World = ALONE,
) -> dict[str, float]:
    """Score the student under each variant of its weights, running the teacher once for all.

    ``batches`` are this rank's part of those that the ranks of ``world`` score, as many on each.

    Returns ``<prefix>/nll`` (nats per target), ``perplexity = exp(nll)``, ``kl`` (forward KL to the
    teacher, nats per target), ``agreement`` and ``accuracy`` (shares of targets whose argmax is the
    teacher's, the label), ``entropy`` (nats), ``bits_per_byte``, and each term of the structural
    ``losses`` under its name, unweighted, per unit; nothing is hooked for others. Without a teacher
    there is no ``kl`` and no ``agreement``, which are means over the targets that the teacher has
    an answer for; where of its ids only the most likely are known, the bound ``kl_bucket`` stands
    for ``kl``. Training mode, queues and random generators are left as they were.
    """
    objective = OBJECTIVE_CE_ONLY if teacher is None else OBJECTIVE
    weights = dict.fromkeys(losses, 1.0)
    capture = student.teacher_capture(weights)

    metrics = {prefix: EvalMetrics(student.term_names) for prefix in variants}
    divergence = None if teacher is None else "kl"
    with eval_no_grad(student):
        for batch in batches:
            output = None if teacher is None else teacher.forward(batch, capture)
            if output is not None and isinstance(output.targets[0], TeacherTopK):
                divergence = KL_BOUND
            compared = None
            if output is not None and output.kd_weights is not None:
                compared = ((batch.labels >= 0) & (output.kd_weights > 0)).sum()
            for prefix, with_weights in variants.items():
                with with_weights():
                    result = student(batch, output, objective, batch.counts, weights)
                metrics[prefix].update(result.distill, batch, result.terms, compared)
    if teacher is not None:
        teacher.release()
    return {
        f"{prefix}/{name}": value
        for prefix, of_variant in metrics.items()
        for name, value in of_variant.compute(divergence, world=world).items()
    }


def require_finite_score(scores: Mapping[str, float], prefix: str, who: str) -> None:
    """Raise ``UnfitError`` unless a model that was scored for a start has a finite loss."""
    nll = scores.get(f"{prefix}/nll", 0.0)
    if not math.isfinite(nll):
        raise UnfitError(
            f"{who} must have a finite loss on the held-out text, got {nll}; its weights are "
            "damaged, or it overflows in its dtype: compute in bf16 or fp32 (for a teacher, "
            "teacher_dtype)"
        )


@torch.no_grad()
def evaluate_teacher(
    teacher: Teacher,
    batches: Iterator[Batch],
    prefix: str = "eval_teacher",
    world: World = ALONE,
) -> dict[str, float]:
    """Score the teacher itself: the mark that its student is measured against.

    One with another tokenizer is scored on its own tokens of the same text. Of a teacher that lacks
    ids of the student's those targets count that it can read and name, and
    there are no ``bits_per_byte`` if that leaves any out.
    """
    metrics, left_out = EvalMetrics(), False
    for batch in batches:
        output = teacher.forward(batch)
        (target,) = output.targets
        assert isinstance(target, TeacherHidden)  # others give no likelihood of the text
        if batch.theirs is not None:  # it is scored on all of its own tokens
            batch, output = batch.theirs.batch, output._replace(kd_weights=None)
        labels = scored_labels(batch, output.kd_weights, target.head)
        left_out |= labels is not batch.labels and not torch.equal(labels, batch.labels)
        out = linear_distill_loss(target.hidden, target.head, labels, None, OBJECTIVE_CE_ONLY)
        metrics.update(out, batch)
    teacher.release()
    values = metrics.compute(None, world=world)
    if world.any(left_out):
        values.pop("bits_per_byte", None)
    return {f"{prefix}/{name}": value for name, value in values.items()}
