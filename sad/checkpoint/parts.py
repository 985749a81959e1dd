"""The parts of a checkpoint: each says what it saves, and is given the same back.

A checkpoint is what a list of parts returns from ``state_dict``: entries of ``state.json``, which
are plain values, and groups of tensors, one file each. On resumption every part gets exactly the
entries and groups that it would save now; a checkpoint that lacks one of them is refused. So one
more part in the list is all that a new piece of state needs, and none can be saved without being
restored.

The classes here are views of live objects: nothing is copied before it is written, and every tensor
is filled in place (see ``sad.checkpoint.state``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sad.checkpoint.state import (
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
from sad.errors import CheckpointError

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

    @abstractmethod
    def state_dict(self) -> PartState:
        """The entries and groups of this part; the same names in every state of the run."""

    @abstractmethod
    def load_state_dict(self, saved: PartState) -> None:
        """Continue from there, bit for bit."""


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


def restore_parts(parts: Sequence[Part], checkpoint: Checkpoint) -> None:
    """Hand every part what it saved.

    Raises ``CheckpointError``, before anything is restored, for a checkpoint that lacks an entry or
    a group of tensors.
    """
    saved = {
        id(part): PartState(
            {key: entry(checkpoint, key) for key in own.values},
            {group: tensor_group(checkpoint, group) for group in own.tensors},
        )
        for part in parts
        for own in [part.state_dict()]
    }
    for part in _in_order_of_restoration(parts):
        part.load_state_dict(saved[id(part)])


def entry(checkpoint: Checkpoint, key: str) -> Any:
    """An entry of a checkpoint's ``state.json``; ``CheckpointError`` if it has none."""
    if key not in checkpoint.state:
        raise _lacking(checkpoint, f"{key!r} in state.json")
    return checkpoint.state[key]


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
    ``key``. An object that this run does not have, None, is saved as ``null`` and ignores what a
    checkpoint holds in its place; one that the saved run did not have stays as it was built. (Both
    only where the configuration was allowed to change.)

    Raises ``TypeError`` for an object that cannot be saved and restored.
    """

    def __init__(self, key: str, stateful: Stateful | None, *, tensors: str | None = None) -> None:
        if stateful is not None:
            _require_stateful(key, stateful)
        self._key = key
        self._stateful = stateful
        self._tensors = tensors

    def state_dict(self) -> PartState:
        state = None if self._stateful is None else self._stateful.state_dict()
        if self._tensors is None:
            return PartState({self._key: state})
        named = {} if state is None else state[self._tensors]
        if state is not None:
            state = {key: value for key, value in state.items() if key != self._tensors}
        return PartState({self._key: state}, {self._key: named})

    def load_state_dict(self, saved: PartState) -> None:
        state = saved.values[self._key]
        if self._stateful is None or state is None:
            return
        if self._tensors is not None:
            state = state | {self._tensors: saved.tensors[self._key]}
        self._stateful.load_state_dict(state)


class Entries(Part):
    """A ``Stateful`` object whose state consists of entries of ``state.json``."""

    def __init__(self, stateful: Stateful) -> None:
        _require_stateful(type(stateful).__name__, stateful)
        self._stateful = stateful

    def state_dict(self) -> PartState:
        return PartState(self._stateful.state_dict())

    def load_state_dict(self, saved: PartState) -> None:
        self._stateful.load_state_dict(saved.values)


class Constant(Part):
    """A value that is saved for whoever resumes to compare with, and never changes in a run."""

    def __init__(self, key: str, value: Any) -> None:
        self._saved = PartState({key: value})

    def state_dict(self) -> PartState:
        return self._saved

    def load_state_dict(self, saved: PartState) -> None:
        """Nothing: this run has its own."""


class Numbers(Part):
    """A small tensor, as numbers in ``state.json``: float64 and integers survive exactly."""

    def __init__(self, key: str, tensor: Tensor) -> None:
        self._key = key
        self._tensor = tensor

    def state_dict(self) -> PartState:
        return PartState({self._key: self._tensor.tolist()})

    def load_state_dict(self, saved: PartState) -> None:
        value = torch.tensor(saved.values[self._key], dtype=self._tensor.dtype)
        if value.shape != self._tensor.shape:
            raise CheckpointError(
                f"the checkpoint's {self._key} must be numbers of shape "
                f"{tuple(self._tensor.shape)}, got {tuple(value.shape)}; it is of another version "
                "of sad: resume with that version, or begin a new run"
            )
        self._tensor.copy_(value)


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

    def load_state_dict(self, saved: PartState) -> None:
        if saved.values[self._key] != self._digest:
            raise CheckpointError(
                "the student must have the weights under its adapters that the run began with, got "
                "others; give it back the model it had, or begin a new run"
            )


class OptimizerState(Part):
    """Groups and plain values as an entry, moments as a group of tensors."""

    def __init__(self, key: str, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        self._key = key
        self._optimizer = optimizer
        self._parameters = parameters

    def state_dict(self) -> PartState:
        values, tensors = optimizer_state(self._optimizer, self._parameters)
        return PartState({self._key: values}, {self._key: tensors})

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

    def load_state_dict(self, saved: PartState) -> None:
        load_gradients(self._parameters, saved.tensors[self._group])


class RandomGenerators(Part):
    """The global random generators; ``missing`` names those whose device this machine lacks."""

    restored_last = True  # building and loading other objects draws numbers

    def __init__(self, key: str) -> None:
        self._key = key
        self.missing: list[str] = []

    def state_dict(self) -> PartState:
        values, tensors = rng_state()
        return PartState({self._key: values}, {self._key: tensors})

    def load_state_dict(self, saved: PartState) -> None:
        self.missing = load_rng(saved.values[self._key], saved.tensors[self._key])
