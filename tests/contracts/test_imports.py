"""Import rules: between packages, between the rooms of a package, side effects, extras.

Packages: scripts, bench, tests -> sad -> sad_kernels -> torch, triton. Within a package a *room* is
a folder or a file at its top; rooms lie in layers and import downwards only. Each checker is shown
a planted violation that it must flag.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS, SAD, BENCH = ROOT / "kernels" / "sad_kernels", ROOT / "sad", ROOT / "bench"

TORCH_ONLY = frozenset({"torch", "sad_kernels"}) | sys.stdlib_module_names
"""What ``sad_kernels`` may import anywhere; the package ``_triton`` adds triton."""

REQUIRED = TORCH_ONLY | {
    "einops",
    "huggingface_hub",
    "jinja2",
    "numpy",
    "psutil",
    "sad",
    "safetensors",
    "tokenizers",
    "tqdm",
    "transformers",
    "yaml",
}
"""What ``sad`` may import at module level: the dependencies that are always installed."""

OPTIONAL = frozenset(
    "bitsandbytes datasets matplotlib peft pyarrow tensorboard torchao trackio wandb".split()
)
"""What ``sad`` may import where it is needed, inside a function: the extras."""

BEHIND_EXTRAS = {"report.plots": frozenset({"matplotlib"})}
"""Modules of ``sad`` that are nothing without an extra: they import it, and are imported late."""

LAYERS: dict[Path, tuple[str, ...]] = {
    KERNELS: (
        "_dispatch _divergence_table _extents outcomes vocab",
        "_tiles objective",
        "_divergence _rows reference",
        "_check",
        "_operator",
        "_torch _triton",
        "ce ema kd linear memory",
        "__init__",
    ),
    SAD: (
        "accumulate curriculum errors metrics recipes",
        "expected",
        "config environment selftest",
        "distributed.tensors distributed.world",
        "distributed.loading distributed.sharding ema",
        "models optim",
        "checkpoint",
        "data integrations",
        "losses",
        "distributed",
        "report teachers",
        "distributed",
        "training",
        "cli",
        "__init__ __main__",
    ),
    BENCH: (
        "problems table",
        "peers",
        "record",
        "kernels",
        "faults training",
        "report",
        "__init__ __main__",
    ),
}
"""Package -> its rooms in layers, the lowest first. A room imports from layers below its own: from
no other room of its layer, and so never in a circle. A name with a dot is a file of a room that
lies lower than the rest of it."""


class Import(NamedTuple):
    module: str  # dotted, as written
    line: int
    late: bool  # inside a function

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def imports(source: str) -> Iterator[Import]:
    """Every import but relative ones and those under ``if TYPE_CHECKING``."""
    tree = ast.parse(source)
    for_typing = set(_inside(tree, ast.If, lambda node: "TYPE_CHECKING" in ast.unparse(node.test)))
    late = set(_inside(tree, (ast.FunctionDef, ast.AsyncFunctionDef)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in for_typing:
            for alias in node.names:
                yield Import(alias.name, node.lineno, node in late)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node not in for_typing:
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, node in late)


def _inside(
    tree: ast.AST, kind: Any, condition: Callable[[Any], bool] = lambda node: True
) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, kind) and condition(node):
            yield from ast.walk(node)


def kernel_violations(name: str, source: str) -> list[str]:
    allowed = TORCH_ONLY | ({"triton"} if name.startswith("_triton/") else set())
    found = [f"{name} imports {i.module}" for i in imports(source) if i.package not in allowed]
    early = (i.module for i in imports(source) if not i.late)
    # A torch may be built without it, and one process needs none.
    distributed = (m for m in early if m.startswith("torch.distributed"))
    return found + [f"{name} imports {module} at once" for module in distributed]


def trainer_violations(name: str, source: str) -> list[str]:
    early = REQUIRED | BEHIND_EXTRAS.get(name, frozenset())
    behind_extras = tuple(f"sad.{module}" for module in BEHIND_EXTRAS)
    return [
        f"{name} line {i.line} imports {i.module} {'late' if i.late else 'at once'}"
        for i in imports(source)
        if i.package not in (early | OPTIONAL if i.late else early)
        or (i.module.startswith(behind_extras) and not i.late)
    ]


def room_of(root: Path, module: str) -> str:
    """``sad.config.schema`` is of the room ``config``, ``sad.distill`` of ``__init__``; a file that
    has a layer of its own, such as ``sad.distributed.world``, is a room by itself."""
    of_one_file = ".".join(module.split(".")[1:3])
    if any(of_one_file in layer.split() for layer in LAYERS[root]):
        return of_one_file
    name = module.split(".")[1] if "." in module else "__init__"
    return name if (root / name).is_dir() or (root / f"{name}.py").is_file() else "__init__"


def layer_violations(root: Path, room: str, source: str) -> list[str]:
    """Imports of a file in ``room`` that do not lead to a lower layer of the package."""
    depth = {name: i for i, layer in enumerate(LAYERS[root]) for name in layer.split()}
    package = root.name
    if room not in depth:
        return [f"{package}.{room} has no layer: give it one in LAYERS of {Path(__file__).name}"]
    return [
        f"{package}.{room} imports {i.module}, which is not in a layer below its own"
        for i in imports(source)
        if i.package == package
        and (target := room_of(root, i.module)) != room
        and depth.get(target, 0) >= depth[room]
    ]


@pytest.mark.parametrize("root", LAYERS, ids=lambda root: root.name)
def test_rooms_import_downwards_only(root: Path) -> None:
    files = sorted(root.rglob("*.py"))
    assert len(files) > 10
    modules = {f: ".".join((root.name, *f.relative_to(root).with_suffix("").parts)) for f in files}
    rooms = {f: room_of(root, module) for f, module in modules.items()}
    found = [v for f in files for v in layer_violations(root, rooms[f], f.read_text())]
    assert not found, "\n".join(dict.fromkeys(found))


HANDED_ON = {
    "sad.checkpoint": "Checkpoint latest_checkpoint load_checkpoint save_checkpoint",
    "sad.config": "ConfigError DataConfig DistillConfig ce_only config_hash config_to_dict "
    "config_to_yaml flatten trajectory_changes",
    "sad.data": "Batch LossCounts",
    "sad.models": "Backbone load_student load_teacher split_head with_valid_vocab",
    "sad.report": "format_results verdict write_report",
}
"""Names that a room hands on from its files, for users."""


@pytest.mark.parametrize("room", HANDED_ON)
def test_rooms_hand_on_what_users_import(room: str) -> None:
    module, names = import_module(room), HANDED_ON[room].split()
    assert sorted(module.__all__) == sorted(names)
    assert all(hasattr(module, name) for name in names)


@pytest.mark.parametrize("root", [KERNELS, SAD], ids=lambda root: root.name)
def test_imports_name_their_package(root: Path) -> None:
    """The checkers read absolute imports; relative ones would pass them unseen."""
    for path in root.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        relative = [n.lineno for n in nodes if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative, f"{path}, lines {relative}"


@pytest.mark.parametrize(
    ("root", "room", "source"),
    [
        (SAD, "models", "from sad.losses._rows import upcast"),
        (SAD, "teachers", "def f():\n    from sad.training.student import StudentWithLoss"),
        (SAD, "report", "from sad import teachers"),
        (SAD, "config", "import sad.models.load"),
        (SAD, "training", "from sad import distill"),
        (SAD, "a_new_room", "import torch"),
        (KERNELS, "_torch", "from sad_kernels._triton import rows"),
        (KERNELS, "_triton", "from sad_kernels._torch.gemm import times"),
        (KERNELS, "_triton", "from sad_kernels import kd"),
        (KERNELS, "objective", "from sad_kernels._rows import LossSpec"),
        (BENCH, "peers", "from bench.kernels.timing import timed"),
    ],
)
def test_a_planted_import_upwards_is_flagged(root: Path, room: str, source: str) -> None:
    assert layer_violations(root, room, source)


def test_imports_downwards_and_within_a_room_are_not_flagged() -> None:
    assert not layer_violations(SAD, "training", "from sad.losses.base import View\nimport torch")
    assert not layer_violations(SAD, "losses", "from sad.losses._rows import upcast")
    assert not layer_violations(SAD, "data", "from sad import errors")
    assert not layer_violations(KERNELS, "ce", "from sad_kernels import _check, _torch")
    for_typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sad.training.run"
    assert not layer_violations(SAD, "teachers", for_typing)


def test_sad_kernels_imports_torch_only() -> None:
    files = sorted(KERNELS.rglob("*.py"))
    assert len(files) > 5
    names = {f: f.relative_to(KERNELS).with_suffix("").as_posix() for f in files}
    found = [v for f in files for v in kernel_violations(names[f], f.read_text())]
    assert not found, "\n".join(found)


def test_sad_imports_downwards_and_extras_late() -> None:
    files = sorted(SAD.rglob("*.py"))
    assert len(files) > 10
    names = {f: ".".join(f.relative_to(SAD).with_suffix("").parts) for f in files}
    found = [v for f in files for v in trainer_violations(names[f], f.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import sad",
        "from sad.config import DistillConfig",
        "def f():\n    import transformers",
        "import numpy as np",
        "import triton",
        "import torch.distributed",
        "from torch import distributed as dist",
        "try:\n    from transformers import AutoModel\nexcept ImportError:\n    pass",
    ],
)
def test_a_planted_import_in_the_kernels_is_flagged(source: str) -> None:
    assert kernel_violations("ce", source)


@pytest.mark.parametrize(
    "source",
    ["import tests.tiny", "import bench", "import matplotlib", "def f():\n    import scipy"],
)
def test_a_planted_import_in_the_trainer_is_flagged(source: str) -> None:
    assert trainer_violations("training.run", source)


def test_what_is_allowed_is_not_flagged() -> None:
    assert not kernel_violations("_triton/rows", "import triton.language as tl")
    assert not kernel_violations("ce", "import math\nfrom . import _dispatch\nimport torch.nn")
    assert not trainer_violations("report.page", "def f():\n    from sad.report.plots import draw")
    assert not trainer_violations("data.documents", "def f():\n    import datasets")
    assert not trainer_violations("report.plots", "import matplotlib.pyplot as plt")
    assert not kernel_violations("vocab", "def f():\n    from torch import distributed")
    typing_only = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import datasets"
    assert not trainer_violations("data.documents", typing_only)


# What an import touches


UNTOUCHED = """
import sys
import torch

