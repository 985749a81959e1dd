"""Moving averages of other libraries, all with fp32 shadows and a fixed decay.

``ema/swap`` swaps the average in and out again, as around an evaluation. Copies that a library
makes on the way, moves to the CPU included, are part of its time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.base import Average, Peer, Unsupported, require_module
from bench.problems.inputs import Parameters

lists: Any = torch  # untyped: torch's stubs leave out the _foreach functions


class Model(nn.Module):
    """A module that holds the problem's parameters, not copies of them."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(p) for p in params])


def _shadows(model: Any) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def _updates_only(problem: Parameters) -> None:
    if problem.case.name != "ema/update":
        raise Unsupported("has no swap")


def foreach(problem: Parameters) -> Average:
    """torch's multi-tensor functions; ``_foreach_lerp_`` takes equal dtypes only."""
    params, decay = problem.params, problem.case.decay
    shadows = problem.shadows()

    def update() -> None:
        if params[0].dtype == torch.float32:
            lists._foreach_lerp_(shadows, params, 1 - decay)
        else:
            lists._foreach_mul_(shadows, decay)
            lists._foreach_add_(shadows, params, alpha=1 - decay)

    def swap() -> list[Tensor]:
        kept = [p.clone() for p in params]
        lists._foreach_copy_(params, shadows)
        return kept

    def back(kept: Any) -> None:
        lists._foreach_copy_(params, kept)

    if problem.case.name == "ema/update":
        return Average(shadows, update)
    return Average(shadows, swap, back)


def foreach_lerp(problem: Parameters) -> Average:
    """``foreach`` with one rounding for 16-bit parameters, too: it makes fp32 copies of them."""
    _updates_only(problem)
    if problem.params[0].dtype == torch.float32:
        raise Unsupported("is foreach, for float32 parameters")
    params, weight = problem.params, 1 - problem.case.decay
    shadows = problem.shadows()
    return Average(
        shadows, lambda: lists._foreach_lerp_(shadows, [p.float() for p in params], weight)
    )


def averaged_model(problem: Parameters) -> Average:
    _updates_only(problem)
    swa, model = torch.optim.swa_utils, Model(problem.params)
    if problem.params[0].dtype == torch.float32:
        average = swa.AveragedModel(
            model, multi_avg_fn=swa.get_ema_multi_avg_fn(problem.case.decay)
        )
    else:  # torch._foreach_lerp_ refuses a shadow of another dtype
        average = swa.AveragedModel(model, avg_fn=swa.get_ema_avg_fn(problem.case.decay)).float()
    average.update_parameters(model)  # the first call copies
    return Average(_shadows(average.module), lambda: average.update_parameters(model))


def timm(problem: Parameters) -> Average:
    _updates_only(problem)
    V3 = require_module("timm.utils", "timm").ModelEmaV3
    model = Model(problem.params)
    average = V3(model, decay=problem.case.decay, dtype=torch.float32)
    return Average(_shadows(average.module), lambda: average.update(model))


def ema_pytorch(problem: Parameters) -> Average:
    _updates_only(problem)
    model, decay = Model(problem.params), problem.case.decay
    average = require_module("ema_pytorch", "ema-pytorch").EMA(
        model,
        ema_model=Model(problem.shadows()),
        beta=decay,
        min_value=decay,  # no warm-up
        update_after_step=0,
        update_every=1,
        use_foreach=True,
        coerce_dtype=True,
    )
    for _ in range(3):  # the first calls copy
        average.update()
    return Average(_shadows(average.ema_model), average.update)


def diffusers(problem: Parameters) -> Average:
    EMAModel = require_module("diffusers.training_utils", "diffusers").EMAModel
    model, decay = Model(problem.params), problem.case.decay
    average = EMAModel(model.parameters(), decay=decay, min_decay=decay, foreach=True)
    average.to(dtype=torch.float32)
    average.optimization_step = 10  # its first step copies

    def swap() -> None:
        average.store(model.parameters())
        average.copy_to(model.parameters())

    def back(_: object) -> None:
        average.restore(model.parameters())

    shadows = list(average.shadow_params)
    if problem.case.name == "ema/update":
        return Average(shadows, lambda: average.step(model.parameters()))
    return Average(shadows, swap, back)


EMA = (
    Peer("foreach", "torch._foreach_mul_, _foreach_add_ or _foreach_lerp_", foreach),
    Peer("foreach lerp", "torch._foreach_lerp_ of fp32 copies", foreach_lerp),
    Peer("AveragedModel", "torch.optim.swa_utils.AveragedModel", averaged_model),
    Peer("timm", "timm.utils.ModelEmaV3", timm, "timm", {"dtype": "float32"}),
    Peer(
        "ema-pytorch",
        "ema_pytorch.EMA",
        ema_pytorch,
        "ema-pytorch",
        {"use_foreach": True, "coerce_dtype": True},
    ),
    Peer("diffusers", "EMAModel", diffusers, "diffusers", {"foreach": True}),
)
