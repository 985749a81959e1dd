"""A divergence that the kernels have no code for is refused by name, on every path of Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sad_kernels import (
    Head,
    Objective,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    _divergence_table,
    distill_loss,
    kl_div,
    linear_distill_loss,
)
from sad_kernels._triton import tile
from torch import Tensor

N, V, D, K = 3, 40, 8, 4


def logits() -> Tensor:
    return torch.randn(N, V)


def top_k() -> TeacherTopK:
    log_probs, ids = logits().log_softmax(-1).topk(K)
    return TeacherTopK(ids, log_probs)


def hidden() -> TeacherHidden:
    return TeacherHidden(torch.randn(N, D), Head(torch.randn(V, D)))


def kl(divergence: Any) -> Tensor:
    return kl_div(logits(), logits(), divergence=divergence, impl="triton")


def distill(teacher: Any) -> Callable[[Any], Tensor]:
    def call(divergence: Any) -> Tensor:
        wanted = Objective(divergence=divergence)
        return distill_loss(logits(), labels(), teacher(), wanted, impl="triton").loss

    return call


def linear(teacher: Any) -> Callable[[Any], Tensor]:
    def call(divergence: Any) -> Tensor:
        h, head = torch.randn(N, D, requires_grad=True), Head(torch.randn(V, D))
        wanted = Objective(divergence=divergence)
        return linear_distill_loss(h, head, labels(), teacher(), wanted, impl="triton").loss

    return call


def labels() -> Tensor:
    return torch.arange(N)


PATHS: dict[str, Callable[[Any], Tensor]] = {
    "kl_div": kl,
    "distill_loss, dense": distill(lambda: TeacherLogits(logits())),
    "distill_loss, hidden": distill(hidden),
    "distill_loss, top-k": distill(top_k),
    "linear_distill_loss, dense": linear(lambda: TeacherLogits(logits())),
    "linear_distill_loss, hidden": linear(hidden),
    "linear_distill_loss, top-k": linear(top_k),
}


@pytest.fixture(params=[1, 2])
def toy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A divergence of one or two readings that stands in the table and nowhere else."""
    info = _divergence_table.DivergenceInfo(
        reads_beta=False, forward_passes=request.param, gradient_bound=lambda beta: 1.0
    )
    monkeypatch.setitem(_divergence_table.DIVERGENCES, "toy", info)
    return "toy"


@pytest.mark.parametrize("path", PATHS)
def test_a_divergence_without_code_is_refused_by_name(path: str, toy: str) -> None:
    assert PATHS[path]("jsd").isfinite()
    with pytest.raises(NotImplementedError, match=r"impl='triton'.*got 'toy'"):
        PATHS[path](toy)


@pytest.mark.parametrize("path", PATHS)
def test_a_code_without_a_branch_stops_the_kernel(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it does not compile either is shown in ``test_compile.py``."""
    monkeypatch.setitem(tile.DIVERGENCE_CODES, "skew_reverse_kl", 99)
    with pytest.raises(Exception, match="divergence must have a branch in every kernel"):
        PATHS[path]("skew_reverse_kl")


def test_every_divergence_of_the_table_has_a_code_of_its_own() -> None:
    assert tile.DIVERGENCE_CODES.keys() == _divergence_table.DIVERGENCES.keys()
    assert len(set(tile.DIVERGENCE_CODES.values())) == len(tile.DIVERGENCE_CODES)
