"""Where a run goes on from a checkpoint, also if its sizes have changed since.

A checkpoint's position is ``micro_step``, a number of micro-batches. With another number of rows in
each it is another number: rows consumed in this epoch over the new rows per micro-batch. With other
windows it may lie in the middle of one, which then begins there and is shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sad.checkpoint.atomic_files import read_object
from sad.checkpoint.parts import entry, tensor_group
from sad.checkpoint.state import OPTIMIZER, Form, form_of, model_tensors, optimizer_state
from sad.checkpoint.store import Checkpoint, position_of
from sad.config.identity import SIZES, require_same_config, run_changes, saved_rows
from sad.config.schema import DistillConfig
from sad.data.rows import PackedRows
from sad.errors import CheckpointError, UsageError
from sad.expected import Check, anything, integer, mapping, shown
from sad.optim.precision import Precision
from sad.optim.schedule import RunLength, planned_length
from sad.training.meters import COUNTERS

if TYPE_CHECKING:
    from sad.training.trainer import Trainer

Changes = dict[str, tuple[Any, Any]]
"""Dotted key -> its value in the checkpoint, its value now."""

LENGTH = ("num_train_epochs", "max_steps")
FORM = ("optim", "student_init", "student_layers")
"""Keys that decide which tensors are trained and what the optimizer keeps of them, as do those of
``peft``."""
SCALED = ("fp16", "param_dtype", "master_weights")
"""Keys that decide in which dtype and at which scale gradients are kept."""

_OPEN_WINDOW = ("gradient_accumulator_step_count", "window_size")
"""Entries of a checkpoint: micro-batches of its open window, done and in all."""

WINDOW: dict[str, Check] = {
    "accumulation_steps": integer(1),
    "gradient_accumulator_step_count": integer(0),
    "window_size": integer(0),
    "num_items": integer(0),
}
"""What a checkpoint's entries of its window must be."""


@dataclass(frozen=True)
class Resumption:
    """A checkpoint, and its position in the run that goes on from it."""

    checkpoint: Checkpoint
    changes: Changes
    micro_step: int
    global_step: int
    window_begins: int
    """As in ``Counters``."""
    rows: tuple[int, int]
    """Rows per micro-batch, in the checkpoint and now."""
    notes: tuple[str, ...] = ()
    """What the header says of it."""

    @property
    def renumbered(self) -> bool:
        """Whether ``micro_step`` counts micro-batches of another size than in the checkpoint."""
        return self.rows[0] != self.rows[1]


class ResumptionRefusedError(UsageError):
    """A checkpoint from which a run cannot go on as it is configured now; both are left alone."""


def plan_resumption(
    checkpoint: Checkpoint,
    config: DistillConfig,
    train_rows: PackedRows,
    *,
    builds_scheduler: bool = True,
    world_size: int = 1,
) -> Resumption:
    """Find where a run goes on from ``checkpoint``; nothing is changed, and no model is needed.

    ``builds_scheduler`` is false for a run whose scheduler is the caller's own. Raises
    ``ResumptionRefusedError`` where the data cannot go on exactly: inside a window whose gradients
    are half added up, where the rows consumed are no whole number of the new micro-batches, and
    past the end of a run that is shorter now.
    """
    identity = entry(checkpoint, "identity")
    require_same_config(identity, config, world_size)
    changes: Changes = {
        key: (before, after) for key, before, after in run_changes(identity, config, world_size)
    }
    counters = _position(checkpoint)
    length = planned_length(config, len(train_rows), world_size)
    now = length.batch_size
    before = changes.get(SIZES[0], (now, now))[0]
    same_text = identity["train_rows"] == train_rows.fingerprint
    saved = Resumption(
        checkpoint,
        changes,
        counters["micro_step"],
        counters["global_step"],
        counters.get("window_begins", 0),
        (before, now),
    )
    _require_same_form(saved)
    _require_same_precision(saved)
    if same_text and not any(key in changes for key in (*LENGTH, *SIZES, "scheduler_unit")):
        _require_window_of_position(saved, length)
        return saved
    if saved.renumbered and not same_text:
        raise ResumptionRefusedError(
            f"{SIZES[0]} must stay when a run is resumed on other rows, got {before} -> {now}; "
            "change one of the two at a time"
        )

    micro_step = saved.micro_step
    if saved.renumbered:
        micro_step = _exact_position(saved, length)
    if micro_step > length.micro_batches:
        raise ResumptionRefusedError(
            f"a resumed run must not end before its checkpoint, got {length.micro_batches:,} "
            f"micro-batches planned and {micro_step:,} consumed; raise {' or '.join(LENGTH)}, or "
            "resume from an earlier checkpoint"
        )
    moved = replace(saved, micro_step=micro_step)
    if entry(checkpoint, "window_size"):
        _require_same_window(moved, length)
    else:
        moved = _at_a_window(moved, config, length)
    steps = scheduler_steps(moved, config)
    saved_steps = entry(checkpoint, "scheduler", mapping(anything))
    if not builds_scheduler and steps != saved_steps.get("last_epoch"):
        raise ResumptionRefusedError(
            f"a scheduler of one's own must have taken {steps} steps where the run goes on, got "
            f"{saved_steps.get('last_epoch')}; keep {SIZES[0]}, {SIZES[1]} and scheduler_unit"
        )
    return moved


