"""Live objects to JSON and tensors and back, in place and to the bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sad.checkpoint.state import (
    gradient_tensors,
    load_gradients,
    load_model,
    load_optimizer,
    load_rng,
    load_tensors,
    model_tensors,
    optimizer_state,
    rng_state,
    start_rng,
)
from sad.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from sad.config.schema import DistillConfig
from sad.errors import CheckpointError
from sad.optim.optimizer import build_adamw

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


class Zoo(nn.Module):
    """One of each kind: tied and non-contiguous parameters, buffers of both sorts, two dtypes."""

    derived: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(6, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2))
        self.turned = nn.Parameter(torch.randn(4, 4).t())
        self.short = nn.Parameter(torch.randn(4).bfloat16())
        self.unused = nn.Parameter(torch.randn(2))
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("derived", torch.randn(3), persistent=False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids)) @ self.turned + self.short)


def through_disk(folder: Path, state: dict, tensors: dict[str, dict[str, Tensor]]) -> Checkpoint:
    return load_checkpoint(save_checkpoint(folder, 0, state, tensors, save_total_limit=2))


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


# Models


def test_every_parameter_and_persistent_buffer_is_named_once() -> None:
    assert sorted(model_tensors(Zoo())) == [
        "embed.weight",
        "inner.0.bias",
        "inner.0.weight",
        "inner.1.bias",
        "inner.1.num_batches_tracked",
        "inner.1.running_mean",
        "inner.1.running_var",
        "inner.1.weight",
        "kept",
        "short",
        "turned",
        "unused",
    ]


def test_a_model_comes_back_in_place(tmp_path: Path) -> None:
    saved, model = Zoo(seed=1), Zoo(seed=2)
    derived = model.derived.clone()
    places = {name: tensor.data_ptr() for name, tensor in model_tensors(model).items()}

    load_model(model, through_disk(tmp_path, {}, {"model": model_tensors(saved)}).tensors["model"])

    assert_same_bits(model_tensors(model), model_tensors(saved))
    assert {name: tensor.data_ptr() for name, tensor in model_tensors(model).items()} == places
    assert model.head.weight is model.embed.weight
    assert model.turned.stride() == (1, 4)
    assert torch.equal(model.derived, derived)
    assert model.short.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_a_transformers_model_comes_back(tmp_path: Path, tied: bool) -> None:
    saved = tiny_llama(seed=1, tie_word_embeddings=tied)
    model = tiny_llama(seed=2, tie_word_embeddings=tied)
    assert ("lm_head.weight" in model_tensors(saved)) == (not tied)

    load_model(model, through_disk(tmp_path, {}, {"model": model_tensors(saved)}).tensors["model"])

    ids = torch.arange(7)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, saved(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda saved: saved.pop("kept"),
            r"got 1 missing and 0 unexpected.*'kept'",
        ),
        (lambda saved: saved.update(x=torch.ones(1)), r"0 missing and 1 unexpected, first 'x'"),
        (
            lambda saved: saved.update(kept=torch.ones(4)),
            r"model tensor 'kept' must be torch.float32 \(3,\), got torch.float32 \(4,\)",
        ),
        (
            lambda saved: saved.update(short=torch.ones(4)),
            r"model tensor 'short' must be torch.bfloat16 \(4,\), got torch.float32 \(4,\)",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_changes(
    change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    saved, model = copies(model_tensors(Zoo(seed=1))), Zoo(seed=2)
    before = copies(model_tensors(model))
    change(saved)
    with pytest.raises(CheckpointError, match=message):
        load_model(model, saved)
    assert_same_bits(model_tensors(model), before)


def test_any_named_tensors_can_be_loaded() -> None:
    live = {"a": torch.zeros(2), "b": torch.zeros((), dtype=torch.float64)}
    load_tensors(live, {"b": torch.tensor(0.5).double(), "a": torch.ones(2)}, "ema")
    assert live["a"].tolist() == [1.0, 1.0] and live["b"].item() == 0.5


# Optimizers

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw loop": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=False),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=True),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.1),
}


class Run:
    """A toy run with everything a trainer has: groups, a schedule, accumulation, dropout."""

    def __init__(self, optimizer: str, device: str, seed: int) -> None:
        self.model = Zoo(seed).to(device)
        self.parameters = dict(self.model.named_parameters())
        decayed = [p for p in self.parameters.values() if p.ndim == 2]
        others = [p for p in self.parameters.values() if p.ndim != 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.draw = torch.Generator().manual_seed(3)
        self.ids = torch.randint(0, 6, (20, 16), generator=self.draw).to(device)

    def micro_batch(self, i: int) -> None:
        ids = self.ids[i]
        F.cross_entropy(self.model(ids), ids.flip(0)).backward()
        if i % 2:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.scheduler.step()

    def save(self, folder: Path) -> Checkpoint:
        optimizer, optimizer_tensors = optimizer_state(self.optimizer, self.parameters)
        rng, rng_tensors = rng_state()
        state = {
            "optimizer": optimizer,
            "rng": rng,
            "scheduler": self.scheduler.state_dict(),
        }
        tensors = {
            "model": model_tensors(self.model),
            "optimizer": optimizer_tensors,
            "grads": gradient_tensors(self.parameters),
            "rng": rng_tensors,
        }
        return through_disk(folder, state, tensors)

    def load(self, saved: Checkpoint) -> None:
        load_model(self.model, saved.tensors["model"])
        load_optimizer(
            self.optimizer, self.parameters, saved.state["optimizer"], saved.tensors["optimizer"]
        )
        self.scheduler.load_state_dict(saved.state["scheduler"])
        load_gradients(self.parameters, saved.tensors["grads"])
        assert load_rng(saved.state["rng"], saved.tensors["rng"]) == []

    def everything(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state, tensors = optimizer_state(self.optimizer, self.parameters)
        tensors = copies(tensors | model_tensors(self.model))
        grads = gradient_tensors(self.parameters)
        return state, tensors | {f"grad of {name}": grads[name] for name in grads}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_was_saved_and_rebuilt_ends_in_the_same_bits(
    tmp_path: Path, optimizer: str, device: str
) -> None:
    """Saved before the first update, inside a window and at its edge; dropout goes on as well."""
    straight = Run(optimizer, device, seed=0)
    for i in range(9):
        straight.micro_batch(i)

    resumed = Run(optimizer, device, seed=0)
    for i in range(9):
        if i in (1, 4, 5):
            saved = resumed.save(tmp_path / str(i))
            draws()
            resumed = Run(optimizer, device, seed=100 + i)
            resumed.load(saved)
        resumed.micro_batch(i)

    state, tensors = straight.everything()
    resumed_state, resumed_tensors = resumed.everything()
    assert_same_bits(resumed_tensors, tensors)
    assert repr(resumed_state) == repr(state)
    assert resumed.scheduler.state_dict() == straight.scheduler.state_dict()


def test_an_optimizer_comes_back_into_a_used_one(tmp_path: Path) -> None:
    """State that the checkpoint does not have is gone, not left over."""
    run = Run("adamw loop", "cpu", seed=0)
    saved = run.save(tmp_path)
    assert saved.tensors["optimizer"] == {}
    run.micro_batch(0)
    run.micro_batch(1)
    assert run.optimizer.state
    load_optimizer(run.optimizer, run.parameters, saved.state["optimizer"], {})
    assert not run.optimizer.state


def test_state_keeps_its_dtype_beside_a_parameter_of_another(tmp_path: Path) -> None:
    """``Optimizer.load_state_dict`` would round these fp32 moments to bf16."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([p])
    moment = torch.tensor([0.1, 0.2, 0.3])
    assert not torch.equal(moment, moment.bfloat16().float())
    optimizer.state[p] = {"step": torch.tensor(3.0), "exp_avg": moment, "exp_avg_sq": moment + 1}

    state, tensors = optimizer_state(optimizer, {"p": p})
    assert sorted(tensors) == ["p/exp_avg", "p/exp_avg_sq", "p/step"]
    saved = through_disk(tmp_path, state, {"optimizer": tensors})
    fresh = torch.optim.AdamW([p])
    load_optimizer(fresh, {"p": p}, saved.state, saved.tensors["optimizer"])

    assert_same_bits(fresh.state[p], optimizer.state[p])


