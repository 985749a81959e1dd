"""The parts of a checkpoint: each says what it saves, and is given the same back.

A checkpoint is what a list of parts returns from ``state_dict``: entries of ``state.json``, which
are plain values, and groups of tensors, one file each. On resumption every part gets exactly the
entries and groups that it would save now; a checkpoint that lacks one of them, or holds another, is
refused. So one more part in the list is all that a new piece of state needs, and none can be saved
without being restored, nor restored without being checked: whoever made the checkpoint, every part
agrees to what it would be given before the first takes it.

The classes here are views of live objects: nothing is copied before it is written, and every tensor
is filled in place (see ``sad.checkpoint.state``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sad.checkpoint.state import (
    check_gradients,
    check_optimizer,
    check_rng,
    check_tensors,
    frozen_digest,
    gradient_tensors,
    load_gradients,
    load_optimizer,
    load_rng,
    load_tensors,
    model_tensors,
    optimizer_state,
    rng_state,
    trained_tensors,
)
from sad.checkpoint.store import Checkpoint
from sad.errors import CheckpointError, with_type
from sad.expected import (
    Check,
    UnexpectedValueError,
    alike,
    checkpoint_errors,
    integer,
    number,
    sequence,
    shown,
    string,
)

State = dict[str, Any]
TensorGroups = dict[str, Mapping[str, Tensor]]


class PartState(NamedTuple):
    """What one part saves."""

    values: Mapping[str, Any] = {}  # entries of state.json
    tensors: Mapping[str, Mapping[str, Tensor]] = {}  # group -> name -> tensor


class Part(ABC):
    """One part of a checkpoint. ``load_state_dict`` takes what ``state_dict`` returned."""

    restored_last = False
    """Whether it must come after all others, because restoring those would disturb it."""

    per_rank = False
    """Whether every process of a run has a state of its own, which another number of processes
    cannot take over: it then stays as it is."""

    @abstractmethod
    def state_dict(self) -> PartState:
        """The entries and groups of this part; the same names in every state of the run."""

    @abstractmethod
    def check(self, saved: PartState, *, changed: bool) -> None:
        """Raise ``CheckpointError`` or ``UnexpectedValueError`` unless this is a state of this run.

        Nothing changes. ``changed`` says that the configuration differs from that of the run that
        saved it, as it was allowed to.
        """

    @abstractmethod
    def load_state_dict(self, saved: PartState) -> None:
        """Continue from there, bit for bit. ``check`` has agreed."""


def capture_parts(parts: Sequence[Part]) -> tuple[State, TensorGroups]:
    """Plain values and groups of tensors of all parts, for ``save_checkpoint``.

    Entries come in the order of the parts, groups in that of their restoration. Raises
    ``ValueError`` if two parts have a name in common.
    """
    saved = {id(part): part.state_dict() for part in parts}
    state: State = {}
    for part in parts:
        _add(state, saved[id(part)].values, "entry")
    tensors: TensorGroups = {}
    for part in _in_order_of_restoration(parts):
        _add(tensors, saved[id(part)].tensors, "tensor group")
    return state, tensors


def per_rank_names(parts: Sequence[Part]) -> frozenset[str]:
    """The entries and groups of parts of which every process saves its own state."""
    states = [part.state_dict() for part in parts if part.per_rank]
    return frozenset(name for state in states for name in (*state.values, *state.tensors))


def restore_parts(
    parts: Sequence[Part], checkpoint: Checkpoint, *, changed: bool = False, ranks: int = 1
) -> None:
    """Hand every part what it saved; raises like ``check_parts``, before anything is restored."""
    load_parts(parts, check_parts(parts, checkpoint, changed=changed, ranks=ranks))


def load_parts(parts: Sequence[Part], saved: Mapping[int, PartState]) -> None:
    """Hand every part what ``check_parts`` found of it."""
    for part in _in_order_of_restoration(parts):
        if id(part) in saved:
            part.load_state_dict(saved[id(part)])


def check_parts(
    parts: Sequence[Part], checkpoint: Checkpoint, *, changed: bool = False, ranks: int = 1
) -> dict[int, PartState]:
    """What a checkpoint holds of each part, by the part's ``id``.

    Parts of which every process has its own state are left out if the checkpoint is of another
    number of processes than the ``ranks`` of this run.

    Raises ``CheckpointError`` for a checkpoint that lacks an entry or a group of tensors, has one
    that no part knows, or holds in one what its part cannot be in. ``changed`` is as in
    ``Part.check``.
    """
    own = {id(part): part.state_dict() for part in parts}
    foreign = {id(part) for part in parts if part.per_rank and checkpoint.ranks != ranks}
    saved = {
        part: PartState(
            {key: entry(checkpoint, key) for key in state.values},
            {group: tensor_group(checkpoint, group) for group in state.tensors},
        )
        for part, state in own.items()
        if part not in foreign
    }
    keys = {key for state in own.values() for key in state.values}
    groups = {group for state in own.values() for group in state.tensors}
    _require_known(checkpoint, "entries of state.json", checkpoint.state, keys)
    _require_known(checkpoint, "files of tensors", checkpoint.tensors, groups)
    for part in parts:
        if id(part) in foreign:
            continue
        with checkpoint_errors():
            part.check(saved[id(part)], changed=changed)
    return saved


def _require_known(
    checkpoint: Checkpoint, what: str, saved: Iterable[str], known: Iterable[str]
) -> None:
    unknown = sorted(set(saved) - set(known))
    if unknown:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} must have no other {what} than this run, got "
            f"{shown(unknown[0])}; it is of another version of sad: resume with that version, or "
            "begin a new run"
        )


def entry(checkpoint: Checkpoint, key: str, check: Check | None = None) -> Any:
    """An entry of a checkpoint's ``state.json``.

    Raises ``CheckpointError`` if it has none, or one that ``check`` refuses.
    """
    if type(checkpoint.state) is not dict or key not in checkpoint.state:
        raise _lacking(checkpoint, f"{key!r} in state.json")
    value = checkpoint.state[key]
    if check is not None:
        with checkpoint_errors():
            check(value, key)
    return value


def tensor_group(checkpoint: Checkpoint, group: str) -> Mapping[str, Tensor]:
    """A group of a checkpoint's tensors; ``CheckpointError`` if it has none."""
    if group not in checkpoint.tensors:
        raise _lacking(checkpoint, f"{group}.safetensors")
    return checkpoint.tensors[group]


