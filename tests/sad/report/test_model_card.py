"""The card of an exported student says what it is and nothing of this machine; uploads may fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, ModelCard
from support.tiny import save_tiny, tiny_llama, write_texts

from sad.config.schema import DistillConfig
from sad.report.model_card import model_card, push_to_hub
from sad.training.run import distill

METRICS = {"eval/nll": 9.0, "eval_ema/nll": 2.0, "eval_ema/perplexity": 7.389, "eval_ema/kl": 0.25}
FACTS = {
    "metric": "eval_ema/nll",
    "value": 2.0,
    "weights": "ema",
    "micro_step": 1200,
    "micro_batch_rows": 8,
}


def config_for(**keys: Any) -> DistillConfig:
    settings: dict[str, Any] = {
        "student": "owner/small",
        "teacher": "owner/large",
        "data": {"train": ["owner/texts", "/home/someone/private/notes.jsonl"]},
        "output_dir": "runs/mine",
        "temperature": 1.5,
    }
    return DistillConfig(**(settings | keys))


def test_it_names_teacher_data_and_score() -> None:
    card = ModelCard(model_card(config_for(), METRICS, FACTS))
    data = card.data.to_dict()
    assert data["base_model"] == "owner/small" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["owner/texts"] and data["library_name"] == "transformers"
    (model,) = data["model-index"]
    scores = {m["type"]: m["value"] for r in model["results"] for m in r["metrics"]}
    assert model["name"] == "mine" and scores == {"nll": 2.0, "perplexity": 7.389, "kl": 0.25}
    for line in (
        "| Teacher | owner/large |",
        "| Student | owner/small |",
        "| Data | owner/texts, notes.jsonl |",
        "| Objective | 0.3 cross-entropy + 0.7 forward_kl at temperature 1.5 |",
        "| Weights | averaged (EMA), after 1,200 micro-batches of 8 rows |",
    ):
        assert line in card.text, line


def test_it_says_nothing_of_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "teacher"
    folder.mkdir(parents=True)
    keys: dict[str, Any] = {"teacher": str(folder), "student": str(folder)}
    text = model_card(config_for(**keys), METRICS, FACTS)
    assert "| Teacher | teacher |" in text and "base_model:" not in text
    assert "secret" not in text and "someone" not in text and "private" not in text


@pytest.mark.parametrize(
    ("keys", "student", "library"),
    [
        ({"peft": {"r": 4}}, "owner/small, through LoRA adapters", "peft"),
        ({"peft": {"r": 4}, "merge_adapters": True}, "owner/small, through LoRA", "transformers"),
        ({"student_init": "random"}, "the configuration of owner/small, with", "transformers"),
        (
            {"student_init": "layers", "student_layers": [0, 3], "student": "owner/large"},
            "layers 0, 3 of owner/large",
            "transformers",
        ),
    ],
)
def test_it_says_which_student(keys: dict[str, Any], student: str, library: str) -> None:
    text = model_card(config_for(**keys), METRICS, FACTS)
    assert f"| Student | {student}" in text and f"library_name: {library}" in text


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been sent."""
    sent: list[Any] = []

    def create_repo(_: Any, repo_id: str, **options: Any) -> Any:
        sent.append((repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(_: Any, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        sent.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return sent


@pytest.fixture
def run(tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        teacher=save_tiny(tmp_path / "teacher", tiny_llama(seed=1)),
        student=save_tiny(tmp_path / "student", tiny_llama(seed=2)),
        data={"train": write_texts(tmp_path / "texts"), "eval_fraction": 0.3},  # pyright: ignore
        output_dir=str(tmp_path / "mine"),
        max_length=32,
        max_steps=1,
        per_device_train_batch_size=2,
        push_to_hub=True,
        hub_private_repo=True,
    )


def test_what_scored_best_is_uploaded_after_the_run(run: DistillConfig, hub: list[Any]) -> None:
    result = distill(run)
    (repo, options), (target, names) = hub
    assert repo == "mine" and options == {"private": True, "exist_ok": True}
    assert target == "me/mine" and {"README.md", "model.safetensors", "tokenizer.json"} < {*names}
    card = ModelCard.load(result.best / "README.md")
    assert "| Teacher | teacher |" in card.text
    assert (result.final / "README.md").exists()


def test_a_failure_is_a_warning(
    run: DistillConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.OfflineModeIsEnabled("no\nnetwork")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    result = distill(run)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: the student is not on the Hub, got OfflineModeIsEnabled: no")
    assert str(result.best) in last and '"finished"' in (result.run_dir / "status.json").read_text()


def test_a_name_of_ones_own(hub: list[Any], tmp_path: Path) -> None:
    assert push_to_hub(config_for(hub_model_id="owner/name"), tmp_path).startswith("hub ")
    assert hub[0][0] == "owner/name"