def test_moments_have_the_layout_of_their_parameter() -> None:
    """Fused optimizers pair elements by address: contiguous moments would be transposed ones."""
    run = Run("adamw fused", "cpu", seed=0)
    run.micro_batch(0)
    run.micro_batch(1)
    state, tensors = optimizer_state(run.optimizer, run.parameters)
    saved = {name: tensor.contiguous() for name, tensor in copies(tensors).items()}
    load_optimizer(run.optimizer, run.parameters, state, saved)
    turned = run.model.turned
    assert run.optimizer.state[turned]["exp_avg"].stride() == turned.stride() == (1, 4)
    assert torch.equal(run.optimizer.state[turned]["exp_avg"], saved["turned/exp_avg"])


def test_options_come_back_and_the_implementation_stays() -> None:
    run, other = Run("adamw foreach", "cpu", seed=0), Run("adamw loop", "cpu", seed=0)
    group = run.optimizer.param_groups[0]
    group.update(lr=0.123, betas=(0.5, 0.6), new_option="x")
    state, tensors = optimizer_state(run.optimizer, run.parameters)

    load_optimizer(other.optimizer, other.parameters, state, tensors)

    loaded = other.optimizer.param_groups[0]
    assert (loaded["lr"], loaded["betas"], loaded["new_option"]) == (0.123, (0.5, 0.6), "x")
    assert loaded["initial_lr"] == 0.1
    assert (group["foreach"], loaded["foreach"]) == (True, False)


