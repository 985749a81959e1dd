"""The public names, their signatures and defaults equal the committed list ``public.txt``.

A change there is a change for users: it needs a line in CHANGELOG.md. To write the new list:

    python tests/contracts/test_public.py > tests/contracts/public.txt
"""

from __future__ import annotations

import ast
import difflib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sad_kernels
from sad_kernels import reference

import sad
from sad import losses

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

PARTS = {
    "sad.accumulate": ["GradientAccumulator"],
    "sad.checkpoint": ["latest_checkpoint", "load_checkpoint", "save_checkpoint"],
    "sad.config": ["DataConfig"],
    "sad.curriculum": ["Curriculum"],
    "sad.ema": ["ModelEMA"],
    "sad.errors": [
        "CheckpointError",
        "DivergedError",
        "OutOfMemoryError",
        "OutputError",
        "SadError",
        "StoppedError",
        "UnfitError",
        "UsageError",
    ],
    "sad.integrations": ["DistillMixin", "DistillModel", "DistillSFTMixin"],
    "sad.losses": list(losses.__all__),
    "sad.models": ["split_head"],
}
"""What people build their own loops from: submodule -> names."""

HOW = frozenset({"impl", "chunk_bytes", "vocab_shard"})
"""Arguments that say how, not what, or which part: the reference has none of them."""


WITHOUT_DEFINITION = frozenset({"linear_memory_bytes"})
"""Functions that compute nothing of a tensor, so that the reference has nothing to define."""


def public_api() -> list[str]:
    """One line per name, field and method, with signature and default."""
    names = {"sad_kernels": sad_kernels.__all__, "sad": sad.__all__} | PARTS
    return [
        line
        for module, exported in names.items()
        for name in exported
        for line in describe(module, import_module(module), name)
    ]


def describe(prefix: str, module: Any, name: str) -> Iterator[str]:
    value, full_name = getattr(module, name), f"{prefix}.{name}"
    if inspect.isfunction(value):
        yield full_name + signature(value)
    elif not inspect.isclass(value):
        yield full_name
    elif issubclass(value, BaseException):
        yield f"{full_name} exit code {getattr(value, 'exit_code', None)}"
    elif is_dataclass(value):
        keyword_only = " (keyword-only)" if all(f.kw_only for f in fields(value)) else ""
        yield f"{full_name}{keyword_only}"
        yield from (f"{full_name}.{f.name}{default(f)}" for f in fields(value))
        yield from methods(full_name, value)
    else:
        yield full_name + signature(value)
        yield from methods(full_name, value)


def methods(full_name: str, cls: type) -> Iterator[str]:
    for name, member in sorted(vars(cls).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"{full_name}.{name} (property)"
        elif inspect.isfunction(member):
            yield f"{full_name}.{name}{signature(member)}"


def signature(function: Any) -> str:
    """Names, kinds and defaults; annotations are the type checker's business."""
    bare = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in bare.parameters.values()]
    return str(bare.replace(parameters=parameters, return_annotation=bare.empty))


def default(item: Any) -> str:
    if item.default_factory is not MISSING:
        return f" = {item.default_factory.__name__}()"
    return "" if item.default is MISSING else f" = {item.default!r}"


def difference(committed: list[str], found: list[str]) -> str:
    return "\n".join(difflib.unified_diff(committed, found, "public.txt", "the code", lineterm=""))


def test_public_names_and_signatures_are_as_committed() -> None:
    committed = (HERE / "public.txt").read_text().splitlines()
    assert len(committed) > 100
    assert difference(committed, public_api()) == ""


def sound(x: int, *, y: float = 1.0) -> None: ...


def renamed(z: int, *, y: float = 1.0) -> None: ...


def positional(x: int, y: float = 1.0) -> None: ...


def other_default(x: int, *, y: float = 2.0) -> None: ...


@pytest.mark.parametrize("planted", [renamed, positional, other_default])
def test_a_planted_change_shows(planted: Any) -> None:
    committed = list(describe("m", SimpleNamespace(f=sound), "f"))
    assert committed == ["m.f(x, *, y=1.0)"]
    assert difference(committed, list(describe("m", SimpleNamespace(f=planted), "f"))) != ""


def functions() -> list[str]:
    return [name for name in sad_kernels.__all__ if inspect.isfunction(getattr(sad_kernels, name))]


@pytest.mark.parametrize("name", [n for n in functions() if n not in WITHOUT_DEFINITION])
def test_every_function_has_a_specification_with_its_arguments(name: str) -> None:
    ours = inspect.signature(getattr(sad_kernels, name)).parameters
    specified = inspect.signature(getattr(reference, name)).parameters
    what = {key: p.default for key, p in ours.items() if key not in HOW}
    assert what == {key: p.default for key, p in specified.items()}
    assert list(what) == list(specified)


@pytest.mark.parametrize("name", functions())
def test_every_function_has_a_test(name: str) -> None:
    nodes = [
        node
        for path in (ROOT / "tests" / "sad_kernels").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    ]
    imported = {a.name for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert name in imported | attributes


def test_import_sad_is_light_and_finds_its_parts() -> None:
    """In one fresh process: nothing heavy at first, then every part by attribute."""
    parts = [f"{module}.{name}" for module, names in PARTS.items() for name in names]
    script = f"""
import sys
import sad
assert not {{"torch", "transformers", "sad_kernels"}} & set(sys.modules)
for part in {parts!r}:
    value = sad
    for name in part.split(".")[1:]:
        value = getattr(value, name)
assert sad.__version__ and set(sad.__all__) <= set(dir(sad))
try:
    sad.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError("a name that does not exist was found")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_sad_kernels_is_light_and_finds_its_names() -> None:
    """In one fresh process: neither torch nor Triton at first, then every name, by each way."""
    script = """
import pickle
import sys
import sad_kernels
assert not {"torch", "triton"} & set(sys.modules), "imported at once"
assert set(sad_kernels.__all__) <= set(dir(sad_kernels))
from sad_kernels import *
for name in sad_kernels.__all__:
    assert getattr(sad_kernels, name) is globals()[name]
assert not [name for name in sys.modules if name.startswith("sad_kernels._triton")]
assert pickle.loads(pickle.dumps(Objective)) is Objective
assert sad_kernels.kd.kl_div is kl_div, "a module that has a public name is not found"
for missing in ("no_such_name", "torch", "_rows_"):
    try:
        getattr(sad_kernels, missing)
    except AttributeError as error:
        assert missing in str(error)
    else:
        raise AssertionError(f"{missing} was found")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def for_type_checkers(source: str) -> dict[str, str]:
    """Name -> module, of the imports under ``if TYPE_CHECKING``."""
    return {
        alias.name: str(node.module)
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("package", [sad_kernels, sad], ids=lambda package: package.__name__)
def test_type_checkers_see_the_names_that_are_imported_late(package: Any) -> None:
    seen = for_type_checkers(inspect.getsource(package))
    assert set(seen) == set(package.__all__)
    homes = {name: home for name, home in seen.items() if f"{home}.{name}" not in sys.modules}
    assert homes == package._HOME


if __name__ == "__main__":
    print("\n".join(public_api()))
