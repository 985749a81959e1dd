"""What decorates a run fails no run: samples, report, trackers, the student's own settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import save_tiny, tiny_llama, tiny_tokenizer, write_texts
from support.tiny_moe import tiny_moe
from transformers import AutoModelForCausalLM, GenerationConfig

from sad.checkpoint.run_directory import RunDirectory
from sad.config.schema import DistillConfig
from sad.errors import SadError, UsageError
from sad.report.log import read_log
from sad.training import run
from sad.training.rescore import evaluate_run
from sad.training.run import RunResult, distill
from sad.training.samples import write_samples

Make = Callable[..., DistillConfig]


@pytest.fixture
def make_config(tmp_path: Path) -> Make:
    def make(**overrides: Any) -> DistillConfig:
        defaults: dict[str, Any] = {
            "data": {"train": write_texts(tmp_path / "texts", count=12), "eval_fraction": 0.3},
            "output_dir": str(tmp_path / "run"),
            "kd_weight": 0.0,
            "max_length": 32,
            "max_steps": 1,
            "max_eval_rows": 2,
            "per_device_train_batch_size": 2,
        }
        return DistillConfig(**(defaults | overrides))

    return make


def assert_finished(result: RunResult) -> None:
    assert RunDirectory(result.run_dir).read_status()["state"] == "finished"
    for folder in (result.best, result.final):
        assert (folder / "model.safetensors").is_file() and (folder / "sad.json").is_file()


def warnings_of(result: RunResult) -> list[str]:
    return [r["message"] for r in read_log(result.run_dir) if r["kind"] == "warning"]


OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "dictionaries": {"return_dict_in_generate": True, "output_scores": True},
    "several sequences": {"num_beams": 2, "num_return_sequences": 2},
    "stop strings": {"stop_strings": ["the"]},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
    "a temperature without sampling": {"do_sample": False, "temperature": 0.6},
    "a length below the prompt's": {"max_length": 4},
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_a_students_own_generation_settings_harm_no_run_and_survive_it(
    make_config: Make, tmp_path: Path, name: str
) -> None:
    folder = Path(save_tiny(tmp_path / "student", tiny_llama()))
    own = OWN_SETTINGS[name] | {"suppress_tokens": [7, 500], "eos_token_id": [0, 9]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    result = distill(make_config(student=str(folder)))
    assert_finished(result)
    assert warnings_of(result) == []
    samples = RunDirectory(result.run_dir).read_run()["samples"]
    assert len(samples) == 2 and all(s["prompt"] and s["text"] for s in samples)
    for exported in (result.best, result.final):
        saved = json.loads((exported / "generation_config.json").read_text())
        assert {key: saved[key] for key in own} == own


def test_untrained_ids_join_those_that_are_suppressed(make_config: Make, tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=520)  # the tokenizer has 512
    model.generation_config = GenerationConfig(suppress_tokens=[7, 515], eos_token_id=0)
    result = distill(make_config(student=save_tiny(tmp_path / "student", model)))
    settings = GenerationConfig.from_pretrained(str(result.final))
    assert settings.suppress_tokens == [7, *range(512, 520)]
    # The tiny texts of the report obey them as well.
    assert len(RunDirectory(result.run_dir).read_run()["samples"]) == 2


REMOTE_MODEL = """
from transformers import LlamaForCausalLM

from .configuration_ours import OurConfig


class OurModel(LlamaForCausalLM):
    config_class = OurConfig

    def generate(self, *args, **kwargs):
        if getattr(self.config, "broken", False):
            raise RuntimeError("our own loop is broken\\nbadly")
        return super().generate(*args, **kwargs)
"""
REMOTE_CONFIG = """
from transformers import LlamaConfig


class OurConfig(LlamaConfig):
    model_type = "ours"
"""


def save_remote(folder: Path, **changes: Any) -> str:
    """A student that comes with code of its own."""
    save_tiny(folder, tiny_llama())
    config = json.loads((folder / "config.json").read_text()) | changes
    config |= {"model_type": "ours", "architectures": ["OurModel"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_ours.OurConfig",
        "AutoModelForCausalLM": "modeling_ours.OurModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_ours.py").write_text(REMOTE_MODEL)
    (folder / "configuration_ours.py").write_text(REMOTE_CONFIG)
    return str(folder)


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of models is copied there before it is imported."""
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.few(1)
@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("broken", [False, True])
def test_students_with_code_of_their_own_finish(
    make_config: Make, tmp_path: Path, broken: bool
) -> None:
    student = save_remote(tmp_path / "student", broken=broken)
    result = distill(make_config(student=student, trust_remote_code_student=True))
    assert_finished(result)
    samples = RunDirectory(result.run_dir).read_run()["samples"]
    assert len(samples) == (0 if broken else 2)
    assert warnings_of(result) == (
        ["the report has no samples, generation got RuntimeError: our own loop is broken"]
        if broken
        else []
    )
    AutoModelForCausalLM.from_pretrained(result.final, trust_remote_code=True)


