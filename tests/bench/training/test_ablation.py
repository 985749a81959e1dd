"""The ablation: which runs are compared with which, and the table of the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.training import ablation
from bench.training.ablation import Arm, Piece
from sad.config.load import load_config
from sad.config.schema import DistillConfig

WORSE = {"+ feature": 3.0, "+ router": -2.0}


def fake(arm: Arm, piece: Piece, folder: Path) -> ablation.Json:
    """Fake scores that depend on the seed, plus the arm's entry in ``WORSE``."""
    seed = 0 if piece.seed == "rehearsal" else piece.seed
    perplexity = 100.0 + 10 * seed + WORSE.get(arm.name, 0.0) + (seed if "all" in arm.name else 0)
    student = {"perplexity": perplexity, "kl": perplexity / 100, "agreement": 0.5}
    return {"student": student, "teacher": {"perplexity": 50.0}}


def measured(folder: Path) -> ablation.Json:
    def teach(_: Path) -> tuple[str, str]:
        return "moe-teacher", "moe-student"

    return ablation.measure(run=fake, teach=teach, folder=folder / "runs")


def test_changes_are_taken_within_a_seed_and_a_group(tmp_path: Path) -> None:
    rows = {(row["group"], row["arm"]): row for row in measured(tmp_path)["rows"]}
    assert rows["dense teacher", "KD alone"]["perplexity"]["seeds"] == [100, 110, 120]
    assert rows["dense teacher", "+ feature"]["perplexity"]["change"] == [3, 3, 3]
    assert rows["dense teacher", "+ feature"]["perplexity"]["mean"] == 113
    assert rows["dense teacher", "+ all five"]["perplexity"]["change"] == [0, 1, 2]
    assert rows["MoE teacher, MoE student", "+ router"]["kl"]["change"] == pytest.approx(
        [-0.02] * 3
    )


def test_the_table_shows_every_seed_and_what_agrees_in_sign(tmp_path: Path) -> None:
    lines = ablation.table(measured(tmp_path))
    feature = next(line for line in lines if line.startswith("| + feature |"))
    assert feature.startswith("| + feature | 113.0 | **+3.0, +3.0, +3.0** | 1.130 |")
    every = next(line for line in lines if line.startswith("| + all five |"))
    assert "| +0.0, +1.0, +2.0 |" in every, "0 is neither better nor worse"
    assert sum("(perplexity 50.0)" in line for line in lines) == 3


@pytest.mark.parametrize("arm", ablation.arms("t", "s"), ids=lambda arm: f"{arm.group}: {arm.name}")
def test_every_arm_is_a_configuration(arm: Arm) -> None:
    """Same student, data and steps within a group; one thing changes."""
    config = load_config("ablation", arm.words)
    assert not config.use_curriculum and config.max_steps == 150
    base = next(other for other in ablation.arms("t", "s") if other.group == arm.group)
    assert changed(load_config("ablation", base.words), config) == (
        arm is not base and arm.name != base.name
    )


def changed(base: DistillConfig, other: DistillConfig) -> bool:
    assert (base.student, base.seed, base.data) == (other.student, other.seed, other.data)
    return base != other


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished runs are kept; a rehearsal is not a run, and an interrupted run starts anew."""
    outputs: list[str] = []
    left = tmp_path / "dense-teacher-KD-alone-1"
    left.mkdir()

    def start(_: str, words: list[str]) -> ablation.Json:
        outputs.append(words[words.index("--output_dir") + 1])
        if outputs[-1] == str(left) and outputs.count(str(left)) == 1:
            raise RuntimeError("interrupted")
        return fake(Arm("", "", ()), Piece("", "", 0), tmp_path)

    monkeypatch.setattr(ablation, "in_subprocess", start)

    def measure() -> ablation.Json:
        return ablation.measure((0, 1), teach=lambda _: ("t", "s"), folder=tmp_path)

    arms = len(ablation.arms("t", "s"))
    with pytest.raises(RuntimeError, match="interrupted"):
        measure()
    assert len(outputs) == 3 * arms, "the others went on"
    measure()
    assert len(outputs) == 3 * arms + 1
    assert len(set(outputs)) == 3 * arms
    assert outputs[-1] == str(left) and not left.exists()