def test_another_optimizer_is_refused_and_nothing_changes() -> None:
    run = Run("adamw loop", "cpu", seed=0)
    run.micro_batch(0)
    run.micro_batch(1)
    state, tensors = optimizer_state(run.optimizer, run.parameters)
    before = copies(tensors)

    one_group = state | {"groups": state["groups"][:1]}
    first, second = state["groups"]
    renamed = state | {"groups": [first | {"names": ["x", *first["names"][1:]]}, second]}
    for wrong, saved, message in (
        (one_group, tensors, "must have 2 parameter groups, got 1"),
        (renamed, tensors, "optimizer group 0 parameters must be .* 1 missing and 1 unexpected"),
        (state, {"x/exp_avg": torch.ones(1)}, "optimizer state must belong to .*, got 'x'"),
        (state | {"values": {"y": {"step": 1}}}, tensors, "optimizer state must .*, got 'y'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_optimizer(run.optimizer, run.parameters, wrong, saved)
    assert_same_bits(optimizer_state(run.optimizer, run.parameters)[1], before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s, t: t.update({"turned/exp_avg": torch.zeros(2)}),
            r"float32 \(4, 4\), got .*\(2,\)",
        ),
        (
            lambda s, t: t.update({"turned/exp_avg": torch.zeros(4, 4).double()}),
            "got torch.float64",
        ),
        (lambda s, t: t.update({"turned/more": torch.zeros(4, 4)}), "0 missing and 1 unexpected"),
        (lambda s, t: t.pop("turned/exp_avg_sq"), "1 missing and 0 unexpected"),
        (
            lambda s, t: t.update({"turned/step": torch.tensor(-1.0)}),
            "must count its steps, got -1",
        ),
        (
            lambda s, t: t.update({"turned/step": torch.tensor(torch.nan)}),
            "count its steps, got nan",
        ),
        (lambda s, t: t.update({"turned/step": torch.zeros(3)}), r"got torch.float32 \(3,\)"),
        (lambda s, t: s["values"].update(turned={"exp_avg": 1}), "0 missing and 1 unexpected"),
        (lambda s, t: s["groups"][0]["options"].update(lr=-1.0), r"options.lr must be a finite"),
        (lambda s, t: s["groups"][0]["options"].update(lr=[]), "options.lr must be .* a list of 0"),
        (lambda s, t: s["groups"][0]["options"].update(betas=[0.9]), "betas must be a list of 2"),
        (lambda s, t: s["groups"][0]["options"].update(betas=[0.9, 1.5]), r"betas\[1\] must be"),
        (lambda s, t: s["groups"][0]["options"].update(amsgrad=None), "amsgrad must be true or"),
        (lambda s, t: s.update(groups=None), "optimizer.groups must be a list, got None"),
        (lambda s, t: s.update(values=[]), "optimizer.values must be an object"),
        (lambda s, t: s.update(more=1), "optimizer must have known keys only, got 'more'"),
    ],
)
def test_state_that_no_optimizer_of_the_run_can_be_in_is_refused(
    damage: Callable[[Any, dict[str, Tensor]], Any], message: str
) -> None:
    """A fused step goes through moments by the size of their parameter: a segmentation fault."""
    run = Run("adamw fused", "cpu", seed=0)
    run.micro_batch(0)
    run.micro_batch(1)
    state, tensors = optimizer_state(run.optimizer, run.parameters)
    before = repr(state), copies(tensors)
    state, changed = copy.deepcopy(state), copies(tensors)
    damage(state, changed)
    with pytest.raises(CheckpointError, match=message) as error:
        load_optimizer(run.optimizer, run.parameters, state, changed)
    assert "\n" not in str(error.value)
    state, tensors = optimizer_state(run.optimizer, run.parameters)
    assert repr(state) == before[0]
    assert_same_bits(tensors, before[1])


