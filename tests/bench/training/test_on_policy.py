"""The benchmark of text that the student writes: its ways load, its table is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.training import on_policy
from sad.config.load import load_config


@pytest.mark.parametrize("name", on_policy.WAYS)
def test_every_way_differs_from_the_others_in_its_own_keys_alone(name: str) -> None:
    plain = load_config("quickstart-instruct")
    config = load_config("quickstart-instruct", on_policy.WAYS[name])
    written = {"half on-policy": 0.5, "on-policy": 1.0}.get(name, 0.0)
    assert config.lmbda == written and config.on_policy_divergence == "reverse_kl"
    reverse = name == "off-policy, reverse KL"
    assert config.divergence == ("reverse_kl" if reverse else "forward_kl")
    assert config.max_steps == plain.max_steps and config.temperature == 1


def test_the_table_has_the_mean_and_every_seed() -> None:
    def row(name: str, low: float) -> dict[str, Any]:
        values = {"mean": low + 0.5, "seeds": [low, low + 1]}
        return {"name": name} | dict.fromkeys(on_policy.METRICS, values)

    table = [row("before", 2.0), row("on-policy", 1.0)]
    lines = on_policy.table({"steps": 7, "seeds": [0, 1], "table": table})
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| 7 steps more, mean (seeds 0, 1) |")
    assert lines[3].startswith("| on-policy | 1.500 (1.000, 2.000) | 1.500 (1.000, 2.000) |")


def test_each_seed_is_a_piece_that_is_kept(tmp_path: Path) -> None:
    def run(piece: on_policy.Piece) -> on_policy.Scores:
        return {"before": dict.fromkeys(on_policy.METRICS, float(piece.seed))}

    kept: list[dict[str, Any]] = []
    result = on_policy.measure(run, tmp_path, keep=kept.append)
    assert len(kept) == 3 and kept[-1] == result and result["seeds"] == [0, 1, 2]
    assert result["table"][0]["nll"] == {"mean": 1.0, "seeds": [0.0, 1.0, 2.0]}
    assert on_policy.measure(lambda _: pytest.fail("measured again"), tmp_path) == result
