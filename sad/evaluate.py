"""Evaluation: what a student knows, and how close it is to its teacher, on held-out rows.

Temperature 1, no smoothing, no z-loss, no dropout: one pass over a batch gives cross-entropy and
forward KL of every target. Sums are added in float64 on the device and divided once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from sad_kernels import DistillOutput, Objective, linear_distill_loss
from torch import Tensor, nn

from sad.data import Batch, PackedRows
from sad.distillation import FrozenTeacher, StudentWithLoss

Variants = Mapping[str, Callable[[], AbstractContextManager[object]]]
"""Prefix of the metrics -> context under which the student has the weights to score."""

SCORING = Objective(ce_weight=1.0, kd_weight=1.0)
SCORING_ALONE = Objective(ce_weight=1.0, kd_weight=0.0)


def eval_batches(
    rows: PackedRows, batch_size: int, max_rows: int | None, device: torch.device
) -> Iterator[Batch]:
    """The held-out rows in their stored order, the first ``max_rows`` of them."""
    count = len(rows) if max_rows is None else min(max_rows, len(rows))
    for start in range(0, count, batch_size):
        yield rows.batch(range(start, min(start + batch_size, count))).to(device)


@torch.no_grad()
def evaluate_student(
    student: StudentWithLoss,
    teacher: FrozenTeacher | None,
    batches: Iterator[Batch],
    variants: Variants,
) -> dict[str, float]:
    """Score the student under each variant of its weights; the teacher runs once per batch for all of them.

    Returns ``<prefix>/nll`` (nats per target), ``perplexity = exp(nll)``, ``kl`` (forward KL to the
    teacher, nats per target), ``agreement`` and ``accuracy`` (shares of targets whose argmax is the
    teacher's, the label), ``entropy`` (nats) and ``bits_per_byte``. Without a teacher there is no
    ``kl`` and no ``agreement``. Training mode and random generators are left as they were.
    """
    scores = {prefix: _Scores() for prefix in variants}
    objective = SCORING_ALONE if teacher is None else SCORING
    with eval_mode(student):
        for batch in batches:
            target = None if teacher is None else teacher(batch)
            for prefix, weights in variants.items():
                with weights():
                    out = student(batch, target, objective, num_items=max(batch.num_targets, 1))
                scores[prefix].add(out, batch)
    metrics: dict[str, float] = {}
    for prefix, score in scores.items():
        metrics |= score.metrics(prefix, against_teacher=teacher is not None)
    return metrics


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


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Dropout off inside, every submodule's own mode restored outside."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


class _Scores:
    """Float64 sums of one pass over the held-out rows."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # [6]
        self.bytes = 0

    def add(self, out: DistillOutput, batch: Batch) -> None:
        parts = (out.ce, out.kd, out.num_tokens, out.correct, out.agree, out.entropy)
        sums = torch.stack([part.double() for part in parts])
        self.sums = sums if self.sums is None else self.sums + sums
        self.bytes += batch.target_bytes

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
        return {f"{prefix}/{name}": value for name, value in result.items()}