def _position(checkpoint: Checkpoint) -> dict[str, Any]:
    """The counters of a checkpoint, after checking all that the position depends on."""
    counters = entry(checkpoint, "counters", COUNTERS)
    for key, check in WINDOW.items():
        entry(checkpoint, key, check)
    step, (done, size) = counters["micro_step"], (entry(checkpoint, key) for key in _OPEN_WINDOW)
    if step != checkpoint.micro_step:
        raise _impossible("counters.micro_step", f"be {shown(checkpoint.micro_step)}", step)
    for key in ("global_step", "best_micro_step", "evaluated_at", "window_begins"):
        if counters.get(key, 0) > step:
            raise _impossible(f"counters.{key}", f"be at most micro_step, {step}", counters[key])
    if not (done == size == 0 or 0 < done < size):
        raise _impossible("window", f"have 1 to {max(size - 1, 1)} micro-batches done", done)
    return counters


def _require_window_of_position(saved: Resumption, length: RunLength) -> None:
    """Refuse a position that no run of this configuration comes to."""
    step, checkpoint = saved.micro_step, saved.checkpoint
    if step > length.micro_batches:
        raise _impossible("counters.micro_step", f"be at most {length.micro_batches}", step)
    done, size = (entry(checkpoint, key) for key in _OPEN_WINDOW)
    found = (step - done, size) if size else (step, 0)
    if step == length.micro_batches:
        expected = (step, 0)
    else:
        window = length.window(step, saved.window_begins)
        begins = window.first_micro_step == step
        expected = (step, 0) if begins else (window.first_micro_step, window.size)
    if found != expected:
        raise _impossible(
            "window", f"begin at micro-batch {expected[0]} with {expected[1]} of them", found
        )


def _impossible(what: str, expectation: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's {what} must {expectation}, got {value}; resume from another checkpoint"
    )


