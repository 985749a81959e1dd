"""The three phases of the curriculum."""

from __future__ import annotations

import json

import pytest

from sad.curriculum import RAMPS, Curriculum

FULL = {
    "kd": 0.7,
    "feature": 0.1,
    "attention": 0.1,
    "router": 0.02,
    "layerwise": 0.05,
    "contrastive": 0.05,
}
SECOND = ("feature", "attention", "router")
THIRD = ("layerwise", "contrastive")


@pytest.mark.parametrize(
    ("step", "second", "third"),
    [
        (0, 0.0, 0.0),
        (299, 0.0, 0.0),
        (300, 0.0, 0.0),
        (450, 0.5, 0.0),
        (600, 1.0, 0.0),
        (800, 1.0, 0.5),
        (1000, 1.0, 1.0),
        (5000, 1.0, 1.0),  # past the end, as after a change of the horizon
    ],
)
def test_phases(step: int, second: float, third: float) -> None:
    weights = Curriculum(FULL, 1000).weights(step)
    assert weights["kd"] == FULL["kd"]
    for share, names in ((second, SECOND), (third, THIRD)):
        for name in names:
            assert weights[name] == pytest.approx(share * FULL[name], rel=1e-12)


@pytest.mark.parametrize("total", [1, 7, 1000, 12_345])
def test_clamped_ramp_equals_the_branches_bit_for_bit(total: int) -> None:
    curriculum = Curriculum(FULL, total)
    for step in range(total + 1):
        x = min(1.0, step / total)
        second = 0.0 if x < 0.3 else (x - 0.3) / 0.3 if x < 0.6 else 1.0
        third = 0.0 if x < 0.6 else (x - 0.6) / 0.4
        weights = curriculum.weights(step)
        assert [weights[name] for name in SECOND] == [FULL[name] * second for name in SECOND]
        assert [weights[name] for name in THIRD] == [FULL[name] * third for name in THIRD]


def test_without_a_step_every_weight_is_full() -> None:
    curriculum = Curriculum(FULL, 1000)
    assert curriculum.weights(None) == FULL == curriculum.weights()


def test_only_the_losses_in_use_are_returned() -> None:
    assert Curriculum({"kd": 0.7}, 10).weights(0) == {"kd": 0.7}
    assert Curriculum({}, 10).weights(5) == {}


def test_returned_weights_are_the_callers_own() -> None:
    curriculum = Curriculum(FULL, 10)
    curriculum.weights(None)["kd"] = 0.0
    assert curriculum.weights(None)["kd"] == 0.7


def test_state_goes_through_json() -> None:
    state = json.loads(json.dumps(Curriculum(FULL, 1000).state_dict()))
    resumed = Curriculum({"kd": 1.0}, 3)
    resumed.load_state_dict(state)
    assert resumed.weights(450) == Curriculum(FULL, 1000).weights(450)


@pytest.mark.parametrize("name", ["ce", "features", ""])
def test_unknown_losses_are_refused_naming_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"must be of {', '.join(RAMPS)}, got"):
        Curriculum({"kd": 0.7, name: 0.1}, 10)


def test_a_loss_is_a_row_of_the_ramps(monkeypatch: pytest.MonkeyPatch) -> None:
    for losses in ({"toy": 0.1}, {"kd": 0.7, "toy": 0.1}):
        with pytest.raises(ValueError, match=r"weights must be of kd, .*, got 'toy'.*RAMPS"):
            Curriculum(losses, 10)
        with pytest.raises(ValueError, match=r"schedules must be of kd, .*, got 'toy'.*RAMPS"):
            Curriculum({"kd": 0.7}, 10, {name: [[0, 1]] for name in losses})
    monkeypatch.setitem(RAMPS, "toy", (0.5, 1.0))
    curriculum = Curriculum({"kd": 0.7, "toy": 0.2}, 100)
    assert [curriculum.weights(step)["toy"] for step in (0, 50, 75, 100)] == [0, 0, 0.1, 0.2]
    assert Curriculum({"toy": 0.2}, 100, {"toy": [[0, 1]]}).weights(0) == {"toy": 0.2}


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_bad_weights_are_refused(weight) -> None:
    with pytest.raises((ValueError, TypeError), match="the weight of kd must"):
        Curriculum({"kd": weight}, 10)


@pytest.mark.parametrize("total", [0, -1, 10.0, None])
def test_bad_lengths_are_refused(total) -> None:
    with pytest.raises((ValueError, TypeError), match="total_steps must"):
        Curriculum({"kd": 1.0}, total)


def test_negative_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        Curriculum({"kd": 1.0}, 10).weights(-1)


def test_schedules_of_ones_own() -> None:
    schedules = {"kd": [[0, 1], [0.5, 0.2]], "layerwise": [[0.25, 0], [0.25, 1], [1, 0]]}
    curriculum = Curriculum(FULL, 100, schedules)
    kd = [curriculum.weights(step)["kd"] / FULL["kd"] for step in (0, 25, 50, 80, 100)]
    assert kd == pytest.approx([1, 0.6, 0.2, 0.2, 0.2])
    layerwise = [
        curriculum.weights(step)["layerwise"] / FULL["layerwise"] for step in (0, 24, 25, 70, 100)
    ]
    assert layerwise == pytest.approx([0, 0, 1, 0.4, 0]), "a jump holds from its point on"
    assert curriculum.weights(50)["feature"] == pytest.approx(FULL["feature"] * 2 / 3)
    assert curriculum.weights() == FULL
    again = Curriculum(FULL, 7)
    again.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    assert [again.weights(s) for s in range(101)] == [curriculum.weights(s) for s in range(101)]


def test_a_ramp_as_points_is_the_same_to_the_bit() -> None:
    points = {"feature": [[0.3, 0], [0.6, 1]]}
    ramp, drawn = Curriculum(FULL, 12_345), Curriculum(FULL, 12_345, points)
    for step in range(0, 12_346, 5):
        assert ramp.weights(step)["feature"] == drawn.weights(step)["feature"]


@pytest.mark.parametrize("points", [[], [[0.5, 1], [0.4, 1]], [[0, -1]], [[2, 1]], [[0, 1, 2]]])
def test_schedules_that_are_none(points: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="the schedule of kd must be points"):
        Curriculum(FULL, 10, {"kd": points})
    with pytest.raises(ValueError, match="curriculum schedules must be of"):
        Curriculum(FULL, 10, {"ce": [[0, 1]]})