@pytest.mark.usefixtures("modules_cache")
def test_a_received_run_cannot_make_its_own_code_run(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``sad eval`` obeyed ``trust_remote_code_student`` of the run's own config.yaml."""
    student = save_remote(tmp_path / "student")
    result = distill(make_config(student=student, trust_remote_code_student=True))
    planted = tmp_path / "ran"
    code = result.best / "modeling_ours.py"
    facts = json.loads((result.best / "sad.json").read_text())
    (result.best / "sad.json").write_text(json.dumps(facts | {"files": {}}))
    code.write_text(f"open({str(planted)!r}, 'w').close()\n" + code.read_text())
    with pytest.raises(SadError) as refused:
        evaluate_run(result.run_dir)
    assert "\n" not in str(refused.value) and not planted.exists()

    def trusted(config: DistillConfig, say: Any) -> Any:
        assert config.trust_remote_code_student and not config.trust_remote_code_teacher
        raise UsageError("as told on the command line")

    monkeypatch.setattr("sad.training.rescore.load_inputs", trusted)
    with pytest.raises(UsageError, match="as told"):
        evaluate_run(result.run_dir, trust_remote_code_student=True)


def test_an_export_that_cannot_be_loaded_again_is_a_warning(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(student=save_tiny(tmp_path / "student", tiny_llama()))

    def damaged(exported: Path, *args: Any, **options: Any) -> Any:
        (exported / "config.json").write_text("{")
        return write_samples(exported, *args, **options)

    monkeypatch.setattr(run, "write_samples", damaged)
    result = distill(config)
    assert RunDirectory(result.run_dir).read_status()["state"] == "finished"
    (warning,) = warnings_of(result)
    assert f"{result.final} cannot be loaded again" in warning and "\n" not in warning


def test_a_report_that_cannot_be_drawn_is_a_warning(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(_: Path) -> Path:
        raise ValueError("a font is missing")

    monkeypatch.setattr(run, "write_report", broken)
    assert_finished(distill(make_config(student=save_tiny(tmp_path / "student", tiny_llama()))))
    out = capsys.readouterr().out
    assert "warning: the report could not be written, got ValueError: a font is missing" in out
    assert "perplexity" in out


# The dtype of what is exported


def exported_dtypes(folder: Path) -> tuple[str, set[torch.dtype]]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return config["dtype"], {p.dtype for p in model.parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_student_is_exported_in_the_dtype_in_which_it_came(
    make_config: Make, tmp_path: Path, tied: bool
) -> None:
    model: Any = tiny_llama(tie_word_embeddings=tied)
    source = Path(save_tiny(tmp_path / "student", model.to(torch.bfloat16)))
    result = distill(make_config(student=str(source)))
    for folder in (result.best, result.final):
        assert exported_dtypes(folder) == ("bfloat16", {torch.bfloat16})
        size = (folder / "model.safetensors").stat().st_size
        assert size == (source / "model.safetensors").stat().st_size
    assert_finished(result)


CASES = [
    ({"save_dtype": "float32"}, "bfloat16", torch.float32),
    ({"save_dtype": "bfloat16"}, "float32", torch.bfloat16),
    ({"param_dtype": "bfloat16"}, "float32", torch.bfloat16),  # there are no more bits to export
    ({"student_init": "random"}, "bfloat16", torch.float32),  # no weights came
    ({}, "float32", torch.float32),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("keys", "came", "expected"), CASES)
def test_save_dtype_wins_and_bits_that_are_not_there_are_not_written(
    make_config: Make, tmp_path: Path, keys: dict[str, Any], came: str, expected: torch.dtype
) -> None:
    model: Any = tiny_llama()
    model.to(getattr(torch, came))
    result = distill(make_config(student=save_tiny(tmp_path / "student", model), **keys))
    name = str(expected).removeprefix("torch.")
    assert exported_dtypes(result.final) == (name, {expected})


def test_rounding_for_the_export_leaves_training_alone(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = model.generation_config
    run_dir = RunDirectory(tmp_path)
    run_dir.export(run_dir.best, model, tiny_tokenizer(), 512, {}, torch.bfloat16)
    assert model.generation_config is own and model.dtype == torch.float32
    saved = AutoModelForCausalLM.from_pretrained(run_dir.best).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(saved[name], tensor.bfloat16())


def test_what_a_family_keeps_in_fp32_keeps_every_bit(tmp_path: Path) -> None:
    """Biases that choose experts: rounded, they would choose others."""
    model: Any = tiny_moe("deepseek_v3")
    run_dir = RunDirectory(tmp_path)
    run_dir.export(run_dir.best, model, tiny_tokenizer(), 512, {}, torch.bfloat16)
    saved = load_file(run_dir.best / "model.safetensors")
    (name,) = (name for name in saved if name.endswith("e_score_correction_bias"))
    assert saved[name].dtype == torch.float32
    assert torch.equal(saved[name], model.state_dict()[name])
    others = {tensor.dtype for key, tensor in saved.items() if key != name}
    assert others == {torch.bfloat16}
