"""What a peer is: a name, the call it stands for, and how to make that call on a problem."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bench.problems.inputs import IGNORED, Hidden, Logits


class Unable(Exception):
    """A peer cannot do a problem as it is posed. The text is the reason in its row."""


@dataclass(frozen=True)
class Peer:
    """One series of rows. ``build`` gets a problem and raises ``Unable``, or returns what is timed.

    For losses that is a function of nothing whose result can be differentiated; for moving averages
    an ``Average``. ``build`` may prepare what a user prepares once; whatever each call needs
    belongs into the function.
    """

    name: str
    call: str
    build: Callable[[Any], Any]
    package: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    overwrites: bool = False  # the logits that it is given
    compiles: bool = False  # its first call takes long
    devices: tuple[str, ...] = ("cuda", "cpu")
    extra: bool = False  # one more setting of a peer, left out of quick sets


@dataclass(frozen=True)
class Average:
    """A moving average at work: its shadows, an update, or a swap and the way back."""

    shadows: list[Tensor]
    forward: Callable[[], object]
    backward: Callable[[Any], None] = lambda result: None


def module(name: str, package: str) -> Any:
    """A peer's module, imported when it is wanted."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0]:
            raise Unable(f"{package} is not installed") from None
        raise Unable(f"{package} does not import here: {error}") from None
    except Exception as error:  # a package that looks for a GPU, or for another version
        first = str(error).strip().partition("\n")[0]
        raise Unable(f"{package} does not import here: {type(error).__name__}: {first}") from None


def attribute(owner: Any, name: str, package: str) -> Any:
    if not hasattr(owner, name):
        raise Unable(f"this version of {package} has no {name}")
    return getattr(owner, name)


def only(problem: Logits | Hidden, *kinds: str, what: str) -> None:
    """Raise ``Unable`` for a loss that is none of these; ``what`` says what the peer has."""
    if problem.case.kind not in kinds:
        raise Unable(what)
    if problem.case.top_k:
        raise Unable("takes no top-k teacher")


def beta_of(problem: Logits | Hidden) -> float:
    """The peers' name for a divergence: 0 forward, 1 reverse, JSD between."""
    objective = problem.case.objective
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": objective.beta}[objective.divergence]


def kept_rows(labels: Tensor, ignored: float, *rows: Tensor) -> tuple[Tensor, ...]:
    """Labels and rows that count, for peers that know of no others: selected inside the call."""
    if not ignored:
        return labels, *rows
    keep = labels != IGNORED
    return labels[keep], *(x[keep] for x in rows)