def _lacking(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {checkpoint.path} must hold {what}, got one without; it is of another version "
        "of sad: resume with that version, or begin a new run"
    )


def _in_order_of_restoration(parts: Iterable[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: part.restored_last)  # stable


def _add(merged: dict[str, Any], new: Mapping[str, Any], what: str) -> None:
    for name, value in new.items():
        if name in merged:
            raise ValueError(f"every {what} must belong to one part, got two with {name!r}")
        merged[name] = value


# Views: plain values


@runtime_checkable
class Stateful(Protocol):
    """An object with torch's pair of methods, and a state that JSON can hold."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class Entry(Part):
    """The state of a ``Stateful`` object, under one key of ``state.json``.

    ``tensors`` names the item of the state that holds tensors by name: they become the group
    ``key``. ``check`` says what a state must be, tensors included; a pair of checks is for a
    configuration that is the same and for one that has changed. By default a state must be like the
    present one.

    An object that this run does not have, None, is saved as ``null``. Where the configuration was
    allowed to change it ignores what a checkpoint holds in its place, and an object that the saved
    run did not have stays as it was built.

    Raises ``TypeError`` for an object that cannot be saved and restored.
    """

    def __init__(
        self,
        key: str,
        stateful: Stateful | None,
        *,
        tensors: str | None = None,
        check: Check | tuple[Check, Check] | None = None,
    ) -> None:
        if stateful is not None:
            _require_stateful(key, stateful)
        self._key = key
        self._stateful = stateful
        self._tensors = tensors
        self._checks = check if isinstance(check, tuple) else (check, check)

    def state_dict(self) -> PartState:
        state = None if self._stateful is None else self._stateful.state_dict()
        if self._tensors is None:
            return PartState({self._key: state})
        named = {} if state is None else state[self._tensors]
        if state is not None:
            state = {key: value for key, value in state.items() if key != self._tensors}
        return PartState({self._key: state}, {self._key: named})

    def check(self, saved: PartState, *, changed: bool) -> None:
        state = saved.values[self._key]
        if changed and (self._stateful is None or state is None):
            return
        own = self.state_dict()
        check = self._checks[changed]
        if check is None or self._stateful is None:
            alike(own.values[self._key])(state, self._key)
            if self._tensors is not None:
                check_tensors(own.tensors[self._key], saved.tensors[self._key], self._key)
            return
        if self._tensors is not None:
            if type(state) is not dict or self._tensors in state:
                raise UnexpectedValueError(self._key, "be an object of plain values", state)
            state = state | {self._tensors: saved.tensors[self._key]}
        check(state, self._key)

    def load_state_dict(self, saved: PartState) -> None:
        state = saved.values[self._key]
        if self._stateful is None or state is None:
            return
        if self._tensors is not None:
            state = state | {self._tensors: saved.tensors[self._key]}
        with _refusals_explained(self._key):
            self._stateful.load_state_dict(state)


@contextmanager
def _refusals_explained(key: str) -> Iterator[None]:
    """Turn the refusal of an object of the caller's own, such as a scheduler, into ours."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's {key} must be a state that this run can take over, got "
            f"{with_type(error)}; resume from another checkpoint"
        ) from error


