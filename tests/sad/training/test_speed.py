"""What train records say of speed: per rank, and as a share of the device's peak."""

from __future__ import annotations

import pytest

from sad.training.speed import Speed

SPEED = Speed(ranks=4, positions_per_target=1.25, student_flops=600, teacher_flops=400, peak=1e6)


def test_utilisation_is_work_over_the_peak_of_all_ranks() -> None:
    found = SPEED.record(800.0, with_teacher=True)
    assert found == {
        "tokens_per_second_per_rank": 200.0,
        "mfu": pytest.approx(800 * 1.25 * 1000 / 4e6),
    }
    assert SPEED.record(800.0, with_teacher=False)["mfu"] == pytest.approx(0.15)
