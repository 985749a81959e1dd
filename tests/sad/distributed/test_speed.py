"""What train records of several ranks say of speed."""

from __future__ import annotations

from pathlib import Path

from support.rank_runs import Material
from support.ranks import run_ranks

from sad.config.schema import DistillConfig
from sad.models.flops import forward_flops, training_flops
from sad.models.load import load_student, load_teacher
from sad.report.log import read_log
from sad.training import speed
from sad.training.run import distill

PEAK = 1e9


def with_known_peak(config: DistillConfig) -> None:
    """A run on a device whose peak is ``PEAK``."""
    speed.peak_of = lambda device: PEAK
    distill(config)


def test_the_log_has_the_speed_of_each_rank(material: Material, tmp_path: Path) -> None:
    config = material.config("kd", tmp_path / "run", max_steps=2, max_eval_rows=2)
    run_ranks(2, with_known_peak, config)
    records = [record for record in read_log(config.output_dir) if record["kind"] == "train"]
    assert len(records) == 2
    flops = training_flops(load_student(config), 32) + forward_flops(load_teacher(config), 32)
    for record in records:
        rate = record["tokens_per_second"]
        assert record["tokens_per_second_per_rank"] == rate / 2
        # Positions are a few per cent more than targets.
        assert 1 <= record["mfu"] / (rate * flops / (2 * PEAK)) < 1.3


def test_one_process_on_a_cpu_has_neither(material: Material, tmp_path: Path) -> None:
    config = material.config("kd", tmp_path / "run", max_steps=1, max_eval_rows=2)
    distill(config)
    (record,) = [record for record in read_log(config.output_dir) if record["kind"] == "train"]
    assert not {"mfu", "tokens_per_second_per_rank"} & record.keys()
    assert record["tokens_per_second"] > 0
