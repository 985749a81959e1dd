"""Save modules, optimizers, gradients and random generators as JSON and tensors; restore in place.

Everything goes by name and comes back *in place*: an optimizer keeps pointing at the parameters it
was built with. (A module that is replaced after its optimizer was built trains nothing.)

The tensors returned are the live ones, not copies: write them before training goes on. Functions
that load check names, shapes and dtypes before they change anything, and raise ``CheckpointError``
for a checkpoint of another run.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sad.errors import CheckpointError

_LIVE_OPTIONS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Entries of an optimizer's group that are no state: how *this* process computes the update."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> the integers of its width."""

_REMEDY = "resume with the models and the configuration the run began with"


# Modules, or any named tensors


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied one appears once, under its first name."""
    persistent = model.state_dict().keys()  # under all names; what it lacks is not persistent
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return dict(model.named_parameters()) | buffers


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """``model_tensors`` without frozen parameters."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model_tensors(model).items() if name not in frozen}


def frozen_digest(model: nn.Module) -> str:
    """A hash that tells frozen parameters of one model from those of another.

    Of each parameter only the sum of its bits, as integers, is hashed: that takes one pass on its
    device.
    """
    sums = {
        name: int(p.detach().view(_INTEGERS[p.element_size()]).sum(dtype=torch.int64))
        for name, p in model.named_parameters()
        if not p.requires_grad
    }
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def load_model(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy saved parameters and persistent buffers into a model of the same architecture."""
    load_tensors(model_tensors(model), saved, "model")


@torch.no_grad()
def load_tensors(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy ``saved`` into ``live``, name by name. ``what`` names the tensors in errors."""
    _require_same_names(live, saved, f"{what} tensors")
    for name, tensor in live.items():
        _require_alike(tensor, saved[name], f"{what} tensor {name!r}")
    for name, tensor in live.items():
        tensor.copy_(saved[name])


# Optimizers


def optimizer_state(
    optimizer: Optimizer, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Groups and plain values for JSON, and the state tensors as ``parameter name/state key``.

    ``parameters`` names every parameter of the optimizer; with fp32 master weights these are the
    masters. A table that parameters share (bitsandbytes' quantisation maps) is copied for each.
    """
    names = _parameter_names(optimizer, parameters)
    seen: set[int] = set()
    groups = [
        {
            "names": [names[id(parameter)] for parameter in group["params"]],
            "options": {key: _json_value(group[key]) for key in group if key not in _LIVE_OPTIONS},
        }
        for group in optimizer.param_groups
    ]
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                shared = value.numel() > 0 and value.data_ptr() in seen
                tensors[f"{name}/{key}"] = value.clone() if shared else value
                seen.add(value.data_ptr())
            else:
                values.setdefault(name, {})[key] = _json_value(value)
    return {"groups": groups, "values": values}, tensors


@torch.no_grad()
def load_optimizer(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    state: Mapping[str, Any],
    saved: Mapping[str, Tensor],
) -> None:
    """Put saved groups and state into an optimizer built in the same way.

    ``Optimizer.load_state_dict`` would cast the state to the parameter's dtype, and so round fp32
    moments of bf16 parameters. Here every tensor keeps its dtype.
    """
    _require_same_groups(optimizer, parameters, state["groups"])
    # Names alone: each tensor is read when it is copied, and only then in memory.
    paths: dict[str, list[str]] = {name: [] for name in state["values"]}
    for path in saved:
        paths.setdefault(path.rpartition("/")[0], []).append(path)
    _require_known(paths, parameters, "optimizer state")

    names = _parameter_names(optimizer, parameters)
    # All checks are done; from here on the optimizer changes.
    optimizer.state.clear()
    for group, saved_group in zip(optimizer.param_groups, state["groups"], strict=True):
        for key, value in saved_group["options"].items():
            # JSON has no tuples: betas must come back as one.
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        for parameter in group["params"]:
            name = names[id(parameter)]
            if name not in paths:
                continue
            # Plain values and tensors of one parameter belong together again.
            optimizer.state[parameter] = dict(state["values"].get(name, {}))
            for path in paths[name]:
                key = path.rpartition("/")[2]
                value = _state_value(parameter, key, saved[path], group)
                optimizer.state[parameter][key] = value


def _parameter_names(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[int, str]:
    """``id`` of each of the optimizer's parameters -> its name in ``parameters``."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    "parameters must name every parameter of the optimizer, got none for one of "
                    f"shape {tuple(parameter.shape)}; pass those the optimizer was built with"
                )
    return names


def _require_same_groups(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], saved: list[dict[str, Any]]
) -> None:
    names = _parameter_names(optimizer, parameters)
    live = [
        [names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups
    ]
    if len(live) != len(saved):
        raise CheckpointError(
            f"the checkpoint's optimizer must have {len(live)} parameter groups, got {len(saved)}; "
            f"{_REMEDY}"
        )
    for i, (live_names, group) in enumerate(zip(live, saved, strict=True)):
        _require_same_names(live_names, group["names"], f"optimizer group {i} parameters")


def _state_value(parameter: Tensor, key: str, value: Tensor, group: dict[str, Any]) -> Tensor:
    """A saved tensor of a parameter's state, as this optimizer would have created it."""
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return value.to("cpu", copy=True)  # counted on the host: no synchronisation in a step
    return _copy_like(parameter, value)


def _json_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# Gradients of an unfinished window


def gradient_tensors(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients accumulated so far, in fp16 with their loss scale; parameters without one are
    left out."""
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


@torch.no_grad()
def load_gradients(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Restore every ``.grad``; that of a parameter that ``saved`` does not name becomes None."""
    _require_known(saved, parameters, "gradient")
    for name, gradient in saved.items():
        if gradient.shape != parameters[name].shape:
            raise _mismatch(f"gradient {name!r}", parameters[name], gradient)
    for name, parameter in parameters.items():
        parameter.grad = _copy_like(parameter, saved[name]) if name in saved else None


# Random numbers


def rng_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of this process's global generators: torch (CPU, CUDA devices), Python, numpy."""
    version, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = cast(tuple, np.random.get_state(legacy=True))
    state = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {"position": int(position), "has_gauss": int(has_gauss), "cached": float(cached)},
    }
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(key.astype(np.int64))}
    if torch.cuda.is_initialized():  # asking would initialise it
        for i, device_state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{i}"] = device_state
    return state, tensors


def load_rng(state: Mapping[str, Any], saved: Mapping[str, Tensor]) -> list[str]:
    """Restore the global generators. Do this last: other objects draw numbers while loading.

    Returns the names of saved generators whose device this machine lacks: if there are any, random
    draws on devices do not continue where they stopped.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    key = saved["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(saved["torch"].clone())
    devices = torch.cuda.device_count()
    missing = []
    for name in saved:
        kind, _, index = name.partition(".")
        if kind == "cuda" and int(index) < devices:
            torch.cuda.set_rng_state(saved[name].clone(), int(index))
        elif kind == "cuda":
            missing.append(name)
    return missing


# Shared by the above


def _copy_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy on the parameter's device, in the parameter's memory layout if it has its shape.

    Fused optimizers walk through parameter, gradient and moments by address, so the strides of a
    moment must be those it would have been created with.
    """
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _require_same_names(live: Iterable[str], saved: Iterable[str], what: str) -> None:
    live, saved = list(live), list(saved)
    missing, unexpected = sorted(set(live) - set(saved)), sorted(set(saved) - set(live))
    if missing or unexpected:
        first = f"first {(missing or unexpected)[0]!r}"
        raise CheckpointError(
            f"the checkpoint's {what} must be the {len(live)} of this run, got {len(missing)} "
            f"missing and {len(unexpected)} unexpected, {first}; {_REMEDY}"
        )


def _require_known(saved: Iterable[str], live: Mapping[str, Tensor], what: str) -> None:
    for name in saved:
        if name not in live:
            raise CheckpointError(
                f"the checkpoint's {what} must belong to parameters of this run, got {name!r}; "
                f"{_REMEDY}"
            )


def _require_alike(live: Tensor, saved: Tensor, what: str) -> None:
    if live.shape != saved.shape or live.dtype != saved.dtype:
        raise _mismatch(what, live, saved)


def _mismatch(what: str, live: Tensor, saved: Tensor) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's {what} must be {live.dtype} {tuple(live.shape)}, got {saved.dtype} "
        f"{tuple(saved.shape)}; {_REMEDY}"
    )
