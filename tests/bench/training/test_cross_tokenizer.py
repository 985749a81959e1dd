"""The comparison of losses between tokenizers: its students, its peers' losses, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.training import cross_tokenizer
from bench.training.cross_tokenizer import ARMS, CE, SEEDS, Piece, Sizes, Weights
from bench.training.cross_tokenizer_peers import difference_of_sorted
from bench.training.student_tokenizers import TOKENIZERS


def fake(piece: Piece, weights: Weights) -> dict[str, Any]:
    """Losses that do best at 0.7, ``prefix`` before all others."""
    students = [
        {
            "arm": arm,
            "weight": weight,
            "bits_per_byte": 3.0 - weight / 10 - (arm == "prefix") / 10 + piece.seed / 1000,
        }
        for arm, several in weights.items()
        for weight in several
    ]
    return {"notes": [], "students": students}


def test_the_weight_of_each_loss_is_chosen_by_a_seed_of_its_own(tmp_path: Path) -> None:
    asked: list[tuple[Piece, Weights]] = []

    def run(piece: Piece, weights: Weights) -> dict[str, Any]:
        asked.append((piece, weights))
        return fake(piece, weights)

    result = cross_tokenizer.measure(run, tmp_path / "pieces")
    assert [run["seed"] for run in result["runs"] if run["pair"] == "bpe"] == list(SEEDS)
    for piece, weights in asked:
        assert weights[CE] == [0.0]
        tuned = piece.seed == cross_tokenizer.TUNING_SEED
        assert weights["prefix"] == (cross_tokenizer.TRIED if tuned else [0.7])
        assert ("shared strings" in weights) == (piece.pair != "bytes")
    asked.clear()
    assert cross_tokenizer.measure(run, tmp_path / "pieces") == result and not asked


def test_the_table_has_a_line_per_loss_and_marks_the_best(tmp_path: Path) -> None:
    lines = cross_tokenizer.table(cross_tokenizer.measure(fake, tmp_path / "pieces"))
    heads = [f"{pair} (seeds 0, 1, 2)" for pair in sorted(TOKENIZERS)]
    assert lines[0] == f"| loss | {' | '.join(heads)} |"
    assert len(lines) == 2 + len(ARMS)
    [prefix] = [line for line in lines if line.startswith("| prefix |")]
    assert prefix.count("**2.831** (-0.170, -0.170, -0.170; weight 0.7)") == len(TOKENIZERS)
    [strings] = [line for line in lines if line.startswith("| shared strings |")]
    assert strings.split("|")[3].strip() == "-"  # undefined for bytes


def test_uld_is_blind_to_a_permutation() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1]])
    assert difference_of_sorted(p, p[:, [2, 0, 1]]).item() == 0
    assert difference_of_sorted(p, torch.tensor([[0.5, 0.5]])).item() == pytest.approx(0.6)


@pytest.mark.slow
@pytest.mark.parametrize("pair", TOKENIZERS)
def test_every_loss_trains_a_student(pair: str) -> None:
    weights = cross_tokenizer.tried(pair) | {"prefix": [0.0, 0.3]}
    little = Sizes(steps=2, documents=60, eval_rows=2, tokenizer_documents=10)
    found = cross_tokenizer.run_here(Piece(pair, 0), weights, little)["students"]
    scores = {(s["arm"], s["weight"]): s["bits_per_byte"] for s in found}
    assert all(0 < score < 20 for score in scores.values())
    assert scores["prefix", 0.0] == scores[CE, 0.0]  # the same batches and weights
    assert len(set(scores.values())) > len(ARMS) / 2
