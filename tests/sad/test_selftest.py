"""``sad selftest`` passes on sound kernels and catches each kind of fault.

Elsewhere a fused loss was withdrawn after an incident: https://github.com/allenai/OLMo-core/pull/221
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sad_kernels
import torch
from torch import Tensor

from sad import selftest
from sad.cli import main
from sad.errors import UnfitError


def test_passes_and_says_what_it_checked(capsys: Any) -> None:
    assert selftest.run() == 0
    out = capsys.readouterr().out
    functions = [name for name in sad_kernels.__all__ if hasattr(sad_kernels.reference, name)]
    functions = [name for name in functions if name.islower()]
    assert len(functions) == 7
    for name in functions:
        assert f"ok   {name} " in out
    assert "checks passed on" in out


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0] * 1.001


def wrong_value(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **how: function(*args, **how) * 1.001


def wrong_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **how: _ScaledGradient.apply(function(*args, **how))


def wrong_count(function: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(*args: Any, **how: Any) -> Any:
        out = function(*args, **how)
        return out._replace(agree=out.agree + 1)

    return faulty


def nan_in_ignored_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(logits: Tensor, *args: Any, **how: Any) -> Any:
        return function(logits, *args, **how) + logits[1, 0] * 0

    return faulty


def no_update(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **how: None


FAULTS = [
    ("cross_entropy", wrong_value),
    ("cross_entropy", wrong_gradient),
    ("cross_entropy", nan_in_ignored_rows),
    ("linear_cross_entropy", wrong_gradient),
    ("kl_div", wrong_gradient),
    ("distill_loss", wrong_count),
    ("linear_distill_loss", wrong_count),
    ("ema_update_", no_update),
    ("ema_swap_", no_update),
]


@pytest.mark.parametrize("name, fault", FAULTS)
def test_a_planted_fault_is_caught(
    name: str, fault: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sad_kernels, name, fault(getattr(sad_kernels, name)))
    with pytest.raises(UnfitError, match=f"first {name} ") as caught:
        selftest.run()
    assert caught.value.exit_code == 65
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed and all(line.startswith(f"FAIL {name} ") for line in failed)


def test_the_command_ends_with_code_65(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sad_kernels, "kl_div", wrong_value(sad_kernels.kl_div))
    assert main(["selftest"]) == 65
    assert capsys.readouterr().err.startswith("sad: error: kernels must agree with their defin")
