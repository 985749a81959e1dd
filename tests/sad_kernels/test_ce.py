"""``cross_entropy``: values by hand, every option on every kind of input, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.cases import CROSS_ENTROPY, Options, crossed
from support.oracle import ALL, IMPLS, IN_FLOAT64, assert_value, bound, judge
from support.problems import cross_entropy_problem, plain
from torch import Tensor
from torch.autograd import gradcheck

NAN, INF = math.nan, math.inf
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def value_and_grad(impl: str, logits: list[Any], label: int, **options: Any) -> tuple[Tensor, ...]:
    x = torch.tensor([logits], requires_grad=True)
    loss = bound(impl).cross_entropy(x, torch.tensor([label]), **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


# --- By hand: logits [0, ln 3] have probabilities [1/4, 3/4] and a log-sum-exp of ln 4 -----------


@pytest.mark.parametrize("impl", ALL)
def test_by_hand(impl: str) -> None:
    loss, grad = value_and_grad(impl, [0.0, LN3], 1)
    assert_value(loss, LN4 - LN3)
    assert_value(grad, [[1 / 4, -1 / 4]])


@pytest.mark.parametrize("impl", ALL)
def test_label_smoothing_by_hand(impl: str) -> None:
    """eps/V = 0.05 on both classes, the label's included, and 0.9 on the label."""
    loss, grad = value_and_grad(impl, [0.0, LN3], 1, label_smoothing=0.1)
    assert_value(loss, LN4 - 0.95 * LN3)
    assert_value(grad, [[1 / 4 - 0.05, 3 / 4 - 0.95]])


@pytest.mark.parametrize("impl", ALL)
def test_z_loss_by_hand(impl: str) -> None:
    loss, grad = value_and_grad(impl, [0.0, LN3], 0, z_loss=0.5)
    assert_value(loss, LN4 + 0.5 * LN4**2)
    assert_value(grad, [[-3 / 4 + LN4 / 4, 3 / 4 + LN4 * 3 / 4]], scale=2.0)


@pytest.mark.parametrize("impl", ALL)
def test_softcap_by_hand(impl: str) -> None:
    """``2 tanh(ln 3 / 2) = 1``, where the cap's slope is 3/4."""
    loss, grad = value_and_grad(impl, [0.0, LN3], 1, softcap=2.0)
    q = math.e / (1 + math.e)
    assert_value(loss, -math.log(q))
    assert_value(grad, [[1 - q, (q - 1) * 3 / 4]])


@pytest.mark.parametrize("impl", ALL)
def test_valid_vocab_by_hand(impl: str) -> None:
    loss, grad = value_and_grad(impl, [0.0, LN3, 50.0, NAN], 1, valid_vocab=2)
    assert_value(loss, LN4 - LN3)
    assert_value(grad, [[1 / 4, -1 / 4, 0, 0]])


@pytest.mark.parametrize("impl", ALL)
def test_reductions_by_hand(impl: str) -> None:
    """Uniform over 2, 4 and 3 valid classes; the row of 4 is ignored, so two rows count."""
    x = torch.tensor([[0, 0, -INF, -INF], [0, 0, 0, 0], [0, 0, 0, -INF]], requires_grad=True)
    y = torch.tensor([0, -100, 2])
    ce = bound(impl).cross_entropy
    assert_value(ce(x, y, reduction="none"), [LN2, 0, LN3])
    assert_value(ce(x, y, reduction="sum"), LN2 + LN3)
    assert_value(ce(x, y), (LN2 + LN3) / 2)
    (grad,) = torch.autograd.grad(ce(x, y), x)
    assert_value(grad, [[-1 / 4, 1 / 4, 0, 0], [0, 0, 0, 0], [1 / 6, 1 / 6, -1 / 3, 0]])


# --- Everything else against the oracle ----------------------------------------------------------


