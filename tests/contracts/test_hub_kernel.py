"""``scripts/hub_kernel.py``: ``sad_kernels`` as a kernel of the Hub, beside the installed one."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sad_kernels
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
N, V, D = 6, 40, 16

HAS_KERNELS = find_spec("kernels._rust") is not None
"""Whether Hugging Face's package is here: our folder of that name has no such module."""


def load(name: str, path: Path) -> ModuleType:
    """The module or package at ``path``, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


hub_kernel: Any = load("hub_kernel", ROOT / "scripts" / "hub_kernel.py")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "project"
    assert hub_kernel.main([str(out), "--repo_id", "someone/sad-kernels"]) == 0
    return out


def metadata(project: Path, backend: str) -> dict[str, Any]:
    return json.loads((project / "build" / f"torch-{backend}" / "metadata.json").read_text())


@pytest.fixture(scope="module")
def kernel(project: Path) -> ModuleType:
    """The CPU's build as ``kernels`` loads it: under its identifier, by that package if it is
    here. Its operators stay registered, so one test process loads it once."""
    if HAS_KERNELS:
        kernels: Any = import_module("kernels")
        return kernels.get_local_kernel(project, backend="cpu")
    return load(metadata(project, "cpu")["id"], project / "build" / "torch-cpu" / "__init__.py")


# --- The loaded package ---------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def losses(package: Any) -> list[Tensor]:
    """Losses and gradients of calls that reach each family of operators, and an average."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    hidden, weight = normal(N, D).requires_grad_(), normal(V, D).requires_grad_()
    logits, labels = normal(N, V).requires_grad_(), torch.arange(N)
    objective = package.Objective(ce_weight=0.3, kd_weight=0.7, temperature=2.0)
    teacher = package.TeacherHidden(normal(N, D), package.Head(normal(V, D)))
    out = package.linear_distill_loss(hidden, package.Head(weight), labels, teacher, objective)
    of_logits = package.cross_entropy(logits, labels)
    (out.loss + of_logits).backward()
    shadow = [normal(3)]
    package.ema_update_(shadow, [normal(3)], 0.9)
    found = [out.loss, out.kd, of_logits, hidden.grad, weight.grad, logits.grad, *shadow]
    return [x.detach() for x in found if x is not None]


def test_the_loaded_code_ran_and_gives_the_same_bits(kernel: ModuleType, project: Path) -> None:
    folder = project / "build" / "torch-cpu"
    assert kernel.cross_entropy is not sad_kernels.cross_entropy
    with Operators() as operators:
        found = losses(kernel)
    expected = losses(sad_kernels)
    assert len(found) == 7
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    identifier = metadata(project, "cpu")["id"]
    ours = {name for name in operators.names if "sad_kernels" in name}
    assert any("ema_update" in name for name in ours) and len(ours) >= 3
    assert all(name.startswith(f"{identifier}.") for name in ours), ours
    for name in ("ce", "_operator", "_torch.statistics"):
        module = import_module(f"{kernel.__name__}.{name}")
        assert Path(str(module.__file__)).is_relative_to(folder)


def test_no_loaded_module_reaches_the_installed_package(kernel: ModuleType) -> None:
    losses(kernel)
    modules = {n: m for n, m in sys.modules.items() if n.startswith(kernel.__name__)}
    assert len(modules) > 15
    for name, module in modules.items():
        for key, value in vars(module).items():
            home = value.__name__ if isinstance(value, ModuleType) else _home(value)
            assert home.partition(".")[0] != "sad_kernels", f"{name}.{key} is of {home}"


def _home(value: object) -> str:
    home = getattr(value, "__module__", None)
    return home if isinstance(home, str) else ""


def test_the_loaded_losses_compile_into_one_graph(kernel: ModuleType) -> None:
    hidden, weight = torch.randn(N, D), torch.randn(V, D)

    def loss(hidden: Tensor, package: Any) -> Tensor:
        teacher = package.TeacherHidden(hidden + 1, package.Head(weight))
        objective = package.Objective(ce_weight=0.3, kd_weight=0.7)
        labels = torch.arange(N)
        head = package.Head(weight)
        return package.linear_distill_loss(hidden, head, labels, teacher, objective).loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(hidden, kernel), loss(hidden, sad_kernels))


