"""AdamW's groups, the norm, and updates that are skipped to the last bit."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from sad.config.schema import DistillConfig
from sad.errors import UsageError
from sad.optim.optimizer import build_adamw, clip_gradients, guarded_step


def config(**keys) -> DistillConfig:
    return DistillConfig(student="s", teacher="t", **keys)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def snapshot(network: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Copies of the parameters and of everything the optimizer remembers."""
    tensors: list[Any] = list(network.parameters())
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return [t.detach().clone() for t in tensors]


def set_gradients(network: nn.Module, bad: float | None = None) -> None:
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    if bad is not None:
        last = list(network.parameters())[-1]
        assert last.grad is not None
        last.grad[0] = bad


def test_matrices_decay_and_vectors_do_not() -> None:
    network = model()
    optimizer = build_adamw(config(weight_decay=0.1), dict(network.named_parameters()))
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert {name: decays[id(p)] for name, p in network.named_parameters()} == {
        "0.weight": 0.1,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.1,
        "2.bias": 0.0,
    }


def test_settings_arrive() -> None:
    keys = {"learning_rate": 3e-4, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    optimizer = build_adamw(config(**keys), {"w": torch.zeros(2, 2, requires_grad=True)})
    [group] = optimizer.param_groups  # no empty group for vectors
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)
    assert group["fused"]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_both_kinds_follow_adamw(optim: Any) -> None:
    """In 8 bits to a few percent of the way, with a quarter of the bytes, skipping bad steps."""
    torch.manual_seed(0)
    ours, exact = nn.Linear(128, 64), nn.Linear(128, 64)
    exact.load_state_dict(ours.state_dict())
    keys = {"learning_rate": 1e-2, "weight_decay": 0.1, "optim": optim}
    optimizer = build_adamw(config(**keys), dict(ours.named_parameters()))
    judge = build_adamw(
        config(**keys | {"optim": "adamw_torch_fused"}), dict(exact.named_parameters())
    )
    start = exact.weight.detach().clone()
    for _ in range(10):
        set_gradients(ours)
        for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        guarded_step(optimizer, torch.tensor(True))
        judge.step()
    error = (ours.weight - exact.weight).norm() / (exact.weight - start).norm()
    assert error < (1e-6 if optim == "adamw_torch_fused" else 0.1)
    tensors = [t for t in optimizer.state[ours.weight].values() if isinstance(t, Tensor)]
    moments = sum(t.nbytes for t in tensors if t.numel() == 128 * 64)
    assert moments == 128 * 64 * (8 if optim == "adamw_torch_fused" else 2)
    before = snapshot(ours, optimizer)
    set_gradients(ours, bad=float("nan"))
    guarded_step(optimizer, torch.tensor(False))
    assert all(map(torch.equal, before, snapshot(ours, optimizer)))


def test_without_bitsandbytes_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"bitsandbytes must be installed .*distillation\[8bit\]"):
        build_adamw(config(optim="adamw_8bit"), dict(model().named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_norm_for_all_gradients(dtype: torch.dtype) -> None:
    """3, 4 and 12 make 13; with a little more, a norm in bf16 would still be 13."""
    parameters = [torch.zeros(2, requires_grad=True, dtype=dtype) for _ in range(4)]
    for p, value in zip(parameters, (3.0, 4.0, 12.0), strict=False):
        p.grad = torch.tensor([0.0, value], dtype=dtype)
    parameters[0].grad = torch.tensor([0.4375, 3.0], dtype=dtype)
    norm = clip_gradients(parameters, max_norm=0)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert norm.item() == pytest.approx((169 + 0.4375**2) ** 0.5, rel=1e-6)
    assert [p.grad.tolist()[1] for p in parameters[:3] if p.grad is not None] == [3, 4, 12]


def test_clipping_scales_all_gradients_alike() -> None:
    network = model()
    set_gradients(network)
    parameters = list(network.parameters())
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    norm = clip_gradients(parameters, max_norm=0.5)
    assert norm > 0.5
    clipped = clip_gradients(parameters, max_norm=0)
    assert clipped.item() == pytest.approx(0.5, rel=1e-5)
    for p, old in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.grad, old * (0.5 / norm))
    clip_gradients(parameters, max_norm=10.0)
    assert clip_gradients(parameters, max_norm=0) == clipped  # never scaled up


def test_without_gradients_the_norm_is_zero() -> None:
    assert clip_gradients([torch.zeros(2, requires_grad=True)], max_norm=1.0) == 0


BUILDERS = {
    "fused AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    "fused SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_skipped_update_changes_no_bit(name: str, bad: float) -> None:
    network = model()
    optimizer = BUILDERS[name](network.parameters())
    set_gradients(network)
    guarded_step(optimizer, torch.tensor(True))  # so that there are moments to spoil

    set_gradients(network, bad)
    before = snapshot(network, optimizer)
    norm = clip_gradients(network.parameters(), max_norm=1.0)
    guarded_step(optimizer, norm.isfinite())
    after = snapshot(network, optimizer)
    assert len(before) == len(after)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("name", BUILDERS)
def test_an_applied_update_is_that_of_a_plain_step(name: str) -> None:
    ours, plain = model(), model()
    plain.load_state_dict(ours.state_dict())
    guarded, bare = BUILDERS[name](ours.parameters()), BUILDERS[name](plain.parameters())
    for skip in (True, False, False):
        set_gradients(ours)
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        guarded_step(guarded, torch.tensor(not skip))
        if not skip:
            bare.step()
    for old, new in zip(snapshot(plain, bare), snapshot(ours, guarded), strict=True):
        assert torch.equal(old, new)


def test_the_verdict_does_not_outlive_its_step() -> None:
    """A stale ``found_inf`` would skip the next plain step as well."""
    network = model()
    optimizer = BUILDERS["fused AdamW"](network.parameters())
    set_gradients(network)
    guarded_step(optimizer, torch.tensor(False))
    before = snapshot(network, optimizer)
    optimizer.step()
    assert not torch.equal(before[0], snapshot(network, optimizer)[0])
