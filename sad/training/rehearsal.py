"""The rehearsal of a run: what only later phases of it need is computed once, on one row.

The curriculum asks for structural losses after hours, an evaluation may come at the end only, and a
baseline is trained before either. Models that cannot supply them are refused here instead.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext

import torch

from sad.config.schema import DistillConfig
from sad.data.rows import epoch_permutation
from sad.errors import SadError, UnfitError, is_out_of_memory, with_type
from sad.models.load import load_student
from sad.optim.precision import Precision
from sad.teachers.eval_teacher import EvalTeacher
from sad.teachers.policy import build_teacher_policy
from sad.teachers.sharded import ShardedTeacher
from sad.training.evaluate import evaluate_student
from sad.training.inputs import RunInputs
from sad.training.ranks import load_sharded_student, shard_student, sharded_config
from sad.training.student import StudentWithLoss, build_student


def needs_rehearsal(config: DistillConfig) -> bool:
    """Whether the run's first micro-batch comes late, or does not need all that later ones need."""
    if not config.has_teacher:
        return False
    return config.baseline or bool(config.structural_weights or config.curriculum.schedules())


def rehearse(config: DistillConfig, inputs: RunInputs) -> None:
    """Run one row forward and backward with every loss at its full weight, and evaluate it.

    Nothing of this is kept: the student is another one than that of the run, and the teacher is
    left as it was. Raises ``UnfitError`` for models that a loss or the routing cannot use, also if
    no check foresaw in which way.
    """
    if inputs.teacher is None or inputs.teacher_follows_run:  # which has no rows for a rehearsal
        return
    policy = build_teacher_policy(config, inputs.teacher, inputs.valid_vocab)
    teacher = inputs.teacher.model
    student, precision = _student(config, inputs)
    weights = {"kd": config.kd_weight} | config.structural_weights
    objective = config.objective(
        teacher_share=config.taid.start if config.taid.enabled else 1.0,
    )
    first = epoch_permutation(config.seed, 0, len(inputs.train_rows))[:1]  # that of the run
    batch = inputs.train_rows.batch(first).to(inputs.device)
    try:
        target = policy.forward(batch, student.teacher_capture(weights))
        result = student(batch, target, objective, batch.counts, weights)
        precision.backward(result.loss)
        with policy.evaluating():
            frozen = inputs.frozen_teacher
            uncached = inputs.teacher if frozen is None else EvalTeacher(frozen, 0)
            uncached = None if inputs.eval_teacher is None else uncached
            losses = tuple(config.structural_weights)
            evaluate_student(student, uncached, iter([batch]), {"eval": nullcontext}, losses)
    except Exception as error:
        foreseen = isinstance(error, SadError) or is_out_of_memory(error)
        if foreseen or not config.structural_weights:
            raise
        raise UnfitError(
            f"{', '.join(config.structural_weights)} must work for {config.student} and "
            f"{config.teacher or config.teacher_cache}, got {with_type(error)}; set the weight of "
            "the one that does not to 0 (--debug shows where it fails)"
        ) from error
    finally:
        if teacher is not None:
            teacher.requires_grad_(False)  # gates that the routing trains
        inputs.teacher.release()
    del student, result
    gc.collect()  # of a student that is split, modules refer to one another
    if inputs.device.type == "cuda":  # the run's own peak is measured from here on
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(inputs.device)


def _student(config: DistillConfig, inputs: RunInputs) -> tuple[StudentWithLoss, Precision]:
    """A student for the teacher there is: split over the ranks if that is, else whole."""
    teacher, world = inputs.teacher, inputs.world
    assert teacher is not None
    split = isinstance(teacher, ShardedTeacher)
    loaded = sharded_config(config) if split else config
    precision = Precision(loaded, inputs.device, sharded=split)
    if split:
        student = load_sharded_student(config, inputs, precision, lambda _: None)
        if student is not None:
            return student, precision
    model = load_student(loaded)
    student = build_student(
        config, model, inputs.valid_vocab, precision, teacher.model, inputs.comparison
    )
    if split:
        shard_student(student, config, precision, world)
    return student, precision
