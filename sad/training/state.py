"""What a checkpoint of a training run holds, and how a run resumes from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

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
    check_parts,
    entry,
    load_parts,
    tensor_group,
)
from sad.checkpoint.state import optimizer_state, start_rng, tensors_like
from sad.checkpoint.store import Checkpoint
from sad.config.identity import require_same_run
from sad.errors import one_line
from sad.expected import (
    Check,
    UnexpectedValueError,
    alike,
    anything,
    boolean,
    checkpoint_errors,
    close,
    equal,
    integer,
    mapping,
    number,
    optional,
    plain,
    record,
    sequence,
)
from sad.optim.schedule import move_scheduler, scheduled_rates
from sad.training.meters import COUNTERS, Counters
from sad.training.resume import (
    WINDOW,
    Resumption,
    in_present_dtypes,
    in_present_torch,
    renumber,
    scheduler_steps,
)

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
        Entry("counters", trainer.counters, check=COUNTERS),
        ModuleTensors("model", student, frozen=not adapters),
        NamedTensors("masters", None if masters is None else masters.separate),
        OptimizerState(
            "optimizer",
            trainer.optimizer,
            trainer.precision.optimizer_parameters,
            check_options=_options_as_configured(trainer),
        ),
        Entry("scheduler", trainer.scheduler, check=_scheduler(trainer)),
        Entry("scaler", trainer.precision, check=_scaler(trainer)),
        Entry("curriculum", trainer.curriculum, check=_curriculum(trainer)),
        Entry("ema", trainer.ema, tensors="shadow", check=_average(trainer)),
        trainer.generators,
        Numbers("sums", meter.sums),
        Entry("terms", meter.terms, check=meter.terms.checks),
        Numbers("window_loss", trainer.window_loss),
        Entry("teaching", trainer.policy, tensors="tensors", check=trainer.policy.checks),
        Entry("taid", trainer.taid, check=_TAID),
        Numbers("skipped", meter.skipped),
        ModuleTensors("structure", trainer.student.structural),
        Gradients("grads", trainer.trained_parameters()),
        Entries(trainer.accumulator, check=record(WINDOW)),
    ]
    if adapters:
        parts.insert(0, FrozenWeights("frozen", student))
    return parts


_TAID = record(
    {"u": number(0.0, 1.0), "momentum": number(), "previous": optional(number())},
)


def _average(trainer: Trainer) -> tuple[Check, Check] | None:
    ema = trainer.ema
    if ema is None:
        return None
    state = {"num_updates": integer(0), "shadow": tensors_like(ema.tensors())}
    configured = {"decay": equal(ema.decay), "warmup": equal(ema.warmup)}
    other = {"decay": number(0.0, 1.0), "warmup": boolean}
    return record(state | configured), record(state | other)


def _curriculum(trainer: Trainer) -> tuple[Check, Check]:
    """It follows from the configuration; that of another one is checked by being loaded."""
    curriculum = trainer.curriculum

    def other(state: Any, where: str) -> None:
        fields = {"weights": mapping(number()), "total_steps": integer(), "schedules": plain}
        record(fields)(state, where)
        try:
            copy(curriculum).load_state_dict(state)
        except (ValueError, TypeError, LookupError) as error:
            raise UnexpectedValueError(
                where, f"be a curriculum ({one_line(error)})", state
            ) from error

    return equal(curriculum.state_dict()), other


def _scaler(trainer: Trainer) -> tuple[Check, Check]:
    """A loss scale in fp16, and else nothing."""
    own = trainer.precision.state_dict()
    if not own:
        return equal({}), anything
    changing = {
        "scale": number(2.0**-149, 2.0**127),
        "_growth_tracker": integer(0, own["growth_interval"]),
    }
    in_fp16 = record({key: equal(value) for key, value in own.items()} | changing)
    return in_fp16, lambda state, where: None if state == {} else in_fp16(state, where)


def _scheduler(trainer: Trainer) -> Check:
    """A state like the scheduler's own, with steps that are counted."""

    def check(state: Any, where: str) -> None:
        own = trainer.scheduler.state_dict()
        ours = trainer.builds_scheduler
        keys = {
            key: equal(value) if ours and isinstance(value, bool) else alike(value)
            for key, value in own.items()
        }
        for key in ("last_epoch", "_step_count"):
            if key in own:
                keys[key] = integer(0)
        if "lr_lambdas" in own:  # None for a plain function, which has no state
            states = [equal(None) if s is None else alike(s) for s in own["lr_lambdas"]]
            keys["lr_lambdas"] = sequence(*states)
        record(keys)(state, where)

    return check