def test_moments_of_8_bits_come_back_and_others_are_refused() -> None:
    pytest.importorskip("bitsandbytes")
    large, small = nn.Parameter(torch.randn(64, 100)), nn.Parameter(torch.randn(10))
    parameters: dict[str, Tensor] = {"large": large, "small": small}

    def optimizer() -> Optimizer:
        return build_adamw(DistillConfig(student="-", teacher="-", optim="adamw_8bit"), parameters)

    trained = optimizer()
    large.grad, small.grad = torch.ones_like(large), torch.ones_like(small)
    trained.step()
    state, tensors = optimizer_state(trained, parameters)
    fresh = optimizer()
    load_optimizer(fresh, parameters, state, tensors)
    assert_same_bits(optimizer_state(fresh, parameters)[1], tensors)
    for name, other in (
        ("large/state1", torch.zeros(3, dtype=torch.uint8)),
        ("large/absmax1", torch.zeros(3)),
        ("large/qmap1", torch.zeros(3)),
        ("small/state1", torch.zeros(10, dtype=torch.uint8)),
    ):
        with pytest.raises(CheckpointError, match=name.partition("/")[2]):
            load_optimizer(fresh, parameters, state, tensors | {name: other})


def test_every_parameter_needs_a_name() -> None:
    run = Run("sgd", "cpu", seed=0)
    del run.parameters["short"]
    with pytest.raises(ValueError, match=r"must name every parameter .* shape \(4,\)"):
        optimizer_state(run.optimizer, run.parameters)


# Gradients


def test_gradients_come_back_and_none_stays_none(tmp_path: Path) -> None:
    run = Run("sgd", "cpu", seed=0)
    run.micro_batch(0)
    grads = copies(gradient_tensors(run.parameters))
    assert "unused" not in grads and grads["turned"].any()
    saved = through_disk(tmp_path, {}, {"grads": grads}).tensors["grads"]

    for other in (Run("sgd", "cpu", seed=1), run):  # one without gradients, one with others
        other.model.unused.grad = torch.ones(2)
        load_gradients(other.parameters, saved)
        assert other.model.unused.grad is None
        assert_same_bits(gradient_tensors(other.parameters), grads)
        other.micro_batch(2)  # accumulates into them
        assert not torch.equal(gradient_tensors(other.parameters)["turned"], grads["turned"])


def test_fp32_gradients_of_bf16_parameters_come_back(tmp_path: Path) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    p.grad = torch.tensor([0.1, 0.2, 0.3])
    saved = through_disk(tmp_path, {}, {"grads": gradient_tensors({"p": p})}).tensors["grads"]
    p.grad = None
    load_gradients({"p": p}, saved)
    assert p.grad is not None and p.grad.dtype == torch.float32
    assert p.grad.tolist() == torch.tensor([0.1, 0.2, 0.3]).tolist()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"x": torch.ones(4)}, "gradient must belong to parameters of this run, got 'x'"),
        ({"short": torch.ones(5)}, r"gradient 'short' must be torch.bfloat16 \(4,\), got .*\(5,\)"),
    ],
)
def test_gradients_of_another_model_are_refused(saved: dict[str, Tensor], message: str) -> None:
    run = Run("sgd", "cpu", seed=0)
    run.micro_batch(0)
    before = copies(gradient_tensors(run.parameters))
    with pytest.raises(CheckpointError, match=message):
        load_gradients(run.parameters, saved)
    assert_same_bits(gradient_tensors(run.parameters), before)


