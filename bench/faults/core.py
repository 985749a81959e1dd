"""The ``Fault`` record, and its measurement for every peer as result rows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from sad_kernels import reference

from bench.faults.calls import Call
from bench.faults.problem import DEVICE, Loss, Problem
from bench.kernels.timing import one_line
from bench.peers.base import Unsupported

Row = dict[str, Any]
Values = list[float]
Judge = Callable[[Values, Values], bool]

INTERPRETED = DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
RELATIVE = "relative error of"  # a unit that begins so is shown as percentages


@dataclass(frozen=True)
class Fault:
    """A quantity of a loss, measured on some problems in the same way for every implementation.

    The true value is that of ``ours`` with ``library=reference``, on the problems in float64.
    Interpreted kernels take a tenth of a second per row: they get only problem ``one``.
    """

    slug: str
    title: str
    inputs: str
    unit: str
    problems: Sequence[Problem]
    measure: Callable[[Loss, Sequence[Any]], Values]
    right: Judge
    ours: Callable[..., Any]
    peers: Sequence[Call]
    one: int | None = None


def close(relative: float, absolute: float = 0.0) -> Judge:
    """A judge that accepts values within either tolerance of the true ones."""

    def right(values: Values, true: Values) -> bool:
        pairs = zip(values, true, strict=True)
        return all(v == t or abs(v - t) <= max(absolute, relative * abs(t)) for v, t in pairs)

    return right


def at_most(limit: float) -> Judge:
    """A judge that accepts errors up to ``limit``."""
    return lambda values, true: all(v <= limit for v in values)  # NaN is not


def rows_of(fault: Fault) -> list[Row]:
    """One row per peer; each also says whether ours are right."""
    true = fault.measure(
        partial(fault.ours, library=reference), [p.double() for p in fault.problems]
    )
    found = {impl: _ours(fault, impl, true) for impl in ("torch", "triton")}
    ours = {impl: value for impl, (value, _) in found.items()}
    right = all(fine for _, fine in found.values())
    return [_row(fault, call, true, ours, right) for call in fault.peers]


def _ours(fault: Fault, impl: str, true: Values) -> tuple[Any, bool]:
    """Our values and whether they are right, or the reason why they cannot be measured here."""
    problems = fault.problems
    if impl == "triton":
        if find_spec("triton") is None:
            return "triton is not installed", True
        if DEVICE.type == "cpu" and not INTERPRETED:
            return "needs a GPU", True
        if INTERPRETED and fault.one is not None:
            problems, true = [problems[fault.one]], [true[fault.one]]
    try:
        values = fault.measure(partial(fault.ours, impl=impl), problems)
    except Exception as error:
        return one_line(error), False
    return _plain(values), fault.right(values, true)


def _row(fault: Fault, call: Call, true: Values, ours: Row, ours_right: bool) -> Row:
    status, reason, values = _of_peer(fault, call, true)
    interpreted = call.kernels and INTERPRETED and status != "absent"
    inputs = fault.inputs + (", interpreted" if interpreted else "")
    if INTERPRETED and fault.one is not None:
        inputs += f"; ours in triton, interpreted, for one of these {len(fault.problems)}"
    return {
        "fault": fault.slug,
        "title": fault.title,
        "inputs": inputs,
        "peer": call.peer,
        "package": call.package,
        "call": call.call,
        "interpreted": interpreted,
        "status": status,
        "reason": reason,
        "peer_value": _plain(values),
        "true_value": _plain(true),
        "ours": ours,
        "unit": fault.unit,
        "ours_right": ours_right,
    }


def broken(slug: str, error: Exception) -> Row:
    """A row for a fault whose inputs or float64 values could not be computed."""
    fault = Fault(
        slug, slug.replace("_", " "), "", "", [], _unmeasured, close(0.0), _unmeasured, []
    )
    nobody = Call("nobody", "", "", _unmeasured)
    return _row(fault, nobody, [], {"float64": one_line(error)}, False)


def _unmeasured(*_: Any) -> Any:
    raise Unsupported("there is nothing to measure")


def _of_peer(fault: Fault, call: Call, true: Values) -> tuple[str, str | None, Values]:
    if call.kernels and DEVICE.type == "cpu" and not INTERPRETED:
        return "absent", "needs a GPU", []
    try:
        values = fault.measure(call.loss, fault.problems)
    except Unsupported as error:
        return "absent", str(error), []
    except Exception as error:
        if call.kernels and INTERPRETED:  # the interpreter may be the cause
            return "absent", f"needs a GPU: interpreted, it ends in {one_line(error)}", []
        return "raises", one_line(error), []
    return "right" if fault.right(values, true) else "shown", None, values


def _plain(values: Values) -> Any:
    """The values for JSON: one number, a list or None; non-finite numbers as strings."""
    some = [float(f"{v:.5g}") if math.isfinite(v) else str(v) for v in values]
    return some[0] if len(some) == 1 else some or None


def norm(x: torch.Tensor) -> float:
    return float(x.double().norm())


def relative_error(x: torch.Tensor, true: torch.Tensor) -> float:
    return norm(x.double() - true) / norm(true)


def cosine(x: torch.Tensor, true: torch.Tensor) -> float:
    return float((x.double() * true).sum() / (x.double().norm() * true.norm()))
