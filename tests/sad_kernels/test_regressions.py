# One test per fault that was found somewhere: a list grows long, and its entries do not interact.
"""Faults that were shipped, here or by others: each test would have caught its own.

The link in a docstring is where the fault was found. A test that has no fault of ours behind it
was seen to fail with the fault planted.
"""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from sad_kernels import (
    DistillOutput,
    Head,
    Objective,
    Outcomes,
    TeacherHidden,
    TeacherLogits,
    _tiles,
    reference,
)
from sad_kernels.objective import DIVERGENCES, Divergence
from support.allocations import peak_bytes
from support.oracle import (
    IMPLS,
    SLOW,
    assert_value,
    assert_zero,
    bound,
    dtypes_of,
    judge,
    measure,
    measure_oracle,
)
from support.problems import plain
from torch import Tensor

NAN, INF = math.nan, math.inf
HALVES = (torch.float16, torch.bfloat16)
ON_LOGITS = ("cross_entropy", "kl_div", "distill_loss")
LINEAR = ("linear_cross_entropy", "linear_distill_loss")

every_implementation = pytest.mark.parametrize("impl", IMPLS)
every_op = pytest.mark.parametrize("op", ON_LOGITS + LINEAR)
ops_on_logits = pytest.mark.parametrize("op", ON_LOGITS)
linear_ops = pytest.mark.parametrize("op", LINEAR)


# --- Rounding ------------------------------------------------------------------------------------


@pytest.mark.few(3)
@every_implementation
@ops_on_logits
@pytest.mark.parametrize("dtype", HALVES)
def test_p_is_rounded_after_the_subtraction(op: str, dtype: torch.dtype, impl: str) -> None:
    """``p`` rounded to 16 bits before ``p - 1``: all of the gradient is wrong at p = 0.999.

    https://github.com/linkedin/Liger-Kernel/pull/1329
    """
    judge(plain(op, dtype, distribution="peaked", N=40, ce_weight=1.0), bound(impl))
    if op != "cross_entropy":  # near a sure teacher p - q is as small
        judge(plain(op, dtype, distribution="peaked_near", N=40, ce_weight=1.0), bound(impl))


@pytest.mark.few(14)
@every_implementation
@ops_on_logits
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("upstream", [0.01, 0.03, 0.1, 0.7])
def test_the_gradient_is_rounded_once(
    op: str, dtype: torch.dtype, upstream: float, impl: str
) -> None:
    """A gradient kept in 16 bits and scaled later is rounded twice, which no tolerance shows.

    https://github.com/NVIDIA/TransformerEngine/pull/3193
    """
    if impl == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("sums fp32 logits in another order than 16-bit ones: see test_gpu.py")
    narrow = plain(op, dtype, distribution="randn5", label_smoothing=0.1)
    narrow = replace(narrow, upstream=torch.tensor(upstream))
    wide = replace(narrow, leaves={name: x.float() for name, x in narrow.leaves.items()})
    ops = bound(impl)
    once = measure(wide, ops)["dlogits"].to(dtype)
    assert torch.equal(measure(narrow, ops)["dlogits"], once)


