"""Save modules, optimizers, gradients and random generators as JSON and tensors; restore in place.

Everything goes by name and comes back *in place*: an optimizer keeps pointing at the parameters it
was built with. (A module that is replaced after its optimizer was built trains nothing.)

The tensors returned are the live ones, not copies: write them before training goes on.

For every function that loads there is one that checks: names, shapes, dtypes, types and ranges of
all that would be taken over. It raises ``CheckpointError`` for the state of another run, changes
nothing and reads no tensor but single numbers. Whoever loads runs it first, so that a state is
taken over as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from sad.distributed.tensors import local_part, read_like
from sad.errors import CheckpointError
from sad.expected import (
    Check,
    alike,
    anything,
    checkpoint_errors,
    equal,
    every,
    integer,
    mapping,
    number,
    optional,
    plain,
    record,
    sequence,
    string,
)

_LIVE_OPTIONS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Entries of an optimizer's group that are no state: how *this* process computes the update."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> the integers of its width."""

_REMEDY = "resume with the models and the configuration the run began with"


class Form(NamedTuple):
    """What can be known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@runtime_checkable
class UnreadTensors(Protocol):
    """Tensors by name whose forms are known before they are read."""

    def form(self, name: str) -> Form: ...


def form_of(tensors: Mapping[str, Tensor], name: str) -> Form:
    """The form of a tensor, which is not read if it lies in a file."""
    if isinstance(tensors, UnreadTensors):
        dtype, shape = tensors.form(name)
        return Form(dtype, tuple(shape))
    return Form(tensors[name].dtype, tuple(tensors[name].shape))


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
    check_tensors(live, saved, what)
    for name, tensor in live.items():
        tensor.copy_(read_like(saved, name, tensor))


def check_tensors(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Check for ``load_tensors``: the same names, each with the same shape and dtype."""
    _require_same_names(live, saved, f"{what} tensors")
    for name in live:
        _require_form(saved, name, form_of(live, name), f"{what} tensor {name!r}")


def tensors_like(live: Mapping[str, Tensor]) -> Check:
    """``check_tensors`` as one of the checks of ``sad.expected``."""
    return lambda saved, where: check_tensors(live, saved, where)


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
                address = local_part(value).data_ptr()
                shared = local_part(value).numel() > 0 and address in seen
                tensors[f"{name}/{key}"] = value.clone() if shared else value
                seen.add(address)
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
    check_optimizer(optimizer, parameters, state, saved)
    # Names alone: each tensor is read when it is copied, and only then in memory.
    paths = _paths_by_parameter(saved)
    names = _parameter_names(optimizer, parameters)
    # All checks are done; from here on the optimizer changes.
    optimizer.state.clear()
    for group, saved_group in zip(optimizer.param_groups, state["groups"], strict=True):
        for key, value in saved_group["options"].items():
            # JSON has no tuples: betas must come back as one.
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        for parameter in group["params"]:
            name = names[id(parameter)]
            if name not in paths and name not in state["values"]:
                continue
            # Plain values and tensors of one parameter belong together again.
            optimizer.state[parameter] = dict(state["values"].get(name, {}))
            for key, path in paths.get(name, {}).items():
                value = _state_value(parameter, key, saved, path, group)
                optimizer.state[parameter][key] = value


def check_optimizer(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    state: Mapping[str, Any],
    saved: Mapping[str, Tensor],
) -> None:
    """Check for ``load_optimizer``.

    A kernel goes through moments by the size of their parameter, whatever size they have: one of
    another shape would be memory of somebody else.
    """
    with checkpoint_errors():
        OPTIMIZER(state, "optimizer")
    _require_same_groups(optimizer, parameters, state["groups"])
    with checkpoint_errors():
        for i, (group, saved_group) in enumerate(
            zip(optimizer.param_groups, state["groups"], strict=True)
        ):
            for key, value in saved_group["options"].items():
                check = _OPTIONS.get(key) or (alike(group[key]) if key in group else plain)
                check(value, f"optimizer.groups[{i}].options.{key}")
    values, paths = state["values"], _paths_by_parameter(saved)
    _require_known((*values, *paths), parameters, "optimizer state")
    names = _parameter_names(optimizer, parameters)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            if name in values or name in paths:
                of_one = values.get(name, {}), paths.get(name, {}), saved
                where = f"optimizer state of {name!r}"
                _check_state(optimizer, parameter, group, *of_one, where)