def _options_as_configured(trainer: Trainer) -> Check:
    """Options of the optimizer's groups as the configuration has them.

    A scheduler of the caller's own may have moved any of them.
    """

    def check(options: Any, where: str) -> None:
        own, _ = optimizer_state(trainer.optimizer, trainer.precision.optimizer_parameters)
        live = [group["options"] for group in own["groups"]]
        if not trainer.builds_scheduler:
            alike(live)(options, where)
            return
        groups = [{key: equal(value) for key, value in group.items()} for group in live]
        sequence(*[record(group | {"lr": number(0.0)}) for group in groups])(options, where)

    return check


def _check_together(trainer: Trainer, resumption: Resumption, checkpoint: Checkpoint) -> None:
    """Raise ``UnexpectedValueError`` for entries that do not fit each other.

    Each of them may be as it is for itself; the configuration is that of the run that saved them.
    """
    window = [entry(checkpoint, key) for key in ("window_size", "num_items")]
    gradients = list(tensor_group(checkpoint, "grads"))
    if window[0]:
        begins = trainer.run_length.window(resumption.micro_step, resumption.window_begins)
        if trainer.batches.knows(begins):  # else the student, not restored yet, writes some
            equal(trainer.batches.counts(begins).targets)(window[1], "num_items")
    else:
        equal([0, []])([window[1], gradients], "num_items and gradients between two windows")

    scheduler = trainer.scheduler
    if not (trainer.builds_scheduler and isinstance(scheduler, LambdaLR)):
        return
    state, steps = entry(checkpoint, "scheduler"), scheduler_steps(resumption, trainer.config)
    equal(steps)(state["last_epoch"], "scheduler.last_epoch")
    equal(steps + 1)(state["_step_count"], "scheduler._step_count")
    equal(list(scheduler.base_lrs))(state["base_lrs"], "scheduler.base_lrs")
    rates = sequence(*map(close, scheduled_rates(scheduler, steps)))
    rates(state["_last_lr"], "scheduler._last_lr")
    groups = entry(checkpoint, "optimizer")["groups"]
    rates([group["options"]["lr"] for group in groups], "optimizer learning rates")


def restore_trainer(trainer: Trainer, resumption: Resumption, warn: Callable[[str], None]) -> None:
    """Continue exactly where a checkpoint was taken: see ``Trainer.restore``."""
    checkpoint = resumption.checkpoint
    saved_identity = entry(checkpoint, "identity")
    changed = require_same_run(saved_identity, trainer.identity, trainer.config, warn)
    moved = saved_identity["world_size"] != trainer.world.size
    if changed or moved:  # split parameters are their own fp32 masters
        checkpoint = in_present_dtypes(trainer, checkpoint)
    if saved_identity["versions"].get("torch") != trainer.identity["versions"]["torch"]:
        checkpoint = in_present_torch(trainer, checkpoint)

    optimizer, scheduler = trainer.optimizer, trainer.scheduler
    ema, curriculum = trainer.ema, trainer.curriculum
    # What the configuration says, before the checkpoint overwrites it.
    options = [{key: group[key] for key in GROUP_OPTIONS} for group in optimizer.param_groups]
    decay = None if ema is None else (ema.decay, ema.warmup)
    configured_curriculum = curriculum.state_dict()

    saved = check_parts(trainer.parts, checkpoint, changed=changed, ranks=trainer.world.size)
    if not changed:
        with checkpoint_errors():
            _check_together(trainer, resumption, checkpoint)
    load_parts(trainer.parts, saved)
    trainer.meter.keep_on_main(trainer.world)
    if moved:
        start_rng(trainer.config.seed, trainer.world.rank, resumption.micro_step)
        warn(
            f"the run goes on on {trainer.world.size} processes in place of "
            f"{saved_identity['world_size']}: not bit for bit, and random numbers start anew"
        )

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
