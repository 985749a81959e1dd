"""The peer interface: a named implementation, and how to call it on a benchmark problem."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import Tensor

from bench.problems.inputs import IGNORED, Hidden, Logits


class Unsupported(Exception):
    """A peer does not support a problem. The message becomes the reason in its row."""


@dataclass(frozen=True)
class Peer:
    """One implementation with one setting. ``build(problem)`` returns the call that is timed.

    For a loss that is a function without arguments that returns the loss, ready for backward; for
    a moving average an ``Average``. ``build`` may do what a user does once, before training; work
    that every call needs belongs into the returned function. ``build`` raises ``Unsupported`` for
    a problem that the implementation cannot do.
    """

    name: str
    call: str
    build: Callable[[Any], Any]
    package: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    overwrites: bool = False  # its input logits; they are restored each time
    compiles: bool = False  # its first call takes seconds to minutes
    devices: tuple[str, ...] = ("cuda", "cpu")
    extra: bool = False  # a further setting of a peer, skipped by --quick


@dataclass(frozen=True)
class Average:
    """A moving average: its shadows, and the timed update, or swap and swap back."""

    shadows: list[Tensor]
    forward: Callable[[], object]
    backward: Callable[[Any], None] = lambda result: None


def require_module(name: str, package: str) -> Any:
    """Import a peer's module when it is first needed; ``Unsupported`` where that fails."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0]:
            raise Unsupported(f"{package} is not installed") from None
        raise Unsupported(f"{package} does not import here: {error}") from None
    except Exception as error:  # a package that looks for a GPU, or for another version
        first = str(error).strip().partition("\n")[0]
        raise Unsupported(
            f"{package} does not import here: {type(error).__name__}: {first}"
        ) from None


@cache
def require_file(name: str, package: str) -> Any:
    """Import a peer's module without running the ``__init__`` of any folder of its package.

    What the module imports from its own package is found in the same way. None of it stays among
    the imported modules, so that the whole package can be imported beside it.
    """
    root = name.partition(".")[0]

    def take_out() -> dict[str, ModuleType]:
        names = [each for each in sys.modules if each.partition(".")[0] == root]
        return {each: sys.modules.pop(each) for each in names}

    imported, finder = take_out(), _WithoutInit(root)
    sys.meta_path.insert(0, finder)
    try:
        return require_module(name, package)
    finally:
        sys.meta_path.remove(finder)
        take_out()
        sys.modules.update(imported)


class _WithoutInit(MetaPathFinder):
    """Finds the modules of one package, and its folders as if they had no ``__init__``."""

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self.root:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is None or found.submodule_search_locations is None:
            return found
        bare = ModuleSpec(fullname, None, is_package=True)
        bare.submodule_search_locations = found.submodule_search_locations
        return bare


def require_attribute(owner: Any, name: str, package: str) -> Any:
    """``owner.name``; ``Unsupported`` if this version of the package does not have it."""
    if not hasattr(owner, name):
        raise Unsupported(f"this version of {package} has no {name}")
    return getattr(owner, name)


def require_kind(problem: Logits | Hidden, *kinds: str, what: str) -> None:
    """Raise ``Unsupported(what)`` unless the case is one of ``kinds`` (ce, kd, joint)."""
    if problem.case.kind not in kinds:
        raise Unsupported(what)
    if problem.case.top_k:
        raise Unsupported("takes no top-k teacher")


def beta_of(problem: Logits | Hidden) -> float:
    """The ``beta`` of TRL's and Liger's generalised JSD: 0 is forward KL, 1 is reverse KL."""
    objective = problem.case.objective
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": objective.beta}[objective.divergence]


def select_valid_rows(labels: Tensor, ignored: float, *rows: Tensor) -> tuple[Tensor, ...]:
    """Labels and rows without the ignored ones, for peers without ``ignore_index``.

    To be called inside the timed function: the peer's users pay for the selection, too.
    """
    if not ignored:
        return labels, *rows
    keep = labels != IGNORED
    return labels[keep], *(x[keep] for x in rows)