class Entries(Part):
    """A ``Stateful`` object whose state consists of entries of ``state.json``.

    ``check`` is as in ``Entry``, of all the entries together.
    """

    def __init__(self, stateful: Stateful, *, check: Check | None = None) -> None:
        _require_stateful(type(stateful).__name__, stateful)
        self._stateful = stateful
        self._check = check

    def state_dict(self) -> PartState:
        return PartState(self._stateful.state_dict())

    def check(self, saved: PartState, *, changed: bool) -> None:
        check = self._check or alike(self._stateful.state_dict())
        check(dict(saved.values), "state")

    def load_state_dict(self, saved: PartState) -> None:
        self._stateful.load_state_dict(saved.values)


class Constant(Part):
    """A value that is saved for whoever resumes to compare with, and never changes in a run."""

    def __init__(self, key: str, value: Any) -> None:
        self._saved = PartState({key: value})

    def state_dict(self) -> PartState:
        return self._saved

    def check(self, saved: PartState, *, changed: bool) -> None:
        """Nothing: whoever resumes compares it."""

    def load_state_dict(self, saved: PartState) -> None:
        """Nothing: this run has its own."""


class Numbers(Part):
    """A small tensor, as numbers in ``state.json``: float64 and integers survive exactly.

    Integers are counts, of at least 0.
    """

    def __init__(self, key: str, tensor: Tensor) -> None:
        self._key = key
        self._tensor = tensor

    def state_dict(self) -> PartState:
        return PartState({self._key: self._tensor.tolist()})

    def check(self, saved: PartState, *, changed: bool) -> None:
        floating = self._tensor.dtype.is_floating_point
        expected = number(finite=False) if floating else integer(0)
        for size in reversed(self._tensor.shape):
            expected = sequence(*[expected] * size)
        expected(saved.values[self._key], self._key)

    def load_state_dict(self, saved: PartState) -> None:
        self._tensor.copy_(torch.tensor(saved.values[self._key], dtype=self._tensor.dtype))


def _require_stateful(name: str, stateful: object) -> None:
    if not isinstance(stateful, Stateful):
        raise TypeError(
            f"what a checkpoint holds as {name!r} must have state_dict and load_state_dict, got "
            f"{type(stateful).__name__}; without both it would be saved and not restored"
        )


# Views: tensors


class NamedTensors(Part):
    """Tensors by name, as one group. None is saved as an empty group, and restores nothing."""

    def __init__(self, group: str, tensors: Mapping[str, Tensor] | None) -> None:
        self._group = group
        self._tensors = tensors

    def state_dict(self) -> PartState:
        return PartState(tensors={self._group: {} if self._tensors is None else self._tensors})

    def check(self, saved: PartState, *, changed: bool) -> None:
        if self._tensors is not None or not changed:
            check_tensors(self._tensors or {}, saved.tensors[self._group], self._group)

    def load_state_dict(self, saved: PartState) -> None:
        if self._tensors is not None:
            load_tensors(self._tensors, saved.tensors[self._group], self._group)


