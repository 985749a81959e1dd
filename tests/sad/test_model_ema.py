"""``ModelEMA``: what is averaged, how fast, and that evaluating under it leaves no trace."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
import torch
from support.oracle import assert_ema_within
from support.tiny import tiny_llama
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.optimizer import _global_optimizer_pre_hooks

from sad.ema import ModelEMA


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """Every byte: ``torch.equal`` takes -0.0 for 0.0 and no NaN for itself."""
    return {
        name: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, t in tensors.items()
    }


def model_bits(model: nn.Module) -> dict[str, bytes]:
    return bits(dict(model.named_parameters()) | dict(model.named_buffers()))


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor += 0.1 * torch.randn(tensor.shape, generator=draw).to(tensor.dtype)


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(5, 3).to(dtype)


# --- The average --------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [True, False])
def test_decay_warms_up(warmup: bool) -> None:
    model, exact = linear(), {}
    average = ModelEMA(model, decay=0.15, warmup=warmup)
    for name, p in model.named_parameters():
        exact[name] = p.detach().to(torch.float64, copy=True)
    for n, decay in enumerate((0.1, 0.15, 0.15) if warmup else (0.15, 0.15, 0.15)):
        assert average.num_updates == n
        assert average.effective_decay == decay
        perturb(model, seed=n)
        before = {name: shadow.clone() for name, shadow in average.tensors().items()}
        average.update()
        for name, p in model.named_parameters():
            oracle = decay * before[name].double() + (1 - decay) * p.detach().double()
            assert_ema_within(average.tensors()[name], oracle, before[name], p.detach())
    assert average.num_updates == 3


def test_configured_decay_is_reached_at_its_point() -> None:
    average = ModelEMA(linear(), decay=0.9999)
    decays = {}
    for n in (0, 1, 8, 89_989, 89_990, 10**9):
        average.load_state_dict(average.state_dict() | {"num_updates": n})
        decays[n] = average.effective_decay
    assert decays[0] == 0.1 and decays[1] == 2 / 11 and decays[8] == 0.5
    assert decays[89_989] < 0.9999 and decays[89_990] == decays[10**9] == 0.9999


def test_bf16_parameters_move_the_average() -> None:
    """https://github.com/d8ahazard/sd_dreambooth_extension/pull/1415: in bf16 it stays put."""
    model = linear(torch.bfloat16)
    average = ModelEMA(model, decay=0.9999, warmup=False)
    start = {name: shadow.clone() for name, shadow in average.tensors().items()}
    perturb(model)
    for _ in range(1000):
        average.update()
    for name, p in model.named_parameters():
        shadow = average.tensors()[name]
        assert shadow.dtype == torch.float32
        whole = p.detach().double() - start[name].double()
        expected = start[name].double() + (1 - 0.9999**1000) * whole
        displacement = (expected - start[name].double()).abs()
        assert ((shadow.double() - expected).abs() <= 1e-3 * displacement).all()


def test_tied_weights_are_averaged_once() -> None:
    """Averaging every entry of ``state_dict()`` moves a tied weight twice: 0.19, not 0.1."""
    model = tiny_llama(tie_word_embeddings=True)
    average = ModelEMA(model, decay=0.9, warmup=False)
    assert "lm_head.weight" in model.state_dict()
    assert "lm_head.weight" not in average.tensors()
    name = "model.embed_tokens.weight"
    embedding, before = model.get_parameter(name), average.tensors()[name].clone()
    with torch.no_grad():
        embedding.fill_(1.0)
    average.update()
    oracle = 0.9 * before.double() + 0.1
    assert_ema_within(average.tensors()[name], oracle, before, embedding.detach())


