"""Options of ``sad plan`` among the overrides of keys."""

from __future__ import annotations

import pytest

from sad.config.plan_options import PlanOptions, read_plan_options
from sad.errors import UsageError


def test_options_are_taken_out_wherever_they_stand() -> None:
    words = "--seed 1 --ranks 16 --data.train a b --bandwidth=450,50 --memory --debug".split()
    options, others = read_plan_options([*words, "--tflops", "400", "--ranks_per_node", "4"])
    assert others == "--seed 1 --data.train a b --debug".split()
    assert options == PlanOptions(16, 4, (450.0, 50.0), 400.0, asks_for_batch=True)
    assert options.flops_per_second == 4e14


def test_without_options_nothing_changes() -> None:
    words = ["--seed", "-1", "x", "--data.train=ranks"]
    assert read_plan_options(words) == (PlanOptions(), words)


def test_bandwidths_may_be_two_words() -> None:
    assert read_plan_options(["--bandwidth", "300", "40"])[0].bandwidth == (300.0, 40.0)
    assert read_plan_options(["--memory", "22.5"])[0].memory == 22.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "ranks must be a positive integer, got '0'"),
        (["--ranks"], "ranks must be a positive integer, got ''"),
        (["--ranks", "8", "9"], "ranks must be a positive integer, got '8,9'"),
        (["--ranks", "99999999"], "ranks must be a positive integer"),
        (["--ranks_per_node", "-8"], "ranks_per_node must be a positive integer"),
        (["--bandwidth", "300"], "bandwidth must be two numbers: inside a node, between nodes"),
        (["--bandwidth", "300,0"], "bandwidth must be a number above 0, got '0'"),
        (["--tflops", "nan"], "tflops must be a number above 0, got 'nan'"),
        (["--memory", "24GiB"], "memory must be a number above 0, got '24GiB'"),
    ],
)
def test_wrong_values_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_plan_options(words)