class ModuleTensors(Part):
    """Parameters and persistent buffers of a module, as one group; None as in ``NamedTensors``.

    Without ``frozen`` parameters, what does not train is not saved: it is loaded from elsewhere.
    """

    def __init__(self, group: str, module: nn.Module | None, *, frozen: bool = True) -> None:
        self._group = group
        self._module = module
        self._tensors_of = model_tensors if frozen else trained_tensors

    def state_dict(self) -> PartState:
        return self._view().state_dict()

    def check(self, saved: PartState, *, changed: bool) -> None:
        self._view().check(saved, changed=changed)

    def load_state_dict(self, saved: PartState) -> None:
        self._view().load_state_dict(saved)

    def _view(self) -> NamedTensors:
        # Looked up each time: a parameter may have been replaced since the part was made.
        tensors = None if self._module is None else self._tensors_of(self._module)
        return NamedTensors(self._group, tensors)


class FrozenWeights(Part):
    """A hash of a module's frozen parameters, which are not saved but must be the same again.

    Raises ``CheckpointError`` on resumption with others.
    """

    def __init__(self, key: str, module: nn.Module) -> None:
        self._key = key
        self._digest = frozen_digest(module)

    def state_dict(self) -> PartState:
        return PartState({self._key: self._digest})

    def check(self, saved: PartState, *, changed: bool) -> None:
        string(saved.values[self._key], self._key)
        if saved.values[self._key] != self._digest:
            raise CheckpointError(
                "the student must have the weights under its adapters that the run began with, got "
                "others; give it back the model it had, or begin a new run"
            )

    def load_state_dict(self, saved: PartState) -> None:
        """Nothing: they are the same."""


class OptimizerState(Part):
    """Groups and plain values as an entry, moments as a group of tensors.

    ``check_options`` gets the options of all groups, where the configuration is the same: what it
    decides must be as it says.
    """

    def __init__(
        self,
        key: str,
        optimizer: Optimizer,
        parameters: Mapping[str, Tensor],
        *,
        check_options: Check | None = None,
    ) -> None:
        self._key = key
        self._optimizer = optimizer
        self._parameters = parameters
        self._check_options = check_options

    def state_dict(self) -> PartState:
        values, tensors = optimizer_state(self._optimizer, self._parameters)
        return PartState({self._key: values}, {self._key: tensors})

    def check(self, saved: PartState, *, changed: bool) -> None:
        values, tensors = saved.values[self._key], saved.tensors[self._key]
        check_optimizer(self._optimizer, self._parameters, values, tensors)
        if self._check_options is not None and not changed:
            options = [group["options"] for group in values["groups"]]
            self._check_options(options, f"{self._key} options")

    def load_state_dict(self, saved: PartState) -> None:
        values, tensors = saved.values[self._key], saved.tensors[self._key]
        load_optimizer(self._optimizer, self._parameters, values, tensors)


class Gradients(Part):
    """The gradients of a window that is still open."""

    def __init__(self, group: str, parameters: Mapping[str, Tensor]) -> None:
        self._group = group
        self._parameters = parameters

    def state_dict(self) -> PartState:
        return PartState(tensors={self._group: gradient_tensors(self._parameters)})

    def check(self, saved: PartState, *, changed: bool) -> None:
        check_gradients(self._parameters, saved.tensors[self._group])

    def load_state_dict(self, saved: PartState) -> None:
        load_gradients(self._parameters, saved.tensors[self._group])


class RandomGenerators(Part):
    """The global random generators; ``missing`` names those whose device this machine lacks."""

    restored_last = True  # building and loading other objects draws numbers
    per_rank = True

    def __init__(self, key: str) -> None:
        self._key = key
        self.missing: list[str] = []

    def state_dict(self) -> PartState:
        values, tensors = rng_state()
        return PartState({self._key: values}, {self._key: tensors})

    def check(self, saved: PartState, *, changed: bool) -> None:
        check_rng(saved.values[self._key], saved.tensors[self._key])

    def load_state_dict(self, saved: PartState) -> None:
        self.missing = load_rng(saved.values[self._key], saved.tensors[self._key])