class Mixed(nn.Module):
    """Every kind of tensor a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_trainable_parameters_and_persistent_statistics_are_averaged() -> None:
    model = Mixed()
    average = ModelEMA(model)
    assert set(average.tensors()) == {
        "trained.weight",
        "trained.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
    }
    perturb(model)
    average.update()
    live = model_bits(model)
    with average.swapped():
        swapped = model_bits(model)
    changed = {name for name in live if live[name] != swapped[name]}
    assert changed == set(average.tensors())
    assert model_bits(model) == live


# --- Skipped steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_leaves_every_bit(dtype: torch.dtype) -> None:
    model = linear(dtype)
    with torch.no_grad():
        model.bias[0] = -0.0
    average = ModelEMA(model)
    average.update()
    before = bits(average.tensors())
    with torch.no_grad():
        model.weight.fill_(torch.nan)
        model.bias.fill_(torch.inf)
    average.update(torch.tensor(False))
    assert bits(average.tensors()) == before
    assert average.num_updates == 1


def test_an_applied_step_is_the_same_with_and_without_the_verdict() -> None:
    model = linear()
    told, untold = ModelEMA(model), ModelEMA(model)
    for n in range(5):
        perturb(model, seed=n)
        told.update(torch.tensor(True))
        untold.update()
    assert bits(told.tensors()) == bits(untold.tensors())
    assert told.num_updates == untold.num_updates == 5


# --- Evaluation under the average ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_swapped_model_is_the_rounded_average_and_comes_back(dtype: torch.dtype) -> None:
    """A copy through bf16 would damage the shadow by 4e-3 at each evaluation."""
    model = cast(nn.Module, tiny_llama()).to(dtype)
    average = ModelEMA(model)
    perturb(model)
    average.update()
    shadows = {name: shadow.clone() for name, shadow in average.tensors().items()}
    live = model_bits(model)
    with average.swapped():
        assert average.is_swapped
        for name, p in model.named_parameters():
            step = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0
            assert ((p.detach() - shadows[name]).abs() <= step * shadows[name].abs()).all()
    assert not average.is_swapped
    assert model_bits(model) == live
    assert bits(average.tensors()) == bits(shadows)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exceptions_restore_every_bit(dtype: torch.dtype, error: type[BaseException]) -> None:
    model = linear(dtype)
    average = ModelEMA(model)
    perturb(model)
    average.update()
    live, shadows = model_bits(model), bits(average.tensors())
    with pytest.raises(error), average.swapped():
        raise error
    assert model_bits(model) == live and bits(average.tensors()) == shadows
    assert not average.is_swapped
    average.update()  # and training goes on


def test_what_must_wait_is_refused_while_swapped() -> None:
    model = linear()
    average = ModelEMA(model)
    state = average.state_dict()
    own = SGD(model.parameters(), lr=0.1)
    other = SGD(linear().parameters(), lr=0.1)
    perturb(model)
    live = model_bits(model)
    with average.swapped():
        inside = model_bits(model)
        for call in (
            average.update,
            average.tensors,
            average.state_dict,
            own.step,
            lambda: average.load_state_dict(state),
            lambda: average.swapped().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="leave swapped"):
                call()
        other.step()  # not our parameters, not our business
        assert model_bits(model) == inside
    assert model_bits(model) == live
    own.step()


def test_swapping_leaves_no_hook_behind() -> None:
    before = len(_global_optimizer_pre_hooks)
    average = ModelEMA(linear())
    for _ in range(3):
        with average.swapped():
            assert len(_global_optimizer_pre_hooks) == before + 1
    assert len(_global_optimizer_pre_hooks) == before


# --- Masters ------------------------------------------------------------------------------------


def with_masters() -> tuple[nn.Linear, dict[str, Tensor], ModelEMA]:
    model = linear(torch.bfloat16)
    masters: dict[str, Tensor] = {
        name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()
    }
    return model, masters, ModelEMA(model, masters=masters)


def test_a_master_of_no_parameter_is_refused() -> None:
    model = linear(torch.bfloat16)
    masters = {"weight": model.weight.detach().float(), "wieght": torch.zeros(3, 5)}
    with pytest.raises(ValueError, match=r"masters must have the names .*, got 'wieght'; pass"):
        ModelEMA(model, masters=masters)


def test_the_average_follows_the_masters() -> None:
    """Their small steps are below the resolution of the live bf16 weights."""
    model, masters, average = with_masters()
    before = {name: shadow.clone() for name, shadow in average.tensors().items()}
    with torch.no_grad():
        for master in masters.values():
            master *= 1 + 2.0**-12
    average.update()
    for name, master in masters.items():
        assert torch.equal(master.detach().bfloat16(), dict(model.named_parameters())[name])
        oracle = 0.1 * before[name].double() + 0.9 * master.detach().double()
        assert_ema_within(average.tensors()[name], oracle, before[name], master.detach())
        assert not torch.equal(average.tensors()[name], before[name])


def test_with_masters_live_weights_come_back_from_them() -> None:
    model, masters, average = with_masters()
    with torch.no_grad():
        for name, p in model.named_parameters():
            masters[name] += 0.3 * torch.randn_like(masters[name])
            p.copy_(masters[name])
    average.update()
    live, shadows = model_bits(model), bits(average.tensors())
    with average.swapped():
        for name, p in model.named_parameters():
            assert torch.equal(p, average._shadows[name].bfloat16())
    assert model_bits(model) == live and bits(average.tensors()) == shadows


# --- State --------------------------------------------------------------------------------------


def test_resumed_average_is_equal_bit_for_bit() -> None:
    model = linear()
    whole = ModelEMA(model, decay=0.99)
    for n in range(3):
        perturb(model, seed=n)
        whole.update()
    state: dict[str, Any] = whole.state_dict()
    tensors = {name: shadow.clone() for name, shadow in state.pop("shadow").items()}
    state = json.loads(json.dumps(state))
    assert state == {"decay": 0.99, "warmup": True, "num_updates": 3}

    resumed = ModelEMA(linear(), decay=0.5, warmup=False)
    places = {name: shadow.data_ptr() for name, shadow in resumed.tensors().items()}
    resumed.load_state_dict(state | {"shadow": tensors})
    assert {name: shadow.data_ptr() for name, shadow in resumed.tensors().items()} == places
    assert bits(resumed.tensors()) == bits(whole.tensors())
    assert resumed.num_updates == 3 and resumed.effective_decay == whole.effective_decay


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "dtype"])
def test_the_state_of_another_model_is_refused_before_anything_changes(fault: str) -> None:
    average = ModelEMA(linear())
    before = bits(average.tensors())
    state = average.state_dict()
    shadow = {name: torch.full_like(t, 7.0) for name, t in state["shadow"].items()}
    if fault == "missing":
        del shadow["bias"]
    elif fault == "extra":
        shadow["head"] = torch.ones(1)
    else:
        shadow["bias"] = shadow["bias"].double() if fault == "dtype" else torch.ones(4)
    with pytest.raises(ValueError, match="the average"):
        average.load_state_dict(state | {"shadow": shadow, "num_updates": 5})
    assert bits(average.tensors()) == before and average.num_updates == 0


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_bad_decays_are_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must lie in"):
        ModelEMA(linear(), decay=decay)


def test_models_that_cannot_be_averaged_are_refused() -> None:
    with pytest.raises(ValueError, match="must have trainable parameters"):
        ModelEMA(linear().requires_grad_(False))
    with pytest.raises(TypeError, match="float16 for weight"):
        ModelEMA(linear(torch.float16))


# --- Shadows elsewhere --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shadows_elsewhere_average_and_swap_alike(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs with shadows in host memory, with both sides in it."""
    models = [linear(dtype), linear(dtype)]
    models[1].load_state_dict(models[0].state_dict())
    here, there = (ModelEMA(model, decay=0.9, device="cpu") for model in models)
    assert not there._elsewhere
    monkeypatch.setattr(there, "_elsewhere", True)
    for n in range(4):
        for model in models:
            perturb(model, seed=n)
        ok = torch.tensor(n != 2)
        here.update(ok)
        there.update(ok)
    assert here.num_updates == there.num_updates == 3
    assert bits(here.tensors()) == bits(there.tensors())
    live = model_bits(models[1])
    shadows = bits(there.tensors())
    with here.swapped(), there.swapped():
        assert model_bits(models[0]) == model_bits(models[1]) != live
    assert model_bits(models[1]) == live and bits(there.tensors()) == shadows
    assert not there._kept


def test_shadows_lie_where_they_are_asked_for() -> None:
    average = ModelEMA(linear(), device="meta")
    assert average._elsewhere
    assert {shadow.device.type for shadow in average.tensors().values()} == {"meta"}