_UNIT = number(0.0, 1.0)

_OPTIONS: dict[str, Check] = {
    "lr": number(0.0),
    "initial_lr": number(0.0),
    "eps": number(0.0),
    "weight_decay": number(0.0),
    "betas": sequence(_UNIT, _UNIT),
}
"""Options of an optimizer's group that have limits."""

OPTIMIZER = record(
    {
        "groups": every(record({"names": every(string), "options": mapping(anything)})),
        "values": mapping(mapping(anything)),
    }
)
"""What the plain values of an optimizer are made of."""


def _check_state(
    optimizer: Optimizer,
    parameter: Tensor,
    group: dict[str, Any],
    values: Mapping[str, Any],
    paths: Mapping[str, str],
    saved: Mapping[str, Tensor],
    where: str,
) -> None:
    """Check the state of one parameter: ``values``, and the tensors ``saved[paths[key]]``."""
    with checkpoint_errors():
        for key, value in values.items():
            (integer(0, 2**53) if key == "step" else _SINGLE)(value, f"{where}, {key},")
    forms = _state_forms(optimizer, parameter, group)
    if forms is None:  # of an optimizer that is not known here
        own = Form(parameter.dtype, tuple(parameter.shape))
        choices = (own, own._replace(dtype=torch.float32), Form(torch.float32, ()))
        forms = dict.fromkeys(paths, choices)
    else:
        counted = () if "step" in forms else ("step",)  # by a tensor, or by a plain value
        _require_same_names(forms, paths, where)
        _require_same_names(counted, values, f"plain {where}")
    for key, path in paths.items():
        _require_form(saved, path, forms[key], f"{where}, {key},")
        if key == "step" and not form_of(saved, path).shape:
            _check_count(saved[path], where)


_SINGLE = alike(None)


def _check_count(step: Tensor, where: str) -> None:
    value = float(step)
    if not (0 <= value <= 2**53 and value.is_integer()):
        raise CheckpointError(
            f"the checkpoint's {where} must count its steps, got {value}; resume from another "
            "checkpoint"
        )


