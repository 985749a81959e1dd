"""The teacher's own scores: the mark that its student is measured against."""

from __future__ import annotations

import math
from collections.abc import Callable

from sad.config.schema import DistillConfig
from sad.errors import UnfitError
from sad.models.cached_targets import CachedTargets
from sad.report.header import model_line, quantized_part
from sad.teachers.cached import CachedTeacher, describe, planned_targets
from sad.teachers.frozen import Teacher
from sad.training.evaluate import evaluate_teacher, require_finite_score
from sad.training.inputs import RunInputs
from sad.training.meters import ResultRow, result_row

TOLERANCE = 0.01
"""Nats per target by which the score of stored hidden states may differ from that of the teacher
that left them. A wrong norm or head, or states shifted by one token, cost more than one nat."""


OWN = {"ema": "the student's own average", "base": "the student without its adapters"}
"""A student that is its own teacher, in words."""


def describe_teacher(config: DistillConfig, inputs: RunInputs) -> str | None:
    """The teacher in words, for a run's header; None without one."""
    if isinstance(inputs.teacher, CachedTeacher):
        return describe(inputs.teacher.reader)
    if config.self_teacher is not None:
        return OWN[config.self_teacher]
    frozen = inputs.frozen_teacher
    if frozen is None:
        return None
    return model_line(config.teacher or "", frozen.model) + quantized_part(config, frozen.model)


def planned_sizes(teacher: Teacher | None) -> CachedTargets | None:
    """What a plan of memory needs of a teacher that is read from its cache."""
    if not isinstance(teacher, CachedTeacher):
        return None
    return planned_targets(teacher.reader.folder, teacher.reader.facts)


def score_teacher(
    config: DistillConfig, inputs: RunInputs, say: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, float], list[ResultRow]]:
    """The teacher's metrics (``eval_teacher/nll``, ...) and its row of the result table.

    Hidden states are scored again; of other targets the scores are those that the teacher had when
    it made them, if it scored as many rows. Nothing without a teacher. Raises ``UnfitError`` for a
    score that is not finite, or stored states that are not their teacher's.
    """
    if inputs.teacher is None:
        return {}, []
    notes = inputs.teacher.reader.notes if isinstance(inputs.teacher, CachedTeacher) else {}
    count = inputs.scored(config)["rows"]
    then = notes.get("scores", {}) if notes.get("scored_rows") == count else {}
    if isinstance(inputs.teacher, CachedTeacher) and inputs.teacher.kind != "hidden":
        metrics = dict(then)
    elif inputs.eval_teacher is None:
        return {}, []
    else:
        say(f"scoring the teacher on {count:,} held-out rows")
        batches = inputs.eval_batches(config, "scoring the teacher")
        metrics = evaluate_teacher(inputs.eval_teacher, batches, world=inputs.world)
        require_finite_score(metrics, "eval_teacher", "the teacher")
        _require_same_score(then, metrics, config)
    if not metrics:
        return {}, []
    frozen = inputs.frozen_teacher
    model = notes.get("parameters") if frozen is None else frozen.model
    return metrics, [result_row("teacher", model, metrics, "eval_teacher")]


def _require_same_score(
    then: dict[str, float], now: dict[str, float], config: DistillConfig
) -> None:
    """Raise ``UnfitError`` unless stored hidden states score as their teacher did."""
    name = "eval_teacher/nll"
    if name in then and not math.isclose(then[name], now[name], rel_tol=0, abs_tol=TOLERANCE):
        raise UnfitError(
            f"teacher_cache must hold hidden states that score as their teacher, an NLL of "
            f"{then[name]:.4f} nats, got {now[name]:.4f} from {config.teacher_cache}; make it "
            "again with `sad cache-teacher`"
        )
