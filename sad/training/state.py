"""What a checkpoint of a training run holds, and how a run resumes from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sad.checkpoint.parts import (
    Constant,
    Entries,
    Entry,
    Gradients,
    ModuleTensors,
    NamedTensors,
    Numbers,
    OptimizerState,
    Part,
    entry,
    restore_parts,
)
from sad.checkpoint.store import Checkpoint
from sad.config.identity import require_same_run

if TYPE_CHECKING:
    from sad.training.trainer import Trainer

GROUP_OPTIONS = ("initial_lr", "weight_decay", "betas", "eps")
"""What the configuration says of an optimizer's group; its ``lr`` follows from the scheduler."""


def checkpoint_parts(trainer: Trainer) -> list[Part]:
    """Everything that decides how training goes on, in the order of ``state.json``.

    A new piece of state is one more line here, at the end.
    """
    meter, masters = trainer.meter, trainer.precision.masters
    return [
        Constant("identity", trainer.identity),
        Entry("counters", trainer.counters),
        ModuleTensors("model", trainer.student.model),
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


def restore_trainer(trainer: Trainer, checkpoint: Checkpoint, warn: Callable[[str], None]) -> None:
    """Continue exactly where ``checkpoint`` was taken: see ``Trainer.restore``."""
    saved_identity = entry(checkpoint, "identity")
    changed = require_same_run(saved_identity, trainer.identity, trainer.config, warn)

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
        curriculum.load_state_dict(configured_curriculum)
    missing = ", ".join(trainer.generators.missing)
    if missing:
        warn(f"random numbers of {missing} start anew: there is no such device here")