def renumber(micro_step: int, rows: tuple[int, int], num_rows: int) -> Fraction:
    """The position ``micro_step`` of micro-batches of ``rows[0]`` rows in those of ``rows[1]``."""
    before, now = (-(-num_rows // size) for size in rows)  # micro-batches of an epoch
    epoch, batch = divmod(micro_step, before)
    return epoch * now + Fraction(batch * rows[0], rows[1])


def overtaken(checkpoints: Iterable[Path], resumption: Resumption) -> list[Path]:
    """Those of a run's checkpoints that are no longer of its course: later ones than the one that
    is resumed from, and those whose numbers count other micro-batches than the run does now.

    The one that is resumed from is not among them. Of one that cannot be read, the numbers are
    taken to be those of before.
    """
    resumed = resumption.checkpoint.path.resolve()
    others = [path for path in checkpoints if path.resolve() != resumed]
    before, now = resumption.rows
    return [
        path
        for path in others
        if (_rows_of(path) or before) != now or position_of(path) > resumption.micro_step
    ]


def _rows_of(checkpoint: Path) -> int | None:
    """Rows per micro-batch in a checkpoint that need not be whole."""
    try:
        saved = read_object(checkpoint / "state.json") or {}
        return saved_rows(saved["state"]["identity"])
    except (ArithmeticError, ValueError, LookupError, TypeError):
        return None


def _exact_position(saved: Resumption, length: RunLength) -> int:
    if entry(saved.checkpoint, "window_size"):
        raise _inside_a_window(saved, "the rows of a micro-batch")
    position = renumber(saved.micro_step, saved.rows, length.num_rows)
    if position.denominator > 1:
        batches = -(-length.num_rows // saved.rows[0])
        consumed = saved.micro_step % batches * saved.rows[0]
        raise ResumptionRefusedError(
            f"{SIZES[0]} must divide the rows that a resumed run has consumed of its epoch, got "
            f"{saved.rows[1]} and {consumed:,} rows; choose a divisor, or resume from a checkpoint "
            "at an epoch's end"
        )
    return int(position)


def _require_same_window(moved: Resumption, length: RunLength) -> None:
    """Refuse a checkpoint in the middle of a window that would end elsewhere now."""
    done, size = (entry(moved.checkpoint, key) for key in _OPEN_WINDOW)
    if moved.micro_step < length.micro_batches:
        window = length.window(moved.micro_step, moved.window_begins)
        if (window.first_micro_step, window.size) == (moved.micro_step - done, size):
            return
    raise _inside_a_window(moved, "the length of a window")


def _require_same_form(saved: Resumption) -> None:
    """Refuse a checkpoint that holds other tensors than this run trains."""
    for key, (before, now) in saved.changes.items():
        if key in FORM or key.startswith("peft."):
            raise ResumptionRefusedError(
                f"{key} must stay when a run is resumed, got {before!r} -> {now!r}: the checkpoint "
                "holds other tensors; restore it, or begin a new run"
            )


def _require_same_precision(saved: Resumption) -> None:
    if entry(saved.checkpoint, "window_size") and any(key in saved.changes for key in SCALED):
        raise _inside_a_window(saved, "the precision of gradients")


def _inside_a_window(saved: Resumption, what: str) -> ResumptionRefusedError:
    done, size = (entry(saved.checkpoint, key) for key in _OPEN_WINDOW)
    keys = [key for key in (*SIZES, *LENGTH, *SCALED) if key in saved.changes]
    old = ", ".join(f"{key}: {saved.changes[key][0]}" for key in keys) or "the old text"
    return ResumptionRefusedError(
        f"{what} must stay until an accumulation window is closed, got a checkpoint after "
        f"{done} of its {size} micro-batches; "
        f"resume with {old} until the next save, or from a checkpoint between two windows"
    )


def _at_a_window(moved: Resumption, config: DistillConfig, length: RunLength) -> Resumption:
    """The same position, as the beginning of a window."""
    micro_step = moved.micro_step
    begins, notes = 0, []
    if micro_step == length.micro_batches:
        global_step = length.windows
    else:
        window = length.window(micro_step)
        global_step = length.windows_before(micro_step)
        if window.first_micro_step != micro_step:
            begins = micro_step
            left = window.first_micro_step + window.size - micro_step
            notes.append(f"the first window has {left} of {window.size} micro-batches")
    if moved.renumbered:
        rows = moved.rows
        notes.append(
            f"{moved.micro_step:,} micro-batches of {rows[1]} rows are done, which were "
            f"{moved.checkpoint.micro_step:,} of {rows[0]}"
        )
        if config.warmup_batches:
            notes.append(f"warmup_batches counts micro-batches of {rows[1]} rows from now on")
    schedule = config.lr_scheduler_type
    if any(key in moved.changes for key in (*SIZES, "scheduler_unit")) and schedule != "constant":
        notes.append(
            "the learning rate of a window may differ from what it would have been, by a fraction "
            "of what it changes in a window"
        )
    return replace(
        moved, global_step=global_step, window_begins=begins, notes=(*moved.notes, *notes)
    )


def scheduler_steps(resumption: Resumption, config: DistillConfig) -> int:
    """The steps that a scheduler has taken at this position."""
    by_batch = config.scheduler_unit == "batch"
    return resumption.micro_step if by_batch else resumption.global_step


def in_present_dtypes(trainer: Trainer, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with weights, masters and moments in the dtypes that the run has now.

    The exact weights are the masters where there are any. Each tensor is read and converted when it
    is asked for.
    """
    precision: Precision = trainer.precision
    model, masters = tensor_group(checkpoint, "model"), tensor_group(checkpoint, "masters")
    moments = tensor_group(checkpoint, "optimizer")
    live = model_tensors(trainer.student.model)
    separate = {} if precision.masters is None else precision.masters.separate

    def exact(name: str) -> Tensor:
        return masters[name] if name in masters else model[name]

    def moment(path: str) -> Tensor:
        name, _, key = path.rpartition("/")
        parameter = precision.optimizer_parameters.get(name) if key in _MOMENTS else None
        return _as(parameter, moments[path])

    def exact_form(name: str) -> Form:
        return form_of(masters if name in masters else model, name)

    def moment_form(path: str) -> Form:
        name, _, key = path.rpartition("/")
        parameter = precision.optimizer_parameters.get(name) if key in _MOMENTS else None
        return _form_as(parameter, form_of(moments, path))

    tensors = dict(checkpoint.tensors)
    tensors["model"] = _Converted(
        model,
        lambda name: _as(live.get(name), exact(name)),
        lambda name: _form_as(live.get(name), exact_form(name)),
    )
    both = [name for name in separate if name in model or name in masters]
    tensors["masters"] = _Converted(
        both,
        lambda name: _as(separate[name], exact(name)),
        lambda name: _form_as(separate[name], exact_form(name)),
    )
    tensors["optimizer"] = _Converted(moments, moment, moment_form)
    return replace(checkpoint, tensors=tensors)


_MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of AdamW that has its parameter's dtype."""


class _Converted(Mapping[str, Tensor]):
    """Tensors by name that are computed when they are asked for, and their forms before."""

    def __init__(
        self,
        names: Iterable[str],
        compute: Callable[[str], Tensor],
        form: Callable[[str], Form],
    ) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute
        self.form = form

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _as(live: Tensor | None, saved: Tensor) -> Tensor:
    """``saved`` in the dtype of ``live``; names and shapes are checked when it is restored."""
    return saved if live is None else saved.to(live.dtype)


def _form_as(live: Tensor | None, saved: Form) -> Form:
    return saved if live is None else saved._replace(dtype=live.dtype)


def in_present_torch(trainer: Trainer, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the keys that this version of torch gives schedulers and optimizers.

    Those that another version did not save keep the values they have.
    """
    state, live = dict(checkpoint.state), trainer.scheduler.state_dict()
    state["scheduler"] = _with_keys_of(live, entry(checkpoint, "scheduler"))
    groups, _ = optimizer_state(trainer.optimizer, trainer.precision.optimizer_parameters)
    saved = entry(checkpoint, "optimizer", OPTIMIZER)
    if len(saved["groups"]) == len(groups["groups"]):
        both = zip(saved["groups"], groups["groups"], strict=True)
        options = [_with_keys_of(own["options"], group["options"]) for group, own in both]
        merged = [group | {"options": o} for group, o in zip(saved["groups"], options, strict=True)]
        state["optimizer"] = saved | {"groups": merged}
    return replace(checkpoint, state=state)


def _with_keys_of(live: Mapping[str, Any], saved: Any) -> Any:
    if type(saved) is not dict:
        return saved
    return {key: saved.get(key, value) for key, value in live.items()}
