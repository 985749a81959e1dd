"""The ablation: which runs are compared with which, and what the table says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import ablation
from bench.ablation import Arm
from sad.config import DistillConfig
from sad.configfile import load_config

WORSE = {"+ feature": 3.0, "+ router": -2.0}


def fake(arm: Arm, seed: int, folder: Path) -> ablation.Json:
    """Scores that scatter by seed, of runs that differ by what ``WORSE`` says."""
    perplexity = 100.0 + 10 * seed + WORSE.get(arm.name, 0.0) + (seed if "all" in arm.name else 0)
    student = {"perplexity": perplexity, "kl": perplexity / 100, "agreement": 0.5}
    return {"student": student, "teacher": {"perplexity": 50.0}}


def measured() -> ablation.Json:
    return ablation.measure(run=fake, teach=lambda folder: ("moe-teacher", "moe-student"))


def test_changes_are_taken_within_a_seed_and_a_group() -> None:
    rows = {(row["group"], row["arm"]): row for row in measured()["rows"]}
    assert rows["dense teacher", "KD alone"]["perplexity"]["seeds"] == [100, 110, 120]
    assert rows["dense teacher", "+ feature"]["perplexity"]["change"] == [3, 3, 3]
    assert rows["dense teacher", "+ feature"]["perplexity"]["mean"] == 113
    assert rows["dense teacher", "+ all five"]["perplexity"]["change"] == [0, 1, 2]
    assert rows["MoE teacher, MoE student", "+ router"]["kl"]["change"] == pytest.approx(
        [-0.02] * 3
    )


def test_the_table_shows_every_seed_and_what_agrees_in_sign() -> None:
    lines = ablation.table(measured())
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