def touched(*args, **kwargs):
    raise AssertionError("CUDA was touched")

for name in ("_lazy_init", "is_available", "device_count", "current_device", "init",
             "get_device_properties", "get_device_capability", "get_device_name"):
    setattr(torch.cuda, name, touched)
"""

WITHOUT_TRITON = """
import sys
assert "triton" not in sys.modules
sys.modules["triton"] = None  # as if it were not installed
"""

ALL = "import sad_kernels\nfrom sad_kernels import *\n"
"""Every name, for a package that imports each on first use."""

LIGHT = """
heavy = {"sad", "transformers"} & set(sys.modules)
assert not heavy, f"imported {heavy}"
"""

TORCH_PATH_WORKS = """
import torch
logits = torch.zeros(2, 4, requires_grad=True)
labels = torch.tensor([1, -100])
loss = sad_kernels.cross_entropy(logits, labels, impl="torch")
loss.backward()
assert abs(float(loss) - 1.3862944) < 1e-6 and logits.grad[0, 1] < 0
sad_kernels.ema_update_([torch.zeros(3)], [torch.ones(3)], 0.5)
try:
    sad_kernels.cross_entropy(logits, labels, impl="triton")
except (NotImplementedError, RuntimeError, ImportError) as error:
    assert "triton" in str(error).lower() and ";" in str(error), error
