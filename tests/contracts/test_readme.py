"""What the READMEs show is what the program takes: their code runs, their lists are complete."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import sad_kernels
import torch
import torch.nn.functional as F
from sad_kernels import Objective
from sad_kernels.objective import Divergence
from support.tiny import save_tiny, tiny_llama, tiny_tokenizer, write_texts
from torch import Tensor, nn
from torch.distributed import (
    HashStore,  # pyright: ignore[reportPrivateImportUsage]
    destroy_process_group,
    init_process_group,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sad import errors
from sad.config.load import load_config
from sad.config.schema import STRUCTURAL
from sad.ema import ModelEMA

ROOT = Path(__file__).parents[2]
README, KERNELS, TRAINER = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "kernels/README.md", "sad/README.md")
)
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCUMENTS = {"README": README, "kernels": KERNELS, "sad": TRAINER}
N, D_S, D_T, V = 12, 16, 24, 40


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


YAML = [block for text in DOCUMENTS.values() for block in blocks("yaml", text)]


@pytest.mark.parametrize("text", YAML, ids=lambda text: text.split(":")[0].strip("# \n"))
def test_configurations_load(text: str, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    models = "teacher: t\n" if "student_init: layers" in text else "student: s\nteacher: t\n"
    models = "" if "student:" in text else models
    path.write_text(models + text)
    config = load_config(path)
    if "layerwise" in text:
        assert set(config.structural_weights) == set(STRUCTURAL), "one of each is shown"


def test_there_are_some() -> None:
    assert len(YAML) == 6
    assert {name: len(blocks("python", text)) for name, text in DOCUMENTS.items()} == {
        "README": 3,
        "kernels": 4,
        "sad": 3,
    }


# --- Code -----------------------------------------------------------------------------------------


def names() -> dict[str, Any]:
    """What the code of the READMEs takes as given, small; each call gives the same values."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def linear(D: int) -> nn.Linear:
        layer = nn.Linear(D, V, bias=False)
        layer.weight.data.copy_(normal(V, D) * D**-0.5)
        return layer

    model, lm_head = linear(D_S), linear(D_S)
    return {
        "torch": torch,
        "F": F,
        "hidden": normal(N, D_S).requires_grad_(),
        "lm_head": lm_head,
        "weight": lm_head.weight,
        "teacher_hidden": normal(N, D_T),
        "teacher_head": linear(D_T).requires_grad_(False),
        "logits": normal(N, V).requires_grad_(),
        "teacher_logits": normal(N, V),
        "labels": torch.randint(V, (N,), generator=generator),
        "student_table": torch.arange(V).int() // 2,
        "teacher_table": torch.arange(V).int().flip(0) // 2,
        "count": -(-V // 2),
        "at_boundaries": torch.arange(N) % 2.0,
        "model": model,
        "shadows": [p.detach().clone() for p in model.parameters()],
        "student_model": tiny_llama(),
        "teacher_model": tiny_llama(seed=1, hidden_size=48),
        "input_ids": torch.randint(512, (2, 9), generator=generator),
    }


def run(code: str, given: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "README", "exec"), given)
    return given


