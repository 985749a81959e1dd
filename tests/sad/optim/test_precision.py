"""Number formats: what computes in which dtype, and steps that are skipped in each of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sad.config.schema import DistillConfig
from sad.errors import UsageError
from sad.optim.precision import Precision

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "masters": {"param_dtype": "bfloat16"},
    "pure bf16": {"param_dtype": "bfloat16", "master_weights": False},
}
DTYPES = {  # of parameters, of matrix products, of accumulated gradients
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.float32, torch.bfloat16, torch.float32),
    "fp16": (torch.float32, torch.float16, torch.float32),
    "masters": (torch.bfloat16, torch.bfloat16, torch.float32),
    "pure bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
}


def precision(name: str, **keys: Any) -> Precision:
    keys = {"learning_rate": 1e-2, "weight_decay": 0.1} | FORMATS[name] | keys
    return Precision(DistillConfig(student="s", teacher="t", **keys))


def network(name: str) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    return layers.to(DTYPES[name][0])


def loss_of(model: nn.Module, used: Precision, factor: float = 1.0) -> Tensor:
    x = torch.randn(4, 6).to(used.param_dtype)
    with used.autocast():
        y = model(x)
    return (y.float() * factor).square().mean()


def everything(model: nn.Module, used: Precision, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [*model.parameters(), *used.optimizer_parameters.values()]
    for state in optimizer.state.values():
        tensors += list(state.values())
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize("name", FORMATS)
def test_dtypes_are_those_of_the_table(name: str) -> None:
    parameter, compute, gradient = DTYPES[name]
    used, model = precision(name), network(name)
    assert (used.param_dtype, used.compute_dtype) == (parameter, compute)
    used.build_optimizer(model)
    with used.autocast():
        assert model[0](torch.randn(2, 6).to(parameter)).dtype == compute
    used.backward(loss_of(model, used))
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {gradient}
    assert used.scaler.is_enabled() == (name == "fp16")
    assert (used.masters is not None) == (name == "masters")


@pytest.mark.parametrize("name", FORMATS)
def test_training_moves_every_parameter(name: str) -> None:
    used, model = precision(name), network(name)
    if name == "fp16":
        used.load_state_dict(used.state_dict() | {"scale": 1024.0})  # torch starts at 65536
    optimizer = used.build_optimizer(model)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        used.backward(loss_of(model, used))
        used.backward(loss_of(model, used))
        update = used.step(optimizer, max_grad_norm=1.0)
        used.zero_grad(optimizer)
        assert update.ok and not update.skipped and update.norm.isfinite()
        assert all(p.grad is None for p in model.parameters())
        assert all(p.grad is None for p in used.optimizer_parameters.values())
    for old, p in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, p)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_a_step_with_a_bad_gradient_leaves_every_bit(name: str, fused: bool, bad: float) -> None:
    """https://github.com/NVIDIA/Megatron-LM/issues/6018: a finite loss, a gradient that is not."""
    used, model = precision(name), network(name)
    optimizer: torch.optim.Optimizer = used.build_optimizer(model)
    if not fused:
        optimizer = torch.optim.AdamW(used.optimizer_parameters.values(), lr=1e-2)
    average = used.build_ema(model)
    used.backward(loss_of(model, used))
    average.update(used.step(optimizer, max_grad_norm=1.0).ok)
    used.zero_grad(optimizer)

    next(model.parameters()).register_hook(lambda grad: torch.full_like(grad, bad))
    loss = loss_of(model, used)
    assert loss.isfinite()
    used.backward(loss)
    before = everything(model, used, optimizer)
    shadows = [shadow.clone() for shadow in average.tensors().values()]
    update = used.step(optimizer, max_grad_norm=1.0)
    average.update(update.ok)

    assert not update.ok and not update.norm.isfinite()
    after = everything(model, used, optimizer)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for old, shadow in zip(shadows, average.tensors().values(), strict=True):
        assert torch.equal(old, shadow)
    assert average.num_updates == 1