@pytest.mark.skipif(not find_spec("triton"), reason="needs triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_the_loaded_triton_kernels_give_the_same_bits(kernel: ModuleType) -> None:
    assert torch.equal(by_triton(kernel), by_triton(sad_kernels))


def by_triton(package: Any) -> Tensor:
    """The gradient of a cross-entropy from the package's Triton kernels, with small tiles."""
    sizes: Any = import_module(f"{package.__name__}._triton.tile_sizes")
    x = torch.linspace(-3, 3, 2 * V).reshape(2, V).requires_grad_()
    with sizes.tile_rule(lambda *_: sizes.Tile(32, 64, 1, threads_per_warp=2)):
        package.cross_entropy(x, torch.tensor([1, 30]), impl="triton").backward()
    assert x.grad is not None
    return x.grad


def test_two_builds_and_the_old_place_live_in_one_process(
    kernel: ModuleType, project: Path
) -> None:
    """Releases of ``kernels`` before 0.11 look into a folder with the package's name."""
    old = load("an_old_place", project / "build" / "torch-cuda" / "sad_kernels" / "__init__.py")
    x, y = torch.randn(N, V), torch.arange(N)
    assert torch.equal(old.cross_entropy(x, y), kernel.cross_entropy(x, y))
    assert Path(old.cross_entropy.__code__.co_filename).parent.name == "torch-cuda"


# --- The project ----------------------------------------------------------------------------------


def test_the_project_is_what_kernel_builder_reads(project: Path) -> None:
    general = tomllib.loads((project / "build.toml").read_text())["general"]
    assert general["name"].replace("-", "_") == "sad_kernels"
    assert general["hub"]["repo-id"] == "someone/sad-kernels"
    sources = {p.relative_to(hub_kernel.SOURCE) for p in hub_kernel.SOURCE.rglob("*.py")}
    package = project / "torch-ext" / "sad_kernels"
    assert {p.relative_to(package) for p in package.rglob("*.py")} == sources
    for backend in general["backends"]:
        folder, said = project / "build" / f"torch-{backend}", metadata(project, backend)
        assert said["backend"]["type"] == backend and said["name"] == general["name"]
        assert said["id"].isidentifier() and said["id"].startswith("_sad_kernels_")
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix == ".py"}
        assert set(said["digest"]["files"]) == files


@pytest.mark.skipif(not HAS_KERNELS, reason="needs kernels, which no extra installs")
def test_the_package_kernels_reads_it(project: Path) -> None:
    rust: Any = import_module("kernels._rust")
    assert len(rust.Build.open(project).general.backends) == len(hub_kernel.BACKENDS)
    folder = project / "build" / "torch-cpu"
    digest = rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, folder)
    rust.Metadata.read_from_file(folder / "metadata.json").digest.validate(digest)


def test_only_what_names_the_package_is_rewritten(project: Path) -> None:
    """Line by line: imports, operators, and the public names' homes; two lines come in addition."""
    for path in sorted(hub_kernel.SOURCE.rglob("*.py")):
        name = path.relative_to(hub_kernel.SOURCE)
        before = path.read_text().splitlines()
        after = (project / "torch-ext" / "sad_kernels" / name).read_text().splitlines()
        if any("add_op_namespace_prefix" in line for line in after):
            place = next(i for i, line in enumerate(after) if "import add_op_namespace" in line)
            del after[place - 1 : place + 1]
        assert len(before) == len(after), name
        changed = [b for b, a in zip(before, after, strict=True) if a != b]
        assert all("sad_kernels" in line for line in changed), name


def test_another_version_has_other_operators() -> None:
    files = {"__init__.py": "x = 1\n"}
    ids = [
        json.loads(hub_kernel.built(f, "cpu")["metadata.json"])["id"]
        for f in (files, files | {"__init__.py": "x = 2\n"}, files)
    ]
    assert ids[0] != ids[1] and ids[0] == ids[2]


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match=r"OUTDIR must be empty, got .*; name a new"):
        hub_kernel.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# --- One file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("ce.py", "from sad_kernels import _check", "from . import _check"),
        ("ce.py", "from sad_kernels._torch.ema import x", "from ._torch.ema import x"),
        ("_torch/ema.py", "from sad_kernels import _check", "from .. import _check"),
        ("_torch/ema.py", "from sad_kernels.ce import x as y", "from ..ce import x as y"),
        ("ce.py", "from torch import sad_kernels", "from torch import sad_kernels"),
        ("__init__.py", 'A = {"a": "sad_kernels.ce"}', 'A = {"a": f"{__name__}.ce"}'),
        ("ce.py", 'A = "see sad_kernels.ce"', 'A = "see sad_kernels.ce"'),
        ("ce.py", '"""Of sad_kernels::x."""', '"""Of sad_kernels::x."""'),
    ],
)  # fmt: skip
def test_what_is_rewritten(file: str, line: str, expected: str) -> None:
    assert hub_kernel.rewritten(f'e = "\u00e9"; {line}\n', file) == f'e = "\u00e9"; {expected}\n'


@pytest.mark.parametrize("f", ["", "f"])
def test_operators_move_to_another_namespace(f: str) -> None:
    source = f'from __future__ import annotations\n\nop({f}"sad_kernels::x")\n'
    lines = hub_kernel.rewritten(source, "_torch/a.py").splitlines()
    assert lines[2] == "from .._ops import add_op_namespace_prefix"
    assert lines[-1] == f'op(add_op_namespace_prefix({f}"x"))'


@pytest.mark.parametrize(
    "line",
    [
        "import sad_kernels",
        "import sad_kernels.ce as ce",
        "from  sad_kernels import ce",
        "from . import ce",
        "torch.ops.sad_kernels.ema_update(x)",
        "getattr(torch.ops, 'sad_kernels')",
        "import_module('sad_kernels.ce')",
        "op('sad_kernels::x')",
        'op("sad_kernels" "::x")',
        'op("a" "sad_kernels::x")',
        'op("sad_kernels::x")',  # nothing to put the import behind
    ],
)
def test_a_form_that_is_not_known_is_an_error(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "sad_kernels"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "1.2"\n')
    (package / "ce.py").write_text(f"x = 1\n{line}\n")
    monkeypatch.setattr(hub_kernel, "SOURCE", package)
    assert hub_kernel.main([str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ce.py, line ") and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