# Random numbers


def draws() -> list[Any]:
    """Odd counts of normal variates, so that Python and numpy hold one back."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
        F.dropout(torch.ones(20)).tolist(),
    ]


def test_random_numbers_go_on_where_they_stopped(tmp_path: Path) -> None:
    draws()
    state, tensors = rng_state()
    saved = through_disk(tmp_path, {"rng": state}, {"rng": tensors})
    expected = [draws(), draws()]
    assert expected[0] != expected[1]

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert load_rng(saved.state["rng"], saved.tensors["rng"]) == []
    assert [draws(), draws()] == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s, t: s["python"].update(version=2), "version must be 3, got 2"),
        (lambda s, t: s["python"]["words"].pop(), "words must be a list of 625 items"),
        (lambda s, t: s["python"]["words"].__setitem__(3, 2**32), r"words\[3\] must be an integer"),
        (
            lambda s, t: s["python"]["words"].__setitem__(624, 625),
            r"words\[624\] must be an integer",
        ),
        (lambda s, t: s["python"].update(gauss=float("nan")), "gauss must be a finite number"),
        (lambda s, t: s["numpy"].update(position=625), "position must be an integer from 0 to 624"),
        (lambda s, t: s["numpy"].pop("cached"), "must have the key 'cached'"),
        (lambda s, t: t["numpy"].__setitem__(0, -1), "words from -1 to"),
        (lambda s, t: t.update(numpy=torch.zeros(3).long()), r"got torch.int64 \(3,\)"),
        (lambda s, t: t.update(torch=torch.zeros(16).byte()), r"got torch.uint8 \(16,\)"),
        (lambda s, t: t["torch"].fill_(255), "got bytes that torch refuses"),
        (lambda s, t: t.update({"cuda.0": torch.zeros(3).byte()}), r"'cuda.0' must be torch.uint8"),
        (lambda s, t: t.update({"cuda.0": torch.full((16,), 255).byte()}), "an offset of -1"),
        (lambda s, t: t.update({"cuda.x": torch.zeros(16).byte()}), "first 'cuda.x'"),
    ],
)
def test_states_that_no_generator_can_be_in_are_refused(
    damage: Callable[[Any, dict[str, Tensor]], Any], message: str
) -> None:
    state, tensors = rng_state()
    tensors = copies(tensors)
    damage(state, tensors)
    expected = [random.getstate(), torch.get_rng_state().tolist(), repr(np.random.get_state())]
    with pytest.raises(CheckpointError, match=message):
        load_rng(state, tensors)
    assert [
        random.getstate(),
        torch.get_rng_state().tolist(),
        repr(np.random.get_state()),
    ] == expected


def test_taking_the_state_draws_nothing_and_leaves_cuda_asleep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def touched(*args: object) -> None:
        raise AssertionError("CUDA was touched")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", touched)
    first, second = rng_state(), rng_state()
    assert first[0] == second[0]
    assert sorted(first[1]) == ["numpy", "torch"]
    assert_same_bits(first[1], second[1])


def test_generators_of_devices_are_saved_and_missing_ones_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three devices when saving, two when loading."""
    states = [torch.full((16,), 4 * i, dtype=torch.uint8) for i in range(3)]
    restored: dict[int, Tensor] = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, i: restored.update({i: s}))

    state, tensors = rng_state()
    assert load_rng(state, tensors) == ["cuda.2"]
    assert_same_bits(
        {str(i): tensor for i, tensor in restored.items()}, {"0": states[0], "1": states[1]}
    )


def test_generators_start_at_a_state_of_their_own() -> None:
    """Of each process and each position, and the same one whenever it is asked for."""

    def drawn(*numbers: int) -> tuple[float, float, float]:
        start_rng(*numbers)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    one = drawn(0, 0, 0)
    assert drawn(0, 0, 0) == one
    others = [drawn(*numbers) for numbers in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 7, 10**9))]
    for i in range(3):
        assert len({drawn[i] for drawn in (one, *others)}) == 5