@pytest.mark.few(2)
@every_implementation
@linear_ops
@pytest.mark.parametrize(
    ("chunk_bytes", "dtype"),
    [
        pytest.param(size, dtype, id=f"{size}-dtype{i}", marks=marks)
        for i, dtype in enumerate(HALVES)
        for size, marks in ((None, pytest.mark.slow), (4096, ()), (1, ()))
    ],
)
def test_the_weight_gradient_does_not_depend_on_chunks(
    op: str,
    dtype: torch.dtype,
    chunk_bytes: int | None,
    impl: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """dW summed in bf16 over chunks: 1.3 times the error at 16 chunks, 7 times at 1024.

    https://github.com/linkedin/Liger-Kernel/issues/512
    https://github.com/linkedin/Liger-Kernel/pull/1391
    https://github.com/apple/ml-cross-entropy/issues/14
    """
    if chunk_bytes == 1:  # a chunk for each row, of the kernels' too
        monkeypatch.setattr(_tiles, "GRADIENT_BLOCKS", 1)
    problem = plain(op, dtype, N=64, V=33, distribution="zipf", wrt="weight,bias")
    judge(problem, bound(impl, chunk_bytes))


@every_implementation
@every_op
@pytest.mark.parametrize("dtype", HALVES)
def test_losses_are_float32(op: str, dtype: torch.dtype, impl: str) -> None:
    """Per-token losses in 16 bits, as in the heads of Liger-Kernel, keep three digits."""
    for reduction in ("mean", "none"):
        outputs = measure(plain(op, dtype, reduction=reduction), bound(impl))
        for name, value in outputs.items():
            assert value.dtype == (dtype if name.startswith("d") else torch.float32), name


@pytest.mark.few(2)
@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_no_probability_exceeds_one(dtype: torch.dtype, impl: str) -> None:
    """The label's logit must be the number that entered the sum, or confident rows fall below 0.

    https://github.com/apple/ml-cross-entropy/pull/55
    """
    x = torch.randn(64, 97)
    y = torch.arange(64) % 97
    x[torch.arange(64), y] = torch.linspace(8, 90, 64)
    for offset in (0.0, 1000.0):
        loss = bound(impl).cross_entropy((x + offset).to(dtype), y, reduction="none")
        assert (loss >= 0).all()
    hidden, weight = x[:, :24].to(dtype), torch.randn(97, 24).to(dtype)
    loss = bound(impl).linear_cross_entropy(
        hidden, weight, (hidden @ weight.T).argmax(-1), reduction="none", logit_scale=30.0
    )
    assert (loss >= 0).all()


# --- Upstream gradients --------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("op", ["cross_entropy", "kl_div", "linear_cross_entropy"])
@pytest.mark.parametrize("upstream", ["random", "stride0", "one"])
def test_every_row_has_its_own_upstream(op: str, upstream: str, impl: str) -> None:
    """The upstream of row 0 used for all, hidden where it is 1; and stride 0 read past its end.

    https://github.com/NVIDIA/TransformerEngine/pull/2139
    https://github.com/NVIDIA/Megatron-LM/issues/1750
    https://github.com/linkedin/Liger-Kernel/issues/968
    https://github.com/ROCm/TransformerEngine/pull/623
    """
    for layout in ("contiguous", "transposed"):
        problem = plain(
            op,
            torch.float32,
            reduction="none",
            upstream=upstream,
            ignore="first",
            layout=layout,
            N=6,
        )
        judge(problem, bound(impl))


@every_implementation
@pytest.mark.parametrize("op", ["cross_entropy", "kl_div", "linear_cross_entropy"])
def test_summing_rows_is_the_sum(op: str, impl: str) -> None:
    """``.sum().backward()`` passes on an expanded scalar. https://github.com/ROCm/TransformerEngine/pull/623"""
    rows = plain(op, torch.float32, reduction="none", ignore="some")
    one = torch.tensor(1.0)
    summed = replace(rows, call=lambda ops, x: rows.call(ops, x).sum(), upstream=one)
    ones = replace(rows, upstream=torch.ones_like(rows.upstream))
    ours, apart = measure(summed, bound(impl)), measure(ones, bound(impl))
    assert all(torch.equal(ours[name], x) for name, x in apart.items() if name != "loss")
    scale = torch.as_tensor(rows.scales["loss"]).sum()
    assert_value(ours["loss"], measure_oracle(summed)["loss"], scale)


@every_implementation
@every_op
def test_inputs_survive_and_graphs_can_be_used_twice(op: str, impl: str) -> None:
    """Gradients written over the logits: whatever else reads them gets nonsense.

    https://github.com/linkedin/Liger-Kernel/issues/343
    https://github.com/linkedin/Liger-Kernel/pull/1251
    https://github.com/modelscope/ms-swift/pull/10130
    """
    problem, ops = plain(op, torch.float32), bound(impl)
    leaves = {
        name: x.clone().requires_grad_(name in problem.wrt) for name, x in problem.leaves.items()
    }
    before = {name: x.detach().clone() for name, x in leaves.items()}
    wrt = [leaves[name] for name in problem.wrt]

    probabilities = wrt[0].softmax(-1).square().sum()  # saves its result, computed before ours
    first, second = (_loss(problem.call(ops, leaves)) for _ in range(2))
    once = torch.autograd.grad(first, wrt, retain_graph=True)
    again = torch.autograd.grad(first, wrt)
    both = torch.autograd.grad(second + probabilities, wrt)
    own = torch.autograd.grad(wrt[0].softmax(-1).square().sum(), wrt[0])[0]

    assert all(torch.equal(x, leaves[name]) for name, x in before.items())
    assert all(x._version == 0 for x in leaves.values())
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert torch.equal(both[0], once[0] + own)
    assert all(torch.equal(a, b) for a, b in zip(both[1:], once[1:], strict=True))


def _loss(result: Tensor | DistillOutput) -> Tensor:
    return result.loss if isinstance(result, DistillOutput) else result


# --- Rows that do not count ----------------------------------------------------------------------


@every_implementation
@every_op
def test_ignored_rows_are_written(op: str, impl: str) -> None:
    """Rows left unwritten on an early return: 61.7 instead of 21.4. Fresh memory is NaN here.

    https://github.com/linkedin/Liger-Kernel/pull/1338
    """
    for ignore in ("some", "first", "all"):
        problem = plain(op, torch.float32, ignore=ignore, reduction="none", N=7)
        judge(problem, bound(impl))


@pytest.mark.few(19)
@every_implementation
@every_op
@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 97, 127, 128, 2**31 - 1])
def test_ignored_rows_are_as_good_as_absent(op: str, ignore_index: int, impl: str) -> None:
    """``ignore_index`` unused, counted in the mean, or matched by a padded column of a tile.

    https://github.com/linkedin/Liger-Kernel/pull/974
    https://github.com/NVIDIA/TransformerEngine/pull/2476
    https://github.com/apple/ml-cross-entropy/pull/59
    """
    s, t = 3 * torch.randn(9, 97), 3 * torch.randn(9, 97)
    y = torch.tensor([5, 0, 96, 7, 8, 9, 10, 11, 12])
    y[::4] = ignore_index
    keep = y != ignore_index
    weight, objective = torch.randn(97, 97), Objective(ce_weight=1.0, temperature=2.0)

    ops = bound(impl)

    def call(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        given, teacher = {"ignore_index": ignore_index}, TeacherLogits(t)
        match op:
            case "cross_entropy":
                return ops.cross_entropy(s, y, **given)
            case "kl_div":
                return ops.kl_div(s, t, labels=y, **given)
            case "distill_loss":
                return ops.distill_loss(s, y, teacher, objective, **given).loss
            case "linear_cross_entropy":
                return ops.linear_cross_entropy(s, weight, y, **given)
            case _:
                head = Head(weight)
                return ops.linear_distill_loss(s, head, y, teacher, objective, **given).loss

    s.requires_grad_()
    loss, filtered = call(s, t, y), call(s[keep], t[keep], y[keep])
    assert_value(loss, filtered.detach().double(), scale=1 + 4 * 10)  # T^2 R
    grads = [torch.autograd.grad(x, s)[0] for x in (loss, filtered)]
    assert torch.equal(*grads) and grads[0][keep].any(-1).all()


@every_implementation
@every_op
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_ignored_rows_may_hold_anything(op: str, junk: float, impl: str) -> None:
    """A NaN gradient from an ignored row of -inf, in any input. https://github.com/huggingface/trl/pull/5594"""
    for teacher in ("logits", "hidden", "bucket"):
        problem = plain(op, torch.float32, ignore="some", teacher=teacher, z_loss=0.01, N=4)
        dirty = {}
        for name, x in problem.leaves.items():
            by_row = name in ("logits", "teacher", "hidden", "teacher_hidden", "log_probs")
            dirty[name] = x.nan_to_num(junk, neginf=-INF) if by_row and x.isnan().any() else x
        assert any(x.isnan().any() or x.isinf().any() for x in dirty.values())
        judge(replace(problem, leaves=dirty), bound(impl))


# --- Labels --------------------------------------------------------------------------------------


@pytest.mark.few(16)
@every_implementation
@every_op
@pytest.mark.parametrize("label", [97, 90, -1, 2**40, -(2**40)])
def test_a_foreign_label_poisons_its_row(op: str, label: int, impl: str) -> None:
    """Such a label reads foreign memory, or matches a padded column; 90 is past ``valid_vocab``.

    https://github.com/pytorch/pytorch/pull/195829
    https://github.com/apple/ml-cross-entropy/pull/59
    """
    s, t = torch.randn(5, 97), torch.randn(5, 97)
    s[:, 90:] = t[:, 90:] = 100.0
    y = torch.tensor([3, 89, 0, 50, 7])
    bad = y.clone()
    bad[2] = label
    weight, objective = torch.randn(97, 97), Objective(ce_weight=1.0, temperature=2.0)
    ops, teacher = bound(impl), TeacherLogits(t, valid_vocab=90)

    def rows(s: Tensor, y: Tensor) -> Tensor:
        match op:
            case "cross_entropy":
                return ops.cross_entropy(s, y, valid_vocab=90, reduction="none")
            case "kl_div":
                return ops.kl_div(s, t, labels=y, valid_vocab=90, reduction="none")
            case "distill_loss":
                return ops.distill_loss(s, y, teacher, objective).loss
            case "linear_cross_entropy":
                return ops.linear_cross_entropy(s, weight, y, valid_vocab=90, reduction="none")
            case _:
                head = Head(weight, valid_vocab=90)
                return ops.linear_distill_loss(s, head, y, teacher, objective).loss

    s.requires_grad_()
    clean, poisoned = rows(s, y), rows(s, bad)
    grads = [torch.autograd.grad(x.sum(), s)[0] for x in (clean, poisoned)]
    others = torch.arange(5) != 2
    if clean.ndim:
        assert poisoned.isnan().tolist() == [False, False, True, False, False]
        assert torch.equal(clean[others], poisoned[others])
    else:
        assert poisoned.isnan()
    assert torch.equal(grads[0][others], grads[1][others])


@every_implementation
@every_op
def test_layouts_are_only_layouts(op: str, impl: str) -> None:
    """Unaligned labels, and rows whose inner stride is 1 but which do not touch, were misread.

    https://github.com/NVIDIA/TransformerEngine/pull/2746
    """
    for layout in ("padded", "transposed", "offset"):
        for label_layout in ("strided", "shifted"):
            for label_dtype in (torch.int32, torch.int64):
                problem = plain(
                    op,
                    torch.float32,
                    layout=layout,
                    label_layout=label_layout,
                    label_dtype=label_dtype,
                    reduction="none",
                    ignore="some",
                    N=4,
                )
                judge(problem, bound(impl))


@every_implementation
@every_op
@pytest.mark.parametrize("V", [1, 2, 31, 33])
def test_small_vocabularies(op: str, V: int, impl: str) -> None:
    """https://github.com/unslothai/unsloth/pull/3503"""
    for dtype in (torch.float32, torch.bfloat16):
        problem = plain(op, dtype, V=V, N=5, distribution="randn1", divergence="jsd")
        if V > 1:
            judge(problem, bound(impl))
            continue
        outputs = measure(problem, bound(impl))  # one class: nothing to learn
        assert torch.equal(outputs["loss"], torch.tensor(0.0))
        for name in problem.wrt:
            assert not outputs[f"d{name}"].any()


# --- Divergences ---------------------------------------------------------------------------------


@pytest.mark.few(5)
@every_implementation
@pytest.mark.parametrize("op", ["kl_div", "distill_loss"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_probabilities_that_underflow(op: str, divergence: Divergence, impl: str) -> None:
    """A JSD of NaN where both log-probabilities are below -104.

    https://github.com/linkedin/Liger-Kernel/issues/1453
    """
    for dtype in (torch.float32, *HALVES):
        for temperature in (0.5, 1.0):
            problem = plain(
                op,
                dtype,
                N=3 if impl in SLOW else 8,
                distribution="spread300",
                temperature=temperature,
                divergence=divergence,
            )
            judge(problem, bound(impl))


@every_implementation
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bfloat16_teacher_makes_nothing_negative(divergence: Divergence, impl: str) -> None:
    """A negative JSD beside a 16-bit teacher. https://github.com/modelscope/ms-swift/issues/10156"""
    N = 4 if impl in SLOW else 64
    t = (3 * torch.randn(N, 300)).bfloat16()
    for noise in (0.0, 1e-6, 1e-4, 1e-2):
        s = t.float() + noise * torch.randn(N, 300)
        value = bound(impl).kl_div(s, t, divergence=divergence, reduction="none")
        span = float(s.max() - s.min())
        assert (value >= -8 * 2.0**-23 * span).all()  # the band of the rule
    judge(
        plain("kl_div", torch.float32, teacher_dtype=torch.bfloat16, divergence=divergence),
        bound(impl),
    )


@every_implementation
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_weight_and_no_temperature_is_hidden(divergence: Divergence, impl: str) -> None:
    """A hidden 0.5 * CE, and a temperature applied to the CE as well: 0.342 instead of 0.297.

    https://github.com/huggingface/trl/pull/5731
    """
    ops = bound(impl)
    s, t, y = 3 * torch.randn(8, 97), 3 * torch.randn(8, 97), torch.arange(8)
    shared: Any = {"divergence": divergence, "temperature": 4.0}
    both = Objective(ce_weight=0.3, kd_weight=0.7, **shared)
    same = ops.distill_loss(s, y, TeacherLogits(s.clone()), both)
    assert_zero(same.kd, scale=8 * 16.0 * 6)
    assert float(same.agree) == 8
    ce, kd = (
        ops.distill_loss(s, y, TeacherLogits(t), Objective(ce_weight=a, kd_weight=b, **shared)).loss
        for a, b in ((1.0, 0.0), (0.0, 1.0))
    )
    assert_value(ce, reference.cross_entropy(s.double(), y), scale=1.0)
    assert_value(kd, reference.kl_div(s.double(), t.double(), **shared), scale=16.0 * 6)
    joint = ops.distill_loss(s, y, TeacherLogits(t), both).loss
    assert_value(joint, 0.3 * ce.double() + 0.7 * kd.double(), scale=16.0 * 6)


@every_implementation
def test_beta_is_the_teachers_share(impl: str) -> None:
    """Reversed, JSD tends to the other KL. https://github.com/huggingface/trl/pull/3043"""
    dtype = dtypes_of(impl)[0]
    s, t = torch.randn(4, 33, dtype=dtype), 2 * torch.randn(4, 33, dtype=dtype)

    def value(divergence: Divergence, beta: float = 0.5) -> float:
        return float(bound(impl).kl_div(s, t, divergence=divergence, beta=beta))

    b = 1e-6 if dtype == torch.float64 else 1e-3  # of a smaller JSD float32 keeps no three digits
    forward, reverse = value("forward_kl"), value("reverse_kl")
    assert abs(forward - reverse) > 0.1 * forward
    for limit, approached in [
        (forward, value("jsd", b) / b),
        (reverse, value("jsd", 1 - b) / b),
        (forward, value("skew_forward_kl", b)),
        (reverse, value("skew_reverse_kl", b)),
    ]:
        assert abs(approached - limit) < 3 * b * -math.log(b) * limit  # of order b log b


@pytest.mark.few(1)
@every_implementation
@linear_ops
def test_the_normaliser_belongs_to_the_window(op: str, impl: str) -> None:
    """Means of micro-batches averaged: unequal lengths get unequal weights.

    https://github.com/huggingface/trl/pull/6006
    https://github.com/modelscope/ms-swift/pull/6663
    """
    lengths = [1, 2, 40, 3, 0, 17, 5, 12]  # one micro-batch has no target at all
    total = sum(lengths)
    dtype = dtypes_of(impl)[0]
    hidden, t, weight = torch.randn(8, 40, 6), torch.randn(8, 40, 33), torch.randn(33, 6)
    y = torch.randint(33, (8, 40)).masked_fill(
        torch.arange(40) >= torch.tensor(lengths)[:, None], -100
    )
    objective = Objective(ce_weight=0.5, temperature=2.0)

    def loss(ops: Any, weight: Tensor, batch: slice, num_items: Any) -> Tensor:
        h = hidden[batch].to(weight.dtype)
        if op == "linear_cross_entropy":
            out = ops.linear_cross_entropy(h, weight, y[batch], reduction="sum")
            return out / num_items
        teacher = TeacherLogits(t[batch].to(weight.dtype))
        head = Head(weight)
        return ops.linear_distill_loss(
            h, head, y[batch], teacher, objective, num_items=num_items
        ).loss

    exact_weight = weight.double().requires_grad_()
    whole = loss(reference, exact_weight, slice(8), total)
    (exact,) = torch.autograd.grad(whole, exact_weight)
    weight = weight.to(dtype).requires_grad_()
    for num_items in (total, torch.tensor(total)):
        parts = [loss(bound(impl), weight, slice(i, i + 1), num_items) for i in range(8)]
        assert_value(torch.stack(parts).sum(), whole.detach(), scale=100.0)
        (grad,) = torch.autograd.grad(torch.stack(parts).sum(), weight)
        assert_value(grad, exact, scale=100.0)


# --- Autograd ------------------------------------------------------------------------------------


@pytest.mark.few(29)
@every_implementation
@linear_ops
@pytest.mark.parametrize("wrt", ["", "hidden", "weight", "bias", "hidden,bias", "hidden,weight"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_parts_and_autocast(
    op: str, wrt: str, autocast: torch.dtype | None, dtype: torch.dtype, impl: str
) -> None:
    """A frozen head, no_grad and AMP used to crash, or to compute in 16 bits.

    https://github.com/linkedin/Liger-Kernel/pull/931
    https://github.com/linkedin/Liger-Kernel/pull/1283
    """
    problem = plain(op, dtype, wrt=wrt, ignore="some")
    ops = bound(impl)

    def under_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                return function(*args, **options)

        return call

    judge(problem, SimpleNamespace(**{op: under_autocast(getattr(ops, op))}))


@every_implementation
@pytest.mark.parametrize("op", ["distill_loss", "linear_distill_loss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teachers_head_keeps_its_precision_under_autocast(
    op: str, dtype: torch.dtype, impl: str
) -> None:
    """Its logits came from a 16-bit product beside a student whose logits are there.

    https://github.com/linkedin/Liger-Kernel/pull/1283
    """
    ops = bound(impl)

    def under_autocast(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return getattr(ops, op)(*args, **options)

    problem = plain(op, torch.float32, teacher="hidden")
    judge(problem, SimpleNamespace(**{op: under_autocast}))


@every_implementation
@linear_ops
def test_a_tied_head_gets_its_gradient_once(op: str, impl: str) -> None:
    """Doubled where the head is the embedding too, or where ``.grad`` is there already.

    https://github.com/unslothai/unsloth-zoo/pull/892
    """
    ids, y = torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([1, 4, 1, -100, 9, 2])
    weight, before, t = torch.randn(33, 8), torch.randn(33, 8), torch.randn(6, 33)

    def gradient(ops: Any, dtype: torch.dtype) -> Tensor:
        tied = weight.to(dtype, copy=True).requires_grad_()
        tied.grad = before.to(dtype, copy=True)
        for _ in range(2):
            hidden = F.embedding(ids, tied).tanh()
            if op == "linear_cross_entropy":
                loss = ops.linear_cross_entropy(hidden, tied, y)
            else:
                teacher, objective = TeacherLogits(t.to(dtype)), Objective(ce_weight=0.5)
                loss = ops.linear_distill_loss(hidden, Head(tied), y, teacher, objective).loss
            loss.backward()
        assert tied.grad is not None
        return tied.grad

    ours = gradient(bound(impl), dtypes_of(impl)[0])
    assert_value(ours, gradient(reference, torch.float64), scale=10.0)


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from support.oracle import assert_value
from sad_kernels import linear_cross_entropy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(33, 8)

    def forward(self, ids, y, num_items):
        hidden = self.embedding(ids).tanh()
        loss = linear_cross_entropy(hidden, self.embedding.weight, y, reduction="sum", impl=impl)
        return loss / num_items

impl, rank, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
on_gpu = impl == "triton" and torch.cuda.is_available()
torch.set_default_device("cuda" if on_gpu else "cpu")
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
ids, y = torch.arange(12) % 7, torch.arange(12) * 5 % 33
y[1::4] = -100
num_items = int((y != -100).sum())
mine = slice(0, 3) if rank == 0 else slice(3, 12)  # unequal shares of the batch
shared, alone = DistributedDataParallel(Tied()), Tied()
for _ in range(2):  # the second time there is a gradient already
    (2 * shared(ids[mine], y[mine], num_items)).backward()  # the ranks' gradients are averaged
(once,) = torch.autograd.grad(alone(ids, y, num_items), alone.parameters())
torch.set_default_device("cpu")
assert_value(shared.module.embedding.weight.grad.cpu(), 2 * once.double().cpu(), scale=10.0)
dist.destroy_process_group()
"""


@every_implementation
def test_two_ranks_have_the_gradient_of_their_joined_batch(impl: str, tmp_path: Path) -> None:
    """The same through ``DistributedDataParallel``, whose hooks see what autograd returns.

    https://github.com/unslothai/unsloth-zoo/pull/892
    """
    arguments = [sys.executable, "-W", "ignore", "-c", TWO_RANKS, impl]
    ranks = [
        subprocess.Popen(
            [*arguments, str(rank), str(tmp_path / "meet")], cwd=Path(__file__).parents[1]
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in ranks] == [0, 0]


@every_implementation
@every_op
def test_evaluation_is_training_without_gradients(op: str, impl: str) -> None:
    """The same batch, the same number, bit for bit; and a CE that both ops agree on.

    https://github.com/linkedin/Liger-Kernel/pull/888
    https://github.com/axolotl-ai-cloud/axolotl/pull/3271
    """
    problem, ops = plain(op, torch.bfloat16, ignore="some"), bound(impl)
    leaves = dict(problem.leaves)
    with torch.no_grad():
        evaluated = problem.call(ops, leaves)
    trained = problem.call(
        ops, {name: x.detach().requires_grad_(name in problem.wrt) for name, x in leaves.items()}
    )
    assert torch.equal(_loss(evaluated), _loss(trained))
    if isinstance(evaluated, DistillOutput) and isinstance(trained, DistillOutput):
        assert all(torch.equal(a, b) for a, b in zip(evaluated, trained, strict=True))


@every_implementation
def test_the_ce_of_a_distillation_is_the_cross_entropy(impl: str) -> None:
    """https://github.com/axolotl-ai-cloud/axolotl/pull/3271: a thousandfold, in evaluation only."""
    ops = bound(impl)
    s, t, y = 3 * torch.randn(8, 97), torch.randn(8, 97), torch.arange(8) - 1
    y[0] = -100
    out = ops.distill_loss(s, y, TeacherLogits(t), Objective(temperature=4.0))
    alone = reference.cross_entropy(s.double(), y)
    assert_value(out.ce / out.num_tokens, alone, scale=1.0)


@pytest.mark.few(3)
@every_implementation
@linear_ops
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("wrt", ["bias", "hidden,weight,bias"])
def test_the_bias_has_its_gradient(op: str, dtype: torch.dtype, wrt: str, impl: str) -> None:
    """https://github.com/apple/ml-cross-entropy/pull/53"""
    for options in OF_HEADS:
        sizes = CHUNKS if impl not in SLOW or not options else CHUNKS[-1:]
        judge_bias(op, dtype, wrt, impl, options, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("impl", SLOW)
@linear_ops
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("wrt", ["bias", "hidden,weight,bias"])
def test_the_bias_has_its_gradient_in_chunks_of_any_size(
    op: str, dtype: torch.dtype, wrt: str, impl: str
) -> None:
    for options in OF_HEADS:
        judge_bias(op, dtype, wrt, impl, options, CHUNKS)


OF_HEADS: tuple[dict[str, Any], ...] = ({}, {"logit_scale": 0.25}, {"softcap": 10.0}, {"cut": True})
CHUNKS = (None, 20_000, 4_000)  # the last cuts the rows as well


def judge_bias(
    op: str,
    dtype: torch.dtype,
    wrt: str,
    impl: str,
    options: dict[str, Any],
    sizes: Sequence[int | None],
) -> None:
    N = 6 if impl in SLOW else 40
    problem = plain(op, dtype, wrt=wrt, N=N, ignore="some", **options)
    for chunk_bytes in sizes:
        judge(problem, bound(impl, chunk_bytes))


# --- The vocabulary ------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("garbage", [0.0, 50.0, NAN, INF])
def test_padding_is_no_probability(garbage: float, impl: str) -> None:
    """Student 151936 wide, teacher 152064, 151665 real ids: padding with logit 0 is mass.

    https://github.com/huggingface/trl/issues/2215
    """
    ops, valid = bound(impl), 151665
    wide_s, wide_t = torch.randn(2, 151936), torch.randn(2, 152064)
    # Views with the same pitch: a GPU reads rows that begin elsewhere by other code, and sums them
    # in another order.
    s, t = wide_s.clone()[:, :valid], wide_t.clone()[:, :valid]
    wide_s[:, valid:], wide_t[:, valid:] = garbage, garbage
    y = torch.tensor([0, valid - 1])
    objective = Objective(ce_weight=1.0, label_smoothing=0.1, z_loss=0.01, divergence="jsd")
    results = []
    for student, teacher in ((s, t), (wide_s, wide_t)):
        student.requires_grad_()
        out = ops.distill_loss(student, y, TeacherLogits(teacher, valid), objective)
        kl = ops.kl_div(student, teacher, valid_vocab=valid, reduction="none")
        ce = ops.cross_entropy(student, y, valid_vocab=valid, reduction="none")
        (grad,) = torch.autograd.grad(out.loss + (kl + ce).sum(), student)
        assert not grad[:, valid:].any()
        results.append([*out, kl, ce, grad[:, :valid]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_implementation
@pytest.mark.parametrize("garbage", [50.0, NAN])
def test_padded_heads_are_cut(garbage: float, impl: str) -> None:
    """The same for the rows of a head. https://github.com/huggingface/trl/issues/2215"""
    ops, valid = bound(impl), 90
    hidden = torch.randn(4, 8)
    weight, teacher_weight = torch.randn(valid, 8), torch.randn(valid, 8)
    y, teacher_hidden = torch.tensor([0, 1, 89, -100]), torch.randn(4, 8)
    results = []
    for pad in (0, 38):
        rows = torch.full((pad, 8), garbage)
        w = torch.cat((weight, rows)).requires_grad_()
        teacher = TeacherHidden(
            teacher_hidden, Head(torch.cat((teacher_weight, rows, rows)), valid_vocab=valid)
        )
        h = hidden.clone().requires_grad_()
        head = Head(w, valid_vocab=valid)
        out = ops.linear_distill_loss(h, head, y, teacher, Objective(ce_weight=1.0))
        dh, dw = torch.autograd.grad(out.loss, (h, w))
        assert not dw[valid:].any()
        results.append([*out, dh, dw[:valid]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_implementation
@pytest.mark.parametrize("hole", ["first tile", "last tile", "all but one", "middle"])
@pytest.mark.parametrize("V", [128, 40_000])
def test_a_whole_tile_of_impossible_tokens(hole: str, V: int, impl: str) -> None:
    """A running maximum of -inf gives exp(-inf + inf). https://github.com/Dao-AILab/flash-attention/issues/1930"""
    at = {
        "first tile": slice(0, V // 2),
        "last tile": slice(V // 2, V),
        "all but one": slice(0, V - 1),
        "middle": slice(V // 4, V // 2),
    }[hole]
    ops = bound(impl)
    s, t = torch.randn(3, V), torch.randn(3, V)
    y = torch.full((3,), 1 if hole == "last tile" else V - 1)
    for x in (s, t):
        x[0, at] = -INF
    for divergence in get_args(Divergence):
        objective = Objective(ce_weight=1.0, temperature=2.0, divergence=divergence)
        results = []
        for dtype, used in ((torch.float32, ops), (torch.float64, reference)):
            x = s.to(dtype).requires_grad_()
            out = used.distill_loss(x, y, TeacherLogits(t.to(dtype)), objective)
            results.append((out.loss.detach(), torch.autograd.grad(out.loss, x)[0]))
        (loss, grad), (exact, exact_grad) = results
        assert_value(loss, exact, scale=1 + 4 * 5)
        assert_value(grad, exact_grad, scale=(1 + 2 * 5) / 3)

    bias = torch.zeros(V)
    bias[at] = -INF
    if V < 1000:
        hidden, weight = torch.randn(3, 8), torch.randn(V, 8)
        linear = bound(impl, 20_000).linear_cross_entropy(hidden, weight, y, bias=bias)
        exact = reference.linear_cross_entropy(
            hidden.double(), weight.double(), y, bias=bias.double()
        )
        if exact.any():
            assert_value(linear, exact, scale=10.0)
        else:
            assert_zero(linear, scale=10.0)


@every_implementation
def test_a_row_of_only_impossible_tokens_is_alone(impl: str) -> None:
    """It has no loss, its neighbours do. https://github.com/Dao-AILab/flash-attention/issues/1930"""
    s, t, y = torch.randn(3, 128), torch.randn(3, 128), torch.arange(3)
    clean = bound(impl).kl_div(s, t, reduction="none")
    s[1] = -INF
    loss = bound(impl).cross_entropy(s, y, reduction="none")
    kd = bound(impl).kl_div(s, t, reduction="none")
    assert not loss[1].isfinite() and not kd[1].isfinite()
    assert torch.equal(kd[::2], clean[::2]) and loss[::2].isfinite().all()


# --- Chunks and memory ---------------------------------------------------------------------------


@every_implementation
@linear_ops
@pytest.mark.parametrize("chunk_bytes", [1, 3, 4096, 2**40])
def test_any_chunk_size(op: str, chunk_bytes: int, impl: str) -> None:
    """A heuristic divided by zero. https://github.com/unslothai/unsloth-zoo/pull/432"""
    for options in ({"N": 3, "V": 33}, {"N": 1, "V": 2, "D": 1}):
        judge(plain(op, torch.float32, **options), bound(impl, chunk_bytes))


@every_implementation
@linear_ops
def test_no_chunk_bytes_at_all_are_refused(op: str, impl: str) -> None:
    """https://github.com/unslothai/unsloth-zoo/pull/432: free memory, rounded down, was 0."""
    problem = plain(op, torch.float32)
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1, got 0"):
        problem.call(bound(impl, chunk_bytes=0), dict(problem.leaves))


@pytest.mark.parametrize("op", LINEAR)
def test_memory_of_the_torch_path(op: str) -> None:
    """Never N x V, and never a temporary as large as the weight: gradients and a few chunks.

    https://github.com/linkedin/Liger-Kernel/issues/1323: V x D once per chunk.
    """
    D, chunk_bytes = 32, 4 << 20  # smaller chunks make more events than the profiler likes

    def peak(N: int, V: int) -> int:
        hidden, weight = (
            torch.randn(N, D, requires_grad=True),
            torch.randn(V, D, requires_grad=True),
        )
        y = torch.randint(V, (N,))
        teacher = TeacherHidden(torch.randn(N, D), Head(torch.randn(V, D)))

        def run() -> None:
            ops = bound("torch", chunk_bytes)
            if op == "linear_cross_entropy":
                loss = ops.linear_cross_entropy(hidden, weight, y)
            else:
                objective = Objective(ce_weight=0.5, temperature=2.0)
                loss = ops.linear_distill_loss(hidden, Head(weight), y, teacher, objective).loss
            torch.autograd.grad(loss, (hidden, weight))

        run()  # whatever is allocated once
        return peak_bytes(run)

    N, V = 512, 16384
    base, more_columns, more_rows = peak(N, V), peak(N, 2 * V), peak(2 * N, V)
    gradients = 4 * D * (N + V)
    assert base <= gradients + 2 * chunk_bytes + 256 * N
    assert base < 4 * N * V / 3
    assert more_columns - base <= 4 * D * V + chunk_bytes / 4
    assert more_rows - base <= 4 * D * N + 256 * N + chunk_bytes / 4


class Grids:
    """Stands for a kernel and notes the grid of every launch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.seen.append(grid)


@pytest.mark.skipif("triton" not in IMPLS, reason="triton is not installed")
def test_rows_lie_on_the_first_axis_of_every_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other axes end at 65535 programs, of which the interpreter knows nothing.

    https://github.com/linkedin/Liger-Kernel/pull/1294
    """
    from sad_kernels._rows import LossSpec, RowTargets
    from sad_kernels._triton import launch, scale

    kernels = {name: Grids() for name in vars(launch) if name.endswith("_kernel")}
    assert len(kernels) == 4
    for name, grids in kernels.items():
        monkeypatch.setattr(launch, name, grids)
    kernels["scaled_kernel"] = Grids()
    monkeypatch.setattr(scale, "scaled_kernel", kernels["scaled_kernel"])
    monkeypatch.setattr(scale, "BLOCK", 1)

    N = 70_000
    logits, labels = torch.zeros(N, 2), torch.zeros(N, dtype=torch.int64)
    side = launch.Logits(logits)
    spec = LossSpec(Objective(ce_weight=0.5, divergence="jsd"), 2, -100, True, True)
    saved = launch.forward(spec, side, RowTargets(labels), side)
    launch.gradient(spec, side, RowTargets(labels), side, saved, torch.ones(N), torch.empty(N, 2))
    scale.scaled(torch.zeros(N), torch.ones(()), torch.bfloat16)
    for name, grids in kernels.items():
        assert grids.seen, f"{name} was not launched"
        assert all(size <= 65535 for grid in grids.seen for size in grid[1:]), name


# --- Options -------------------------------------------------------------------------------------

GROUPS = Outcomes(*(torch.arange(33, dtype=torch.int32) * k % 5 for k in (1, 2)), count=5)

CHANGES: dict[str, dict[str, Any]] = {
    "cross_entropy": {
        "weight": torch.arange(33) / 16,
        "label_smoothing": 0.1,
        "ignore_index": 3,
        "z_loss": 0.1,
        "softcap": 2.0,
        "logit_scale": 0.5,
        "valid_vocab": 30,
        "reduction": "sum",
        "num_items": 7,
    },
    "kl_div": {
        "temperature": 3.0,
        "divergence": "jsd",
        "beta": 0.2,
        "scale_t2": False,
        "labels": torch.tensor([0, -100, 2, 3]),
        "ignore_index": 3,
        "valid_vocab": 30,
        "softcap": 2.0,
        "logit_scale": 0.5,
        "teacher_softcap": 3.0,
        "teacher_logit_scale": 1.5,
        "reduction": "sum",
        "num_items": 7,
        "outcomes": GROUPS,
    },
    "Objective": {
        "ce_weight": 0.1,
        "kd_weight": 0.3,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "temperature": 3.0,
        "scale_t2": False,
        "divergence": "jsd",
        "beta": 0.2,
        "teacher_share": 0.3,
        "other_divergence": "jeffreys",
        "other_beta": 0.2,
    },
    "Head": {
        "weight": torch.ones(33, 8) * torch.arange(33)[:, None] / 33,
        "bias": torch.arange(33) / 33,
        "logit_scale": 0.5,
        "softcap": 2.0,
        "valid_vocab": 30,
    },
    "call": {
        "num_items": 7,
        "ignore_index": 3,
        "reduction": "sum",
        "token_weights": torch.tensor([1.0, 0.5, 0.0, 2.0]),
        "kd_token_weights": torch.tensor([1.0, 0.5, 0.0, 2.0]),
        "other_rows": torch.tensor([True, False, True, False]),
        "outcomes": GROUPS,
    },
    "logits": {"softcap": 2.0, "logit_scale": 0.5},
}
"""Values of every option, by where it is one; "logits" are those of ``distill_loss`` alone, and
"bias" and "class_weight" of ``linear_cross_entropy`` are named below."""


_rows = CHANGES["call"]["other_rows"]
OTHER: dict[str, dict[str, Any]] = {
    "other_divergence": {"other_divergence": "tvd", "other_rows": _rows},
    "other_beta": {"other_divergence": "jeffreys", "other_rows": _rows},
    "other_rows": {"other_divergence": "tvd", "other_rows": ~_rows},
    "outcomes": {"divergence": "forward_kl"},
}
"""What an option needs beside it to have an effect."""


def _changed_losses(ops: Any, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """For every option of everything: the loss without it, and the loss with it."""
    g = torch.Generator().manual_seed(0)
    s, t = (2 * torch.randn(4, 33, generator=g).to(dtype) for _ in range(2))
    hidden = torch.randn(4, 8, generator=g).to(dtype)
    head = Head(torch.randn(33, 8, generator=g).to(dtype))
    y, seen = torch.arange(4), {}
    objective = Objective(ce_weight=0.5, temperature=2.0, divergence="skew_reverse_kl")

    def note(name: str, call: Callable[..., Tensor], base: dict[str, Any], **change: Any) -> None:
        seen[name] = call(**base).sum(), call(**(base | change)).sum()

    def cross_entropy(**o: Any) -> Tensor:
        return ops.cross_entropy(s, y, **o)

    def linear_cross_entropy(**o: Any) -> Tensor:
        if "bias" in o:
            o["bias"] = o["bias"].to(dtype)
        if "weight" in o:
            o["class_weight"] = o.pop("weight")
        return ops.linear_cross_entropy(hidden, head.weight, y, **o)

    def kl_div(**o: Any) -> Tensor:
        return ops.kl_div(s, t, **o)

    def distill(**o: Any) -> Tensor:
        names = CHANGES["call"].keys() | CHANGES["logits"].keys()
        call = {name: o.pop(name) for name in list(o) if name in names}
        return ops.distill_loss(s, y, TeacherLogits(t), replace(objective, **o), **call).loss

    def linear_distill(**o: Any) -> Tensor:
        call = {name: o.pop(name) for name in list(o) if name in CHANGES["call"]}
        changed = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in o.items()}
        of_head = {k: v for k, v in changed.items() if k in CHANGES["Head"]}
        of_objective = {k: v for k, v in changed.items() if k in CHANGES["Objective"]}
        own = replace(head, **of_head)
        goal = replace(objective, **of_objective)
        return ops.linear_distill_loss(hidden, own, y, TeacherLogits(t), goal, **call).loss

    def teacher_head(**o: Any) -> Tensor:
        own = replace(
            head, **{k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in o.items()}
        )
        return ops.distill_loss(s, y, TeacherHidden(hidden, own), objective).loss

    def linear_teacher_head(**o: Any) -> Tensor:
        own = replace(
            head, **{k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in o.items()}
        )
        student = replace(head, weight=head.weight.flip(0), valid_vocab=own.valid_vocab)
        teacher = TeacherHidden(hidden, own)
        return ops.linear_distill_loss(hidden, student, y, teacher, objective).loss

    for name, value in CHANGES["cross_entropy"].items():
        note(f"cross_entropy.{name}", cross_entropy, {}, **{name: value})
        note(f"linear_cross_entropy.{name}", linear_cross_entropy, {}, **{name: value})
    for name, value in CHANGES["kl_div"].items():
        base = {"divergence": "skew_forward_kl", "temperature": 2.0}
        if name == "ignore_index":
            base["labels"] = y
        if name in OTHER:
            base |= OTHER[name]
        note(f"kl_div.{name}", kl_div, base, **{name: value})
    for name, value in (CHANGES["Objective"] | CHANGES["call"]).items():
        base = OTHER.get(name, {})
        note(f"distill_loss.{name}", distill, base, **{name: value})
        note(f"linear_distill_loss.{name}", linear_distill, base, **{name: value})
    for name, value in CHANGES["logits"].items():
        note(f"distill_loss.{name}", distill, {}, **{name: value})
    for name, value in CHANGES["Head"].items():
        note(f"linear_distill_loss.{name}", linear_distill, {}, **{name: value})
        note(f"TeacherHidden.{name}", teacher_head, {}, **{name: value})
        note(f"linear TeacherHidden.{name}", linear_teacher_head, {}, **{name: value})
        if name == "bias":
            note(f"linear_cross_entropy.{name}", linear_cross_entropy, {}, **{name: value})
    return seen


@every_implementation
def test_every_option_changes_the_result(impl: str) -> None:
    """A softcap accepted and dropped; and as much as the definition says, not just somehow.

    https://github.com/huggingface/trl/issues/6629
    """
    expected = _changed_losses(reference, torch.float64)
    for name, (without, with_it) in _changed_losses(bound(impl), dtypes_of(impl)[0]).items():
        exact_without, exact_with = expected[name]
        assert abs(exact_with - exact_without) > 1e-5 * abs(exact_without), name
        assert_value(without, exact_without, scale=100.0)
        assert_value(with_it, exact_with, scale=100.0)


def test_no_option_is_left_out_above() -> None:
    def options(function: Any) -> set[str]:
        """But for ``logits``, which is how an implementation stores what it computes."""
        parameters = inspect.signature(function).parameters.values()
        return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"logits"}

    assert options(reference.cross_entropy) == CHANGES["cross_entropy"].keys()
    assert options(reference.kl_div) == CHANGES["kl_div"].keys()
    assert options(reference.distill_loss) == CHANGES["call"].keys() | CHANGES["logits"].keys()
    assert options(reference.linear_distill_loss) == CHANGES["call"].keys()
    linear = CHANGES["cross_entropy"].keys() - {"weight"} | {"bias", "class_weight"}
    assert options(reference.linear_cross_entropy) == linear
    assert {f.name for f in fields(Objective)} == CHANGES["Objective"].keys()
    assert {f.name for f in fields(Head)} - {"shard"} == CHANGES["Head"].keys()


@every_implementation
def test_implementations_take_the_arguments_of_the_reference(impl: str) -> None:
    """Names, order, kinds and defaults; only the mechanics are an implementation's own: which, in
    how much memory, and which columns of the vocabulary another process has."""
    import sad_kernels

    for name in ON_LOGITS + LINEAR:
        ours, theirs = (
            {
                p.name: (p.kind, p.default)
                for p in inspect.signature(getattr(module, name)).parameters.values()
                if p.name not in ("impl", "chunk_bytes", "vocab_shard")
            }
            for module in (sad_kernels, reference)
        )
        assert ours == theirs and list(ours) == list(theirs), name


# --- The oracle ----------------------------------------------------------------------------------


def test_the_oracle_is_not_rounded() -> None:
    """A reference computed in the kernel's own precision agreed with a wrong kernel for months.

    https://github.com/linkedin/Liger-Kernel/pull/262
    https://github.com/linkedin/Liger-Kernel/issues/1432
    """
    for op in ON_LOGITS + LINEAR:
        problem = plain(op, torch.bfloat16)
        for name, exact in measure_oracle(problem).items():
            assert exact.dtype == torch.float64
            if name in ("dlogits", "dhidden", "dweight"):
                assert (exact.float() != exact).any()
        yardstick = measure(problem, reference)
        assert yardstick["loss"].dtype == torch.float32
        assert all(yardstick[f"d{name}"].dtype == torch.bfloat16 for name in problem.wrt)
