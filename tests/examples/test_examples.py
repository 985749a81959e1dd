"""The scripts of ``scripts/examples``: they run, stay short, and use public names only."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "scripts" / "examples").glob("*.py"))}
PUBLIC = ROOT / "tests" / "contracts" / "public.txt"
MAX_LINES = 40

NEEDS = {
    "with_accelerate": "accelerate",
    "with_peft": "peft",
    "with_trainer": "accelerate",
    "with_trl": "trl",
}
"""The package beyond the dependencies of ``sad`` that an example is about, or its trainer needs."""

TRACED = ("fullgraph=True", 'fullgraph=True, backend="eager"')
"""``torch.compile`` without the minute that code generation takes: the graph runs as traced."""

pytestmark = [
    # torch, of every Trainer on a machine without a GPU
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # torch's own compiler, when it is imported
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # peft 0.21 reads a property that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # trl 1.16 sets what transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def no_state_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder; afterwards forget what the compiler and accelerate keep."""
    monkeypatch.chdir(tmp_path)
    device = torch.get_default_device()
    yield
    torch.set_default_device(device)
    torch.compiler.reset()
    forget_accelerator()


def forget_accelerator() -> None:
    """Let the next ``Accelerator`` choose its precision: a process remembers the first choice."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


class Example:
    """Runs an example as a script, after replacements in its text, with command-line options."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def run(self, name: str, *edits: tuple[str, str], options: str = "") -> dict[str, Any]:
        """Return the script's globals."""
        need = NEEDS.get(name)
        if need and not find_spec(need):
            pytest.skip(f"{name}.py needs {need}, which the extra dev installs")
        text = EXAMPLES[name].read_text()
        for old, new in edits:
            assert text.count(old) == 1, f"{name}.py must say {old!r} once; adapt this test"
            text = text.replace(old, new)
        script = self.folder / f"{name}_as_run.py"
        script.write_text(text)
        self.monkeypatch.setattr(sys, "argv", [script.name, *options.split()])
        forget_accelerator()
        torch.manual_seed(0)
        return runpy.run_path(str(script), run_name="__main__")

    def first_gradient(self, name: str, *edits: tuple[str, str], options: str = "") -> Tensor:
        """The gradient with which the optimizer takes its first step, all parameters in a row."""
        found: list[Tensor] = []

        def stop(optimizer: torch.optim.Optimizer, *_: object) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            found.extend(p.grad.flatten() for p in parameters if p.grad is not None)
            raise FirstStep

        handle = register_optimizer_step_pre_hook(stop)
        try:
            with pytest.raises(FirstStep):
                self.run(name, *edits, options=options)
        finally:
            handle.remove()
        return torch.cat(found)


class FirstStep(Exception):
    """The optimizer was about to take its first step."""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Example:
    return Example(tmp_path, monkeypatch)


def printed_losses(output: str) -> list[float]:
    """The numbers behind the word ``loss``, in the order in which they were printed."""
    return [float(number) for number in re.findall(r"\bloss'?:? '?(\d+\.\d+)", output)]


def distance(x: Tensor, y: Tensor) -> float:
    """``|x - y| / |y|``."""
    return float((x - y).norm() / y.norm())


@pytest.mark.few(1)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_loss_falls(name: str, example: Example, capfd: pytest.CaptureFixture[str]) -> None:
    example.run(name, *([TRACED] if name == "with_compile" else []))
    losses = printed_losses(capfd.readouterr().out)
    assert len(losses) >= 20, losses
    assert losses[-1] < 0.95 * losses[0], losses


@pytest.mark.slow
def test_the_compiled_loss_falls(example: Example, capfd: pytest.CaptureFixture[str]) -> None:
    example.run("with_compile")
    losses = printed_losses(capfd.readouterr().out)
    assert len(losses) == 20 and losses[-1] < 0.95 * losses[0], losses


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("triton"), reason="needs triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_models_and_the_triton_loss_are_one_graph(example: Example) -> None:
    """As on a GPU: ``fullgraph=True`` raises at the first break."""
    found = example.run(
        "with_compile",
        ("fullgraph=True", 'fullgraph=True, backend="eager"'),
        ("target, OBJECTIVE)", 'target, OBJECTIVE, impl="triton")'),
        ("(4, 64)", "(1, 8)"),
        ("range(20)", "range(1)"),
    )
    assert found["out"].loss.isfinite()


