"""Loading: the model that was asked for, in the form that was asked for, or one clear line."""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import tiny_family
from support.tiny import save_tiny, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2VLConfig,
    SiglipVisionConfig,
    T5Config,
    ViTConfig,
)
from transformers.utils import logging as hf_logging

from sad.config.schema import DistillConfig
from sad.environment import resolve_device
from sad.errors import SadError, UnfitError, UsageError
from sad.models.heads import split_head
from sad.models.load import (
    compute_dtype,
    load_student,
    load_teacher,
    read_model_config,
    teacher_dtype,
)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    return save_tiny(tmp_path / "model", tiny_llama())


def config_for(model: str, **keys: Any) -> DistillConfig:
    return DistillConfig(student=model, teacher=model, device="cpu", **keys)


def equal_weights(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_the_student_is_ready_to_train(saved: str) -> None:
    student = load_student(config_for(saved))
    assert equal_weights(student, tiny_llama())
    assert student.dtype == torch.float32
    assert student.training and not student.config.use_cache
    assert all(p.requires_grad for p in student.parameters())


def test_the_teacher_is_frozen(saved: str) -> None:
    teacher = load_teacher(config_for(saved))
    assert equal_weights(teacher, tiny_llama())
    assert not teacher.training and not teacher.config.use_cache
    assert not any(p.requires_grad for p in teacher.parameters())


def test_parameters_have_the_dtypes_of_the_configuration(saved: str) -> None:
    config = config_for(saved, param_dtype="bfloat16", teacher_dtype="float16")
    assert load_student(config).dtype == torch.bfloat16
    assert load_teacher(config).dtype == torch.float16


@pytest.mark.parametrize(
    ("keys", "compute", "teacher"),
    [
        ({}, torch.float32, torch.float32),
        ({"bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"fp16": True}, torch.float16, torch.float16),
        ({"param_dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ({"bf16": True, "teacher_dtype": "float32"}, torch.bfloat16, torch.float32),
    ],
)
def test_dtypes_follow_the_precision(
    keys: dict[str, Any], compute: torch.dtype, teacher: torch.dtype
) -> None:
    config = config_for("-", **keys)
    assert (compute_dtype(config), teacher_dtype(config)) == (compute, teacher)


def test_checkpointing_keeps_fewer_activations_for_the_same_gradient(saved: str) -> None:
    def gradients_and_kept(student: PreTrainedModel) -> tuple[list[torch.Tensor], int]:
        kept = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        ids = torch.arange(40)[None]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = student(input_ids=ids).logits
        logits.square().mean().backward()
        return [p.grad for p in student.parameters() if p.grad is not None], len(kept)

    plain, kept = gradients_and_kept(load_student(config_for(saved)))
    recomputed, fewer = gradients_and_kept(
        load_student(config_for(saved, gradient_checkpointing=True))
    )
    assert fewer < kept / 2
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_the_attention_asked_for_is_used(saved: str) -> None:
    student = load_student(config_for(saved, attn_implementation="eager"))
    assert student.config._attn_implementation == "eager"


# Random students


def test_a_random_student_depends_on_the_seed_alone(saved: str) -> None:
    def drawn(seed: int, **keys: Any) -> PreTrainedModel:
        torch.rand(5)
        return load_student(config_for(saved, student_init="random", seed=seed, **keys))

    assert equal_weights(drawn(1), drawn(1))
    assert not equal_weights(drawn(1), drawn(2))
    assert not equal_weights(drawn(1), tiny_llama())
    assert equal_weights(drawn(1, param_dtype="bfloat16"), drawn(1).to(torch.bfloat16))  # pyright: ignore


def test_models_are_made_one_at_a_time(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers sets ``PreTrainedModel.tie_weights`` aside meanwhile: of two threads that
    overlap, the last to end would put back the empty function that it had found."""
    inside, most = 0, 0
    load = AutoModelForCausalLM.from_pretrained

    def slow(*args: Any, **keys: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        try:
            return load(*args, **keys)
        finally:
            inside -= 1

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slow)
    config = config_for(saved)
    with ThreadPoolExecutor(2) as threads:
        models = [threads.submit(load_student, config) for _ in range(2)]
        assert all(equal_weights(models[0].result(), model.result()) for model in models)
    assert most == 1


def test_a_random_student_needs_a_configuration_only(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    assert load_student(config_for(str(tmp_path), student_init="random")).training


@pytest.mark.parametrize("student_init", ["random", "pretrained"])
def test_loading_leaves_the_random_state_alone(saved: str, student_init: Any) -> None:
    before = torch.get_rng_state()
    load_student(config_for(saved, student_init=student_init))
    load_teacher(config_for(saved))
    assert torch.equal(torch.get_rng_state(), before)


# What cannot be loaded


def refused(error: type[SadError], model: object, match: str, **keys: Any) -> str:
    config = config_for(str(model), **keys)
    for load in (load_student, load_teacher):
        with pytest.raises(error, match=match) as caught:
            load(config)
        line = str(caught.value)
        assert "\n" not in line and " must " in line and "; " in line
        assert line.startswith("student" if load is load_student else "teacher")
    return line


def test_a_path_that_does_not_exist() -> None:
    refused(UsageError, "./no/such/folder", "got ./no/such/folder; check the path")


def test_a_hub_id_that_cannot_be_fetched() -> None:
    refused(UsageError, "nobody/nothing-of-that-name", "check the name and the network")


def test_an_id_that_cannot_exist() -> None:
    refused(UsageError, "what is this", "got what is this")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    refused(UsageError, tmp_path, "must be a folder with a saved model")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    refused(UsageError, tmp_path, "must be a folder with a saved model")


def test_a_configuration_that_is_no_json(saved: str) -> None:
    (Path(saved) / "config.json").write_text("{")
    refused(UsageError, saved, "must be a folder with a saved model")


def test_a_family_that_transformers_does_not_know(saved: str) -> None:
    path = Path(saved) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "of_tomorrow"}))
    refused(UnfitError, saved, "of_tomorrow")


@pytest.mark.parametrize("config_class", [T5Config, ViTConfig])
def test_a_model_that_is_not_causal(config_class: Any, tmp_path: Path) -> None:
    config_class().save_pretrained(tmp_path)
    refused(UnfitError, tmp_path, f"must be a causal language model.*'{config_class.model_type}'")


@pytest.mark.parametrize(
    ("config_class", "says"),
    [
        (SiglipVisionConfig, "'siglip_vision_model', images and no text"),
        (ViTConfig, "'vit', images and no text"),
        (Qwen2VLConfig, "'qwen2_vl', text and vision: save its language model by itself"),
        (T5Config, r"'t5'\); choose a decoder-only model"),
    ],
)
def test_a_model_of_images_is_told_what_it_is(config_class: Any, says: str, tmp_path: Path) -> None:
    config_class().save_pretrained(tmp_path)
    refused(UnfitError, tmp_path, f"must be a causal language model.*{says}")


def test_an_encoder_with_a_language_model_head(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnfitError, match="must be causal"):
        split_head(load_student(config_for(str(tmp_path))))


def test_weights_that_were_cut_short(saved: str) -> None:
    path = Path(saved) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    refused(UnfitError, saved, "that transformers can build")


def test_weights_of_another_shape(saved: str) -> None:
    path = Path(saved) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 48}))
    refused(UnfitError, saved, "that transformers can build")


def test_a_model_saved_without_its_head_is_not_given_a_random_one(tmp_path: Path) -> None:
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(tmp_path)
    refused(UnfitError, tmp_path, r"without 1 of them \(first 'lm_head.weight'\)")


def test_an_attention_that_does_not_exist(saved: str) -> None:
    with pytest.raises(UsageError, match=r"must be one that the student .*, got guessing"):
        load_student(config_for(saved, attn_implementation="guessing"))


@pytest.mark.parametrize(
    ("family", "chosen"),
    [("gemma2", "eager"), ("vaultgemma", "eager"), ("bloom", "eager"), ("llama", "sdpa")],
)
def test_by_default_each_family_has_the_attention_that_suits_it(
    family: str, chosen: str, tmp_path: Path
) -> None:
    """Gemma 2 caps its attention's scores, which the sdpa of torch cannot."""
    tiny_family(family).save_pretrained(tmp_path)
    config = config_for(str(tmp_path))
    random = config_for(str(tmp_path), student_init="random")
    for model in (load_teacher(config), load_student(config), load_student(random)):
        assert model.config._attn_implementation == chosen


@pytest.mark.parametrize("family", ["gemma2", "vaultgemma"])
def test_an_attention_that_the_family_does_not_have(family: str, tmp_path: Path) -> None:
    tiny_family(family).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="got sdpa; leave the key out") as caught:
        load_teacher(config_for(str(tmp_path), attn_implementation="sdpa"))
    assert "\n" not in str(caught.value)


def test_an_attention_that_is_not_installed(saved: str) -> None:
    refused(SadError, saved, "attn_implementation", attn_implementation="flash_attention_2")


def test_code_of_its_own_needs_trust(saved: str) -> None:
    path = Path(saved) / "config.json"
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    fields = json.loads(path.read_text()) | {"model_type": "own", "auto_map": own}
    path.write_text(json.dumps(fields))
    (Path(saved) / "own.py").write_text("raise SystemExit('ran foreign code')\n")
    line = refused(UsageError, saved, "comes with code of its own; read that code")
    assert line.endswith("then set trust_remote_code_teacher: true")


def test_no_teacher_was_named() -> None:
    config = DistillConfig(student="-", kd_weight=0, device="cpu")
    with pytest.raises(UsageError, match="teacher must be a folder or a Hugging Face id, got none"):
        load_teacher(config)


def test_checkpointing_that_the_model_cannot_do(
    saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(UsageError, match="gradient_checkpointing must be false for LlamaForCausal"):
        load_student(config_for(saved, gradient_checkpointing=True))


def test_a_device_that_is_not_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="device must be one that this machine has, got cuda:7"):
        resolve_device("cuda:7")
    with pytest.raises(UsageError, match="got abacus"):
        resolve_device("abacus")


# Paths and noise


def test_a_path_may_start_at_home(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(saved).parent))
    assert read_model_config(config_for("~/model"), "student").model_type == "llama"


def test_loading_is_silent_and_leaves_verbosity_as_it_was(
    saved: str, capfd: pytest.CaptureFixture[str]
) -> None:
    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    records: list[logging.LogRecord] = []
    handler = Recorder()
    hf_logging.set_verbosity(logging.INFO)
    hf_logging.enable_progress_bar()
    hf_logging.add_handler(handler)
    try:
        capfd.readouterr()
        load_student(config_for(saved))
        load_student(config_for(saved, student_init="random"))
        load_teacher(config_for(saved))
        assert capfd.readouterr() == ("", "")
        assert not records
        assert hf_logging.get_verbosity() == logging.INFO
        assert hf_logging.is_progress_bar_enabled()
    finally:
        hf_logging.remove_handler(handler)
        hf_logging.set_verbosity_warning()