@pytest.mark.parametrize("lr", [1e38, 1e300, torch.nan])
@pytest.mark.parametrize("name", FORMATS)
def test_a_step_that_would_overflow_leaves_every_bit(name: str, lr: float) -> None:
    """A finite gradient, and a learning rate, of a scheduler say, that makes weights infinite."""
    used, model = precision(name), network(name)
    used.load_state_dict(used.state_dict() | {"scale": 1024.0} if name == "fp16" else {})
    optimizer = used.build_optimizer(model)
    average = used.build_ema(model)
    used.backward(loss_of(model, used))
    average.update(used.step(optimizer, max_grad_norm=1.0).ok)
    used.zero_grad(optimizer)

    optimizer.param_groups[0]["lr"] = lr
    used.backward(loss_of(model, used))
    before = everything(model, used, optimizer)
    shadows = [shadow.clone() for shadow in average.tensors().values()]
    update = used.step(optimizer, max_grad_norm=1.0)
    average.update(update.ok)

    assert not update.ok and update.norm.isfinite() and update.skipped
    after = everything(model, used, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for old, shadow in zip(shadows, average.tensors().values(), strict=True):
        assert torch.equal(old, shadow)


def test_a_norm_that_overflows_skips_even_if_the_gradient_is_finite() -> None:
    """GradScaler sees finite gradients; clipped by an infinite norm they would all be zero."""
    used, model = precision("fp16"), network("fp16")
    optimizer = used.build_optimizer(model)
    used.backward(loss_of(model, used))
    for p in model.parameters():
        assert p.grad is not None
        p.grad.fill_(1e30)
    before = [p.detach().clone() for p in model.parameters()]
    update = used.step(optimizer, max_grad_norm=1.0)
    assert not update.ok
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_fp16_overflow_lowers_the_scale_and_is_no_skip_until_it_is_below_1() -> None:
    used, model = precision("fp16"), network("fp16")
    optimizer = used.build_optimizer(model)
    used.load_state_dict(used.state_dict() | {"scale": 4.0})
    seen = []
    for _ in range(4):
        used.backward(loss_of(model, used, factor=1e30))  # infinite at any scale
        update = used.step(optimizer, max_grad_norm=1.0)
        used.zero_grad(optimizer)
        assert not update.ok
        seen.append((used.loss_scale, bool(update.skipped)))
    assert seen == [(2.0, False), (1.0, False), (0.5, True), (0.25, True)]


def test_fp16_gradients_are_unscaled_before_norm_and_update() -> None:
    """Scales are powers of two, which cancel exactly while nothing over- or underflows."""
    results = []
    for scale in (64.0, 1024.0):
        torch.manual_seed(5)
        used, model = precision("fp16"), network("fp16")
        optimizer = used.build_optimizer(model)
        used.load_state_dict(used.state_dict() | {"scale": scale})
        used.backward(loss_of(model, used))
        update = used.step(optimizer, max_grad_norm=0.01)
        results.append([update.norm, *(p.detach() for p in model.parameters())])
    assert results[0][0] > 0.01
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_scaler_state_goes_through_json() -> None:
    used = precision("fp16")
    model = network("fp16")
    optimizer = used.build_optimizer(model)
    used.backward(loss_of(model, used, factor=1e30))
    used.step(optimizer, max_grad_norm=1.0)
    resumed = precision("fp16")
    resumed.load_state_dict(json.loads(json.dumps(used.state_dict())))
    assert resumed.loss_scale == used.loss_scale == 2.0**15
    assert precision("fp32").state_dict() == {} and precision("fp32").loss_scale == 1.0
    precision("fp32").load_state_dict({})


# --- Master weights -----------------------------------------------------------------------------


def test_master_gradients_add_up_in_fp32() -> None:
    """256 + 1 + 1 + ... stays 256 in bf16: its neighbour is 258."""
    used = precision("masters")
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = used.build_optimizer(model)
    for gradient in (256.0, *[1.0] * 64):
        used.backward((model.weight * gradient).sum())
    assert used.step(optimizer, max_grad_norm=0).norm == 320.0


def test_model_is_always_the_rounded_masters() -> None:
    used, model = precision("masters"), network("masters")
    optimizer = used.build_optimizer(model)
    assert used.masters is not None
    for _ in range(3):
        used.backward(loss_of(model, used))
        used.step(optimizer, max_grad_norm=1.0)
        used.zero_grad(optimizer)
        for name, p in model.named_parameters():
            master = used.masters.separate[name]
            assert master.dtype == torch.float32
            assert torch.equal(p, master.bfloat16())
            assert not torch.equal(p.float(), master)


def test_masters_keep_the_small_updates_that_bf16_loses() -> None:
    """Adam-sized steps of 1e-6 on weights around 1, where bf16 resolves 1/128."""
    moved = {}
    for name in ("masters", "pure bf16"):
        used = precision(name, learning_rate=1e-6, weight_decay=0.0)
        model = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            model.weight.fill_(1.0)
        optimizer = used.build_optimizer(model)
        for _ in range(50):
            used.backward(model.weight.float().sum())
            used.step(optimizer, max_grad_norm=0)
            used.zero_grad(optimizer)
        [weight] = used.optimizer_parameters.values()
        moved[name] = float((1.0 - weight.detach().double()).mean())
    assert moved["masters"] > 45e-6
    assert moved["pure bf16"] == 0.0


def test_the_average_of_a_model_with_masters_follows_the_masters() -> None:
    """One step is too small for bf16 weights, not for their masters."""
    used, model = precision("masters", learning_rate=1e-6), network("masters")
    optimizer, average = used.build_optimizer(model), used.build_ema(model)
    before = {name: shadow.clone() for name, shadow in average.tensors().items()}
    used.backward(loss_of(model, used))
    average.update(used.step(optimizer, max_grad_norm=1.0).ok)
    assert used.masters is not None
    name = "1.weight"  # ones, which a step of 1e-6 leaves as they are in bf16
    assert torch.equal(model.get_parameter(name), torch.ones(8, dtype=torch.bfloat16))
    assert not torch.equal(used.masters.separate[name], before[name])
    assert not torch.equal(average.tensors()[name], before[name])


def test_a_parameter_of_another_dtype_is_its_own_master() -> None:
    used, model = precision("masters"), network("masters")
    norm = model.get_submodule("1").float()
    optimizer = used.build_optimizer(model)
    assert used.masters is not None
    assert set(used.masters.separate) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert used.optimizer_parameters["1.weight"] is norm.weight
    before = norm.get_parameter("bias").detach().clone()
    used.backward(sum((p.float().sum() for p in model.parameters()), torch.zeros(())))
    used.step(optimizer, max_grad_norm=0)
    used.zero_grad(optimizer)
    bias = norm.get_parameter("bias")
    assert not torch.equal(bias, before) and bias.grad is None


def test_a_window_without_update_drops_its_gradients() -> None:
    used, model = precision("masters"), network("masters")
    optimizer = used.build_optimizer(model)
    used.backward(loss_of(model, used))
    used.zero_grad(optimizer)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_an_unfinished_window_can_be_put_back() -> None:
    """A checkpoint inside a window holds fp32 gradients of bf16 parameters."""
    whole, used, model = precision("masters"), precision("masters"), network("masters")
    twin = network("masters")
    twin.load_state_dict(model.state_dict())
    optimizers = whole.build_optimizer(model), used.build_optimizer(twin)
    loss_seeds = (1, 2)
    for seed in loss_seeds:
        torch.manual_seed(seed)
        whole.backward(loss_of(model, whole))
        if seed == 1:
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.grad = None if p.grad is None else p.grad.clone()
        else:
            torch.manual_seed(seed)
            used.backward(loss_of(twin, used))
    norms = whole.step(optimizers[0], 1.0).norm, used.step(optimizers[1], 1.0).norm
    assert norms[0] == norms[1]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


# --- Refusals -----------------------------------------------------------------------------------


def test_fp16_parameters_are_refused() -> None:
    for name in ("fp32", "fp16"):
        with pytest.raises(UsageError, match=r"float16 for 0\.weight; use param_dtype: float32"):
            precision(name).build_optimizer(network("fp32").half())


@pytest.mark.parametrize(
    "keys", [{"bf16": True, "fp16": True}, {"fp16": True, "param_dtype": "bfloat16"}], ids=str
)
def test_two_formats_at_once_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="fp16 must be false"):
        DistillConfig(student="s", teacher="t", **keys)


def test_frozen_parameters_are_left_alone() -> None:
    used, model = precision("masters"), network("masters")
    model[0].requires_grad_(False)
    used.build_optimizer(model)
    assert all(not name.startswith("0.") for name in used.optimizer_parameters)