# Gradient accumulation: a window of micro-batches has the gradient of one large batch


def test_trainer_accumulates_the_gradient_of_one_batch(example: Example) -> None:
    one, four = (
        f"--per_device_train_batch_size {16 // steps} --gradient_accumulation_steps {steps}"
        for steps in (1, 4)
    )
    whole = example.first_gradient("with_trainer", options=one)
    assert distance(example.first_gradient("with_trainer", options=four), whole) < 1e-5


@pytest.mark.slow
def test_trl_accumulates_the_gradient_of_one_batch(example: Example) -> None:
    one, four = (
        f"--per_device_train_batch_size {16 // steps} --gradient_accumulation_steps {steps}"
        for steps in (1, 4)
    )
    whole = example.first_gradient("with_trl", options=one)
    assert distance(example.first_gradient("with_trl", options=four), whole) < 1e-5


def test_accelerate_accumulates_the_gradient_of_one_batch(example: Example) -> None:
    exact = ('mixed_precision="bf16"', 'mixed_precision="no"')
    one = [("ids.split(3)", "[ids]"), ("accumulation_steps=3", "accumulation_steps=1")]
    whole = example.first_gradient("with_accelerate", exact, *one)
    assert distance(example.first_gradient("with_accelerate", exact), whole) < 1e-5
    rounded = example.first_gradient("with_accelerate")
    assert 1e-5 < distance(rounded, whole) < 3e-2  # of bf16, whose epsilon is 8e-3
    without_factor = example.first_gradient("with_accelerate", exact, ("loss * factor", "loss"))
    assert distance(3 * without_factor, whole) < 1e-5  # a third, which is why it is there


# PEFT: what is trained


def test_only_adapters_are_trained(example: Example) -> None:
    found = example.run("with_peft")
    student, head = found["student"], found["head"]
    assert not head.weight.requires_grad and head.weight.grad is None
    assert head.weight is student.get_output_embeddings().weight
    second = {name: p for name, p in student.named_parameters() if "lora_B" in name}
    assert len(second) == 14  # seven projections in each of two layers; all begin as zeros
    assert all(bool(p.any()) for p in second.values())
    trained = student.unload().state_dict()
    torch.manual_seed(0)
    found["tiny"](128)  # the teacher is drawn first
    untouched = found["tiny"](64).state_dict()
    assert trained.keys() == untouched.keys()
    assert all(torch.equal(trained[name], untouched[name]) for name in untouched)


# Form


def public_names() -> set[str]:
    return {re.split(r"[( ]", line, maxsplit=1)[0] for line in PUBLIC.read_text().splitlines()}


def private_uses(source: str) -> list[str]:
    """Imports from our packages of what is not public, and attributes with an underscore."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr):
            found.append(f".{node.attr}")
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        ours = [name for name in names if name.split(".")[0] in ("sad", "sad_kernels")]
        found += [name for name in ours if name not in public_names()]
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_short_and_public(name: str) -> None:
    source = EXAMPLES[name].read_text()
    assert len(source.splitlines()) <= MAX_LINES
    assert not private_uses(source)
    assert ast.get_docstring(ast.parse(source))


def test_there_is_one_for_each_way_of_training() -> None:
    ways = "plain_loop with_accelerate with_compile with_peft with_trainer with_trl".split()
    assert set(ways) <= set(EXAMPLES)


@pytest.mark.parametrize(
    "source",
    [
        "from sad.models.heads import split_head",
        "from sad_kernels import _check",
        "import sad_kernels.linear",
        "average._shadows",
    ],
)
def test_a_planted_private_name_is_flagged(source: str) -> None:
    assert private_uses(source)