@pytest.mark.few(112)
@pytest.mark.parametrize(("options", "dtype", "impl"), crossed(CROSS_ENTROPY))
def test_every_option(options: Options, dtype: torch.dtype, impl: str) -> None:
    judge(cross_entropy_problem(options, dtype), bound(impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("V", "valid"), [(50257, False), (151936, 151665)])
def test_wide_vocabularies(V: int, valid: int | bool, dtype: torch.dtype, impl: str) -> None:
    for distribution in ("randn5", "zipf"):
        problem = plain(
            "cross_entropy",
            dtype,
            N=2,
            V=V,
            cut=valid,
            distribution=distribution,
            label_smoothing=0.1,
            z_loss=1e-3,
            upstream="random",
            reduction="none",
        )
        judge(problem, bound(impl))


@pytest.mark.parametrize("impl", IN_FLOAT64)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction: str, impl: str) -> None:
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, -100, 5, 3])
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "valid_vocab": 6}
    ce = bound(impl).cross_entropy
    assert gradcheck(lambda x: ce(x, y, reduction=reduction, **options), (x,))


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows(shape: tuple[int, ...], impl: str) -> None:
    for reduction in ("mean", "sum", "none"):
        x = torch.randn(shape, requires_grad=True)
        y = torch.zeros(shape[:-1], dtype=torch.int64)
        loss = bound(impl).cross_entropy(x, y, reduction=reduction)
        assert torch.equal(loss, torch.zeros(shape[:-1] if reduction == "none" else ()))
        (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        assert grad.shape == shape


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_an_impossible_class(label_smoothing: float, impl: str) -> None:
    """-inf at the label, or anywhere under smoothing: an infinite loss with a finite gradient."""
    x = torch.tensor([[0.0, LN3, -INF]], requires_grad=True)
    for label in (1, 2):
        infinite = label == 2 or label_smoothing > 0
        loss = bound(impl).cross_entropy(x, torch.tensor([label]), label_smoothing=label_smoothing)
        assert loss.isinf() if infinite else loss.isfinite()
        (grad,) = torch.autograd.grad(loss, x)
        expected = torch.tensor([[1 / 4, 3 / 4, 0]], dtype=torch.float64) - label_smoothing / 3
        expected[0, label] -= 1 - label_smoothing
        assert_value(grad, expected)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("nonsense", [NAN, INF, "all -inf"])
def test_nonsense_poisons_its_own_row(nonsense: float | str, impl: str) -> None:
    clean = torch.randn(5, 40)
    dirty = clean.clone()
    if isinstance(nonsense, str):
        dirty[2] = -INF
    else:
        dirty[2, 17] = nonsense
    y = torch.tensor([3, -100, 3, 39, 0])
    results = []
    for x in (clean, dirty):
        x.requires_grad_()
        loss = bound(impl).cross_entropy(x, y, reduction="none")
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    (loss, grad), (dirty_loss, dirty_grad) = results
    others = torch.arange(5) != 2
    assert not dirty_loss[2].isfinite()
    assert torch.equal(loss[others], dirty_loss[others])
    assert torch.equal(grad[others], dirty_grad[others])


@pytest.mark.parametrize("V", [8, pytest.param(40000, id="in blocks")])
@pytest.mark.parametrize("nonsense", [NAN, INF])
def test_nonsense_shows_where_every_class_weighs_nothing(nonsense: float, V: int) -> None:
    """In one block of columns as in several: beside a gradient of NaN a loss of 0 hides it."""
    x = torch.zeros(2, V)
    x[0, 3] = nonsense
    x.requires_grad_()
    nothing = torch.zeros(2, V)
    for labels, options in (
        (nothing, {}),
        (torch.tensor([0, 1]), {"weight": nothing[0], "label_smoothing": 0.1}),
    ):
        loss = bound("torch").cross_entropy(x, labels, reduction="none", **options)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert loss[0].isnan() and grad[0].isnan().all()
        assert loss[1] == 0 and not grad[1].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_refusals(impl: str) -> None:
    x, y = torch.randn(3, 8), torch.tensor([0, 1, 2])
    ce = bound(impl).cross_entropy
    for error, call in [
        (ValueError, lambda: ce(x, y[:2])),
        (ValueError, lambda: ce(x, y[:, None])),
        (ValueError, lambda: ce(x, y.float())),  # probabilities have the logits' shape
        (TypeError, lambda: ce(x.int(), y)),
        (ValueError, lambda: ce(x, y, reduction="average")),
        (ValueError, lambda: ce(x, y, valid_vocab=9)),
        (ValueError, lambda: ce(x, y, valid_vocab=0)),
        (ValueError, lambda: ce(x, y, label_smoothing=1.1)),
        (ValueError, lambda: ce(x, y, z_loss=-1.0)),
        (ValueError, lambda: ce(x, y, softcap=0.0)),
    ]:
        with pytest.raises(error, match=r", got .*; "):  # what came, and what to do
            call()