@contextmanager
def split_heads(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The heads as DTensors, over the ranks of a group of this process alone."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    for name, head in (("split_weight", "lm_head"), ("split_teacher_weight", "teacher_head")):
        weight = distribute_tensor(given[head].weight.detach(), mesh, [Shard(0)])
        given[name] = nn.Parameter(weight, requires_grad=head == "lm_head")
    try:
        yield given
    finally:
        destroy_process_group()


@pytest.mark.parametrize("name", ["README", "kernels"])
def test_code_runs_from_top_to_bottom(name: str) -> None:
    with split_heads(names()) as given:
        for code in blocks("python", DOCUMENTS[name]):
            run(code, given)
    assert torch.isfinite(given["out"].loss)
    assert name != "kernels" or given["split_weight"].grad.to_local().any()


def test_six_lines_before_and_after_give_the_same() -> None:
    """Loss and gradients, where every row has a label; at most six lines each, imports apart."""
    before, after = (run(code, names()) for code in blocks("python", README)[:2])
    torch.testing.assert_close(after["out"].loss, before["loss"], rtol=1e-5, atol=0)
    for tensor in ("hidden", "weight"):
        torch.testing.assert_close(after[tensor].grad, before[tensor].grad, rtol=1e-4, atol=1e-7)
    for code in blocks("python", README)[:2]:
        lines = [line for line in code.splitlines() if line and not line.startswith("from")]
        assert len(lines) <= 6


def test_labels_are_not_shifted_and_all_but_the_loss_are_sums() -> None:
    given = run(blocks("python", README)[1], names())
    out, s = given["out"], given["hidden"] @ given["weight"].T
    summed = F.cross_entropy(s, given["labels"], label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(out.ce, summed.detach(), rtol=1e-5, atol=0)
    assert out.num_tokens == N
    mean = (0.3 * out.ce + 0.7 * out.kd) / N
    torch.testing.assert_close(out.loss.detach(), mean, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_the_trainer_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tiny(Path("path/of/the/student"), tiny_llama())
    save_tiny(Path("path/of/the/teacher"), tiny_llama(seed=1))
    write_texts(Path("my_texts"), count=40)
    code = blocks("python", TRAINER)[0]
    result = run(code, {})["result"]
    shown = re.findall(r"(?m)^  ([\w.]+/?)", TRAINER.partition("```\nruns/mine/")[2][:1200])
    assert {"best/", "final/", "status.json"} <= set(shown)
    left = {f"{path.name}{os.sep if path.is_dir() else ''}" for path in result.run_dir.iterdir()}
    assert set(shown) - {"baseline/"} <= left


@pytest.mark.skipif(not find_spec("trl"), reason="needs trl, which the extra integrations installs")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_code_for_other_trainers_runs(tmp_path: Path) -> None:
    import transformers
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from datasets import Dataset

    trl: Any = import_module("trl")
    student, objective = tiny_llama(), Objective(ce_weight=0.3, kd_weight=0.7)
    how = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "use_cpu": True}
    ids = torch.randint(512, (4, 8)).tolist()
    given = {
        "transformers": transformers,
        "trl": trl,
        "student": student,
        "teacher": tiny_llama(seed=1, hidden_size=48),
        "objective": objective,
        "arguments": transformers.TrainingArguments(**how),
        "sft_arguments": trl.SFTConfig(bf16=False, **how),
        "rows": Dataset.from_dict({"input_ids": ids, "labels": ids}),
        "tokenizer": tiny_tokenizer(),
    }
    before = student.lm_head.weight.detach().clone()
    run(blocks("python", TRAINER)[1], given)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    window = [{"input_ids": torch.tensor(ids[i : i + 2])} for i in (0, 2)]
    given |= {
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "average": ModelEMA(student),
        "window": [rows | {"labels": rows["input_ids"]} for rows in window],
        "model": given["DistillModel"](student, given["teacher"], objective),
        "targets": 28,
        "accelerator": accelerator,
    }
    run(blocks("python", TRAINER)[2], given)
    assert given["average"].num_updates == 2
    assert not torch.equal(student.lm_head.weight, before)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# --- Lists ----------------------------------------------------------------------------------------


def test_every_loss_and_divergence_is_described() -> None:
    functions = {n for n in sad_kernels.__all__ if n.islower() and n != "reference"}
    rows = set(re.findall(r"(?m)^\| `(\w+)`", KERNELS))
    assert functions <= rows
    assert set(get_args(Divergence)) <= rows


def test_every_exit_code_is_described() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    codes = {str(kind.exit_code) for kind in kinds if issubclass(kind, errors.SadError)}
    assert set(re.findall(r"(?m)^\| (\d+) \|", TRAINER)) == {"0"} | codes


def test_requirements_are_those_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = dict(re.findall(r"(?m)^\| (?:extra )?`(\w+)` \| (.*) \|$", README))
    named = {"torch", "triton"}
    for requirement in project["dependencies"]:
        package = re.split(r"[>=;]", requirement)[0]
        wanted = requirement.partition(";")[0] if package in named | {"transformers"} else package
        assert wanted in needs["sad_kernels" if package in named else "sad"]
    for extra in ("data", "report", "peft", "8bit", "quantized", "integrations"):
        for requirement in project["optional-dependencies"][extra]:
            assert re.split(r"[>=]", requirement)[0] in needs[extra]
    floor = project["requires-python"].removeprefix(">=")
    assert README.count(f"Python {floor} or newer") == 2


def anchors(text: str) -> set[str]:
    """The names under which GitHub links to headings."""
    found = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize(
    "name", ["README.md", "kernels/README.md", "sad/README.md", "bench/README.md",
             ".github/CONTRIBUTING.md"],
)  # fmt: skip
def test_links_and_pictures_lead_somewhere(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!http)[^)]+)\)", text)
    links += re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_files_that_are_named_exist() -> None:
    """Paths in code spans with a suffix or a trailing slash, in the guide for contributors."""
    found = re.findall(
        r"`((?:kernels|sad|tests|bench|scripts|\.ci|\.github)/[\w./*]+)`", CONTRIBUTING
    )
    assert len(found) > 20
    for path in found:
        assert list(ROOT.glob(path)), path
