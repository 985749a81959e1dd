"""What a checkpoint of a training run holds, and how a run resumes from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import LambdaLR

from sad.checkpoint.parts import (
    Constant,
    Entries,
    Entry,
    FrozenWeights,
    Gradients,
    ModuleTensors,
    NamedTensors,
    Numbers,
    OptimizerState,
    Part,
    entry,
    restore_parts,
)
from sad.config.identity import require_same_run
from sad.optim.schedule import move_scheduler
from sad.training.meters import Counters
from sad.training.resume import Resumption, in_present_dtypes, renumber, scheduler_steps

if TYPE_CHECKING:
    from sad.training.trainer import Trainer

GROUP_OPTIONS = ("initial_lr", "weight_decay", "betas", "eps")
"""What the configuration says of an optimizer's group; its ``lr`` follows from the scheduler."""


def checkpoint_parts(trainer: Trainer) -> list[Part]:
    """Everything that decides how training goes on, in the order of ``state.json``.

    A new piece of state is one more line here, at the end.
    """
    meter, masters = trainer.meter, trainer.precision.masters
    adapters = trainer.config.peft.enabled
    student = trainer.student.model
    parts: list[Part] = [
        Constant("identity", trainer.identity),
        Entry("counters", trainer.counters),
        ModuleTensors("model", student, frozen=not adapters),
        NamedTensors("masters", None if masters is None else masters.separate),
        OptimizerState("optimizer", trainer.optimizer, trainer.precision.optimizer_parameters),
        Entry("scheduler", trainer.scheduler),
        Entry("scaler", trainer.precision),
        Entry("curriculum", trainer.curriculum),
        Entry("ema", trainer.ema, tensors="shadow"),
        trainer.generators,
        Numbers("sums", meter.sums),
        Entry("terms", meter.terms),
        Numbers("window_loss", trainer.window_loss),
        Entry("teaching", trainer.policy, tensors="tensors"),
        Entry("taid", trainer.taid),
        Numbers("skipped", meter.skipped),
        ModuleTensors("structure", trainer.student.structural),
        Gradients("grads", trainer.trained_parameters()),
        Entries(trainer.accumulator),
    ]
    if adapters:
        parts.insert(0, FrozenWeights("frozen", student))
    return parts


def restore_trainer(trainer: Trainer, resumption: Resumption, warn: Callable[[str], None]) -> None:
    """Continue exactly where a checkpoint was taken: see ``Trainer.restore``."""
    checkpoint = resumption.checkpoint
    saved_identity = entry(checkpoint, "identity")
    changed = require_same_run(saved_identity, trainer.identity, trainer.config, warn)
    if changed:
        checkpoint = in_present_dtypes(trainer, checkpoint)

    optimizer, scheduler = trainer.optimizer, trainer.scheduler
    ema, curriculum = trainer.ema, trainer.curriculum
    # What the configuration says, before the checkpoint overwrites it.
    options = [{key: group[key] for key in GROUP_OPTIONS} for group in optimizer.param_groups]
    decay = None if ema is None else (ema.decay, ema.warmup)
    configured_curriculum = curriculum.state_dict()

    restore_parts(trainer.parts, checkpoint)

    if changed:  # the new configuration wins over what the old one left behind
        for group, configured in zip(optimizer.param_groups, options, strict=True):
            group.update(configured)
        scheduler.base_lrs = [group["initial_lr"] for group in options]
        if ema is not None and decay is not None:
            ema.decay, ema.warmup = decay
            if entry(checkpoint, "ema") is None:  # built at the initial weights
                ema.restart()
        curriculum.load_state_dict(configured_curriculum)
        _move(trainer, resumption)
        if saved_identity["eval_rows"] != trainer.identity["eval_rows"]:
            _forget_best(trainer.counters)
    _require_comparable_best(trainer)
    missing = ", ".join(trainer.generators.missing)
    if missing:
        warn(f"random numbers of {missing} start anew: there is no such device here")


def _move(trainer: Trainer, resumption: Resumption) -> None:
    """Put counters and scheduler at the position that the checkpoint has in this run."""
    counters = trainer.counters
    if counters.evaluated_at == counters.micro_step:
        counters.evaluated_at = resumption.micro_step
    elif resumption.renumbered:
        counters.evaluated_at = -1
    if resumption.renumbered and counters.best_micro_step >= 0:
        num_rows = trainer.run_length.num_rows
        best = renumber(counters.best_micro_step, resumption.rows, num_rows)
        counters.best_micro_step = int(best)
    counters.micro_step = resumption.micro_step
    counters.global_step = resumption.global_step
    counters.window_begins = resumption.window_begins
    if trainer.builds_scheduler and isinstance(trainer.scheduler, LambdaLR):
        move_scheduler(trainer.scheduler, scheduler_steps(resumption, trainer.config))


def _require_comparable_best(trainer: Trainer) -> None:
    """Forget the best value if it is one of another metric; raw and averaged weights compare."""
    saved, present = (
        name.partition("/")[2] for name in (trainer.counters.best_metric, trainer.metric_for_best)
    )
    if saved and saved != present:
        _forget_best(trainer.counters)


def _forget_best(counters: Counters) -> None:
    counters.best_value, counters.best_micro_step = math.inf, -1