else:
    raise AssertionError("an explicit request fell back")
"""


def run_python(script: str, *, cwd: Path = ROOT, path: Path | None = None) -> str:
    """Run a script without interpreter mode; return what it complained about ('' if nothing)."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    return "" if done.returncode == 0 else done.stderr or "failed"


def test_importing_the_kernels_is_light_and_leaves_cuda_alone() -> None:
    assert run_python(UNTOUCHED + ALL + LIGHT) == ""


def test_the_kernels_work_without_triton() -> None:
    script = WITHOUT_TRITON + ALL + TORCH_PATH_WORKS + LIGHT
    assert run_python(script) == ""


@pytest.mark.parametrize(
    "content, prelude, complaint",
    [
        ("import torch\ntorch.cuda.is_available()", UNTOUCHED, "CUDA was touched"),
        ("import sad", "import sys\n", "imported {'sad'}"),
        ("import triton", WITHOUT_TRITON, "import of triton halted"),
    ],
    ids=["cuda", "heavy", "triton"],
)
def test_a_planted_import_side_effect_is_seen(
    content: str, prelude: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "planted.py").write_text(content)
    assert complaint in run_python(prelude + "import planted\n" + LIGHT, path=tmp_path)


# The name trap


NAME_TRAP = """
import importlib.util, pathlib
spec = importlib.util.find_spec("kernels")
origin = spec.origin if spec else None  # None for a namespace, too
assert origin is None or "site-packages" in origin, f"kernels is {origin}"
from transformers import Qwen3ForCausalLM
"""
"""transformers probes for the ``kernels`` package of Hugging Face by name: a package of ours under
that name would be taken for it and break its model imports."""


def trap_files(root: Path) -> list[str]:
    return [name for name in ("kernels/__init__.py", "conftest.py") if (root / name).exists()]


@pytest.mark.slow
def test_our_kernels_folder_is_no_package() -> None:
    assert trap_files(ROOT) == []
    assert run_python(NAME_TRAP) == ""


def test_a_planted_kernels_package_is_seen(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    (tmp_path / "conftest.py").touch()
    assert trap_files(tmp_path) == ["kernels/__init__.py", "conftest.py"]
    assert "kernels is" in run_python(NAME_TRAP, cwd=tmp_path)