def _state_forms(
    optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]
) -> dict[str, Form | tuple[Form, ...]] | None:
    """State tensor -> the forms that it may have; None for an optimizer that is not known here."""
    shape = tuple(parameter.shape)
    own, wide, scalar = (
        Form(parameter.dtype, shape),
        Form(torch.float32, shape),
        Form(torch.float32, ()),
    )
    if isinstance(optimizer, Adam):  # as is torch's AdamW
        # Fused kernels take moments of the parameter's dtype alone.
        moment = own if group.get("fused") else (own, wide)
        keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        step = scalar if group.get("fused") else (scalar, Form(torch.float64, ()))
        return {"step": step} | dict.fromkeys(keys, moment)
    if type(optimizer).__name__ == "AdamW8bit":  # of bitsandbytes, which need not be installed
        if parameter.numel() < cast(Any, optimizer).args.min_8bit_size:
            return {"state1": wide, "state2": wide}
        states: dict[str, Form | tuple[Form, ...]] = {}
        for i in "12":
            states[f"state{i}"] = Form(torch.uint8, shape)
            states[f"qmap{i}"] = Form(torch.float32, (256,))
            states[f"absmax{i}"] = Form(torch.float32, (-(-parameter.numel() // 256),))
        return states
    return None


def _paths_by_parameter(saved: Iterable[str]) -> dict[str, dict[str, str]]:
    """Parameter name -> state key -> the name of that tensor in ``saved``."""
    paths: dict[str, dict[str, str]] = {}
    for path in saved:
        name, _, key = path.rpartition("/")
        paths.setdefault(name, {})[key] = path
    return paths


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


def _state_value(
    parameter: Tensor, key: str, saved: Mapping[str, Tensor], path: str, group: dict[str, Any]
) -> Tensor:
    """A saved tensor of a parameter's state, as this optimizer would have created it."""
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return saved[path].to("cpu", copy=True)  # on the host: no synchronisation in a step
    return _copy_like(parameter, saved, path)


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
    check_gradients(parameters, saved)
    for name, parameter in parameters.items():
        parameter.grad = _copy_like(parameter, saved, name) if name in saved else None


def check_gradients(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Check for ``load_gradients``: of this run's parameters, in the form that autograd adds to."""
    _require_known(saved, parameters, "gradient")
    for name in saved:
        parameter = parameters[name]
        dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
        _require_form(saved, name, Form(dtype, tuple(parameter.shape)), f"gradient {name!r}")


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
    check_rng(state, saved)
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


def start_rng(seed: int, rank: int, micro_step: int) -> None:
    """Start the global generators at a state that follows from these three numbers.

    For a checkpoint of another number of processes, whose generators nobody can take over: each
    process draws other numbers, and none those that it drew at the start of the run.
    """
    words = np.random.SeedSequence([seed, rank, micro_step]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


def check_rng(state: Mapping[str, Any], saved: Mapping[str, Tensor]) -> None:
    """Check for ``load_rng``: each state is one that its generator can be in."""
    with checkpoint_errors():
        _RNG(state, "rng")
    required = {"torch", "numpy"}
    devices = [name for name in saved if _CUDA.fullmatch(name)]
    _require_same_names([*required, *devices], saved, "rng tensors")
    _require_form(saved, "numpy", Form(torch.int64, (_WORDS,)), "rng tensor 'numpy'")
    low, high = (int(bound) for bound in saved["numpy"].aminmax())
    if low < 0 or high >= 2**32:
        raise _impossible("numpy", f"words from {low} to {high}")
    check_generator(saved, "torch", "rng tensor 'torch'")
    for name in devices:
        _require_form(saved, name, Form(torch.uint8, (16,)), f"rng tensor {name!r}")
        offset = int(saved[name].view(torch.int64)[1])  # of Philox, beside its seed
        if offset < 0 or offset % 4:
            raise _impossible(name, f"an offset of {offset}")


def check_generator(saved: Mapping[str, Tensor], name: str, what: str) -> None:
    """Check that a generator of the CPU can be in the state ``saved[name]``."""
    generator = torch.Generator()  # a fresh one, on which the state is tried
    _require_form(saved, name, form_of({name: generator.get_state()}, name), what)
    try:
        generator.set_state(saved[name].clone())
    except RuntimeError as error:
        raise _impossible(name, "bytes that torch refuses") from error


def _impossible(name: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's rng tensor {name!r} must be a state of its generator, got {found}; "
        "resume from another checkpoint"
    )


_WORDS = 624
"""Words of the Mersenne Twister's state, which Python, numpy and torch share."""

_CUDA = re.compile(r"cuda\.\d{1,4}")

_RNG = record(
    {
        "python": record(
            {
                "version": equal(3),
                "words": sequence(*[integer(0, 2**32 - 1)] * _WORDS, integer(0, _WORDS)),
                "gauss": optional(number()),
            }
        ),
        "numpy": record(
            {"position": integer(0, _WORDS), "has_gauss": integer(0, 1), "cached": number()}
        ),
    }
)


# Shared by the above


def _copy_like(parameter: Tensor, saved: Mapping[str, Tensor], name: str) -> Tensor:
    """A copy of ``saved[name]`` on the parameter's device, in the parameter's memory layout, and
    split over processes as it is, if it has its shape.

    Fused optimizers walk through parameter, gradient and moments by address, so the strides of a
    moment must be those it would have been created with.
    """
    if form_of(saved, name).shape != parameter.shape:
        return saved[name].to(parameter.device, copy=True)
    value = read_like(saved, name, parameter)
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


def _require_form(
    saved: Mapping[str, Tensor], name: str, expected: Form | tuple[Form, ...], what: str
) -> None:
    """Raise ``CheckpointError`` unless ``saved[name]`` has one of the expected forms."""
    choices = (expected,) if isinstance(expected, Form) else expected
    found = form_of(saved, name)
    if found not in choices:
        raise _mismatch_of(what, str(choices[0]), found)


def _mismatch_of(what: str, expected: str, found: Form) -> CheckpointError:
    return CheckpointError(f"the checkpoint's {what} must be {expected}, got {found}; {_REMEDY}")
