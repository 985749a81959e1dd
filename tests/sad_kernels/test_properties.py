"""What holds for any input: hypothesis draws shapes, layouts, dtypes, magnitudes and options."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sad_kernels import Head, Objective, TeacherHidden, TeacherLogits, reference
from sad_kernels.objective import DIVERGENCES, Divergence
from support.cases import place
from support.oracle import (
    IMPLS,
    SLOW,
    assert_value,
    assert_zero,
    bound,
    dtypes_of,
    judge,
    measure_oracle,
    scales_of,
)
from support.problems import plain
from torch import Tensor

EXAMPLES = {impl: 4 if impl in SLOW else 25 for impl in IMPLS}


def for_any(**drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """hypothesis' ``given``, for every implementation with its own number of examples."""

    def decorate(property_: Callable[..., None]) -> Any:
        def test(**fixed: Any) -> None:
            @settings(max_examples=EXAMPLES[fixed["impl"]])
            @given(**drawn)
            def example(**values: Any) -> None:
                property_(**fixed, **values)

            example()

        signature = inspect.signature(property_)
        fixed = [p for name, p in signature.parameters.items() if name not in drawn]
        test.__signature__ = signature.replace(parameters=fixed)
        test.__name__, test.__doc__ = property_.__name__, property_.__doc__
        return pytest.mark.parametrize("impl", IMPLS)(test)

    return decorate


seeds = st.integers(0, 2**32 - 1)
rows_st = st.integers(1, 4)
widths = st.integers(1, 97)
temperatures = st.floats(0.25, 8.0)
divergences = st.sampled_from(list(DIVERGENCES))
betas = st.floats(0.05, 0.95)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
layouts = st.sampled_from(["contiguous", "padded", "transposed", "offset"])
magnitudes = st.sampled_from([0.01, 1.0, 10.0, 100.0])
weights = st.floats(0.0, 2.0)


def drawn(seed: int, *shape: int, magnitude: float = 1.0) -> Tensor:
    """Float64 values, of any size up to the magnitude from row to row."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return magnitude * torch.rand(shape[:-1], generator=g, dtype=torch.float64)[..., None] * x


def labels_for(seed: int, N: int, V: int) -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed + 1))


def grid(seed: int, N: int, V: int) -> Tensor:
    """float32 logits on a grid of 1/64, so that integers can be added without rounding."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-640, 640, (N, V), generator=g).float() / 64


def with_grad(loss: Tensor, x: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, x, upstream)[0]


# --- Any options at all --------------------------------------------------------------------------

common = {
    "distribution": st.sampled_from(["randn1", "randn5", "randn30", "peaked", "zipf", "near"]),
    "N": rows_st,
    "V": st.integers(2, 97),
    "cut": st.booleans(),
    "ignore": st.sampled_from(["none", "some", "first", "all"]),
    "label_dtype": st.sampled_from([torch.int64, torch.int32]),
    "label_layout": st.sampled_from(["contiguous", "strided", "shifted"]),
    "layout": layouts,
    "upstream": st.sampled_from(["one", "0.37", "random", "stride0"]),
    "reduction": st.sampled_from(["mean", "sum", "none"]),
    "label_smoothing": st.floats(0.0, 0.9),
    "z_loss": st.floats(0.0, 0.1),
    "temperature": temperatures,
    "divergence": divergences,
    "beta": betas,
    "scale_t2": st.booleans(),
    "teacher": st.sampled_from(["logits", "hidden", "bucket", "zero", None]),
    "ce_weight": weights,
    "kd_weight": weights,
    "num_items": st.sampled_from([None, 37, "tensor"]),
    "D": st.integers(2, 40),
    "bias": st.booleans(),
    "logit_scale": st.floats(0.1, 2.0),
}


@pytest.mark.parametrize("op", ["cross_entropy", "kl_div", "distill_loss"])
@for_any(options=st.fixed_dictionaries(common), dtype=dtypes)
def test_ops_on_logits(op: str, impl: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    judge(plain(op, dtype, **options), bound(impl))


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_distill_loss"])
@for_any(
    options=st.fixed_dictionaries(common),
    dtype=dtypes,
    chunk_bytes=st.sampled_from([None, 3000, 10_000, 30_000]),
)
def test_ops_on_hidden_states(
    op: str, impl: str, options: dict[str, Any], dtype: torch.dtype, chunk_bytes: int | None
) -> None:
    problem = plain(op, dtype, **options)
    if measure_oracle(problem)["loss"].isfinite().all():  # what is infinite has its own tests
        judge(problem, bound(impl, chunk_bytes))


# --- Symmetries ----------------------------------------------------------------------------------


@pytest.mark.few(1)
@for_any(seed=seeds, N=rows_st, V=widths, shift=st.integers(-9000, 9000), T=temperatures)
def test_adding_a_constant_to_a_row_changes_nothing(
    impl: str, seed: int, N: int, V: int, shift: int, T: float
) -> None:
    s, t, y = grid(seed, N, V), grid(seed + 7, N, V), labels_for(seed, N, V)
    ops = bound(impl)
    for divergence in get_args(Divergence):
        exact, exact_grad = _joint(reference, s.double(), t.double(), y, divergence, T)
        loss, grad = _joint(ops, s + shift, t - shift, y, divergence, T)
        R = max(1.0, 20 / T)
        assert_value(loss, exact, scale=1 + T**2 * R)
        assert_value(grad, exact_grad, scale=1 + T * R)


def _joint(
    ops: Any, s: Tensor, t: Tensor, y: Tensor, divergence: Divergence, T: float
) -> tuple[Tensor, Tensor]:
    """CE + KD per row, summed in the gradient only."""
    s = s.detach().requires_grad_()
    ce = ops.cross_entropy(s, y, label_smoothing=0.1, reduction="none")
    kd = ops.kl_div(s, t, divergence=divergence, temperature=T, reduction="none")
    return with_grad(ce + kd, s, torch.ones_like(ce))


@for_any(seed=seeds, N=rows_st, V=widths, T=temperatures, divergence=divergences)
def test_permuting_columns_permutes_gradients(
    impl: str, seed: int, N: int, V: int, T: float, divergence: Any
) -> None:
    s, t, y = grid(seed, N, V), grid(seed + 7, N, V), labels_for(seed, N, V)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
    exact, exact_grad = _joint(reference, s.double(), t.double(), y, divergence, T)
    loss, grad = _joint(bound(impl), s[:, order], t[:, order], order.argsort()[y], divergence, T)
    R = max(1.0, 20 / T)
    assert_value(loss, exact, scale=1 + T**2 * R)
    assert_value(grad, exact_grad[:, order], scale=1 + T * R)


@for_any(seed=seeds, N=rows_st, V=widths, T=temperatures, divergence=divergences)
def test_gradient_rows_sum_to_zero_without_z_loss(
    impl: str, seed: int, N: int, V: int, T: float, divergence: Any
) -> None:
    s, t, y = grid(seed, N, V), grid(seed + 7, N, V), labels_for(seed, N, V)
    _, grad = _joint(bound(impl), s, t, y, divergence, T)
    total = grad.double().sum(-1).float()
    assert_zero(total, scale=V * (1 + T * max(1.0, 20 / T)))  # the bands of V elements


@pytest.mark.few(1)
@for_any(
    seed=seeds,
    N=st.integers(2, 6),
    V=widths,
    T=temperatures,
    divergence=divergences,
    dtype=dtypes,
)
def test_rows_do_not_know_of_each_other(
    impl: str, seed: int, N: int, V: int, T: float, divergence: Any, dtype: torch.dtype
) -> None:
    """Alone, in company, in any order, and twice: a row's bits are its own."""
    s, t = drawn(seed, N, V, magnitude=10).to(dtype), drawn(seed + 7, N, V).to(dtype)
    y = labels_for(seed, N, V)
    ops = bound(impl)
    loss, grad = _joint(ops, s, t, y, divergence, T)
    for some in ([0], [N - 1], list(range(N)), list(reversed(range(N)))):
        loss_of_some, grad_of_some = _joint(ops, s[some], t[some], y[some], divergence, T)
        assert torch.equal(loss_of_some, loss[some])
        assert torch.equal(grad_of_some, grad[some])


THREADS = """
import torch
from sad_kernels import Objective, TeacherLogits, distill_loss

torch.manual_seed(0)
s, t, y = torch.randn(501, 701).requires_grad_(), torch.randn(501, 701), torch.arange(501)
for divergence in ("forward_kl", "reverse_kl", "jsd"):
    objective, seen = Objective(temperature=2.7, divergence=divergence), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = distill_loss(s, y, TeacherLogits(t), objective, reduction="none", impl="torch")
        seen.append((out.loss, *torch.autograd.grad(out.loss.sum(), s)))
    for loss, grad in seen[1:]:
        print(torch.equal(loss, seen[0][0]), torch.equal(grad, seen[0][1]))
"""


def test_the_number_of_threads_changes_no_bit() -> None:
    """They take other parts of a block, whose ends vector instructions do not reach. In a process
    of its own, because the threads that torch starts do not survive a fork."""
    run = [sys.executable, "-c", THREADS]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["True"] * 12


@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys"])
def test_no_row_changes_the_sign_of_anothers_zeros(divergence: Divergence) -> None:
    """The first row's sums are the larger ones, the second's by far the lower ones."""
    s = torch.tensor([[0.0] * 4 + [-1e4] * 4, [0.0] * 8])
    t = torch.tensor([[0.0, -1.0, -1.0, -1.0] + [-1e4] * 4, [90.0] + [0.0] * 7])
    gradients = []
    for rows in (slice(0, 1), slice(0, 2)):
        x = s[rows].clone().requires_grad_()
        value = bound("torch").kl_div(x, t[rows], divergence=divergence, reduction="sum")
        gradients.append(torch.autograd.grad(value, x)[0][0])
    alone, beside = gradients
    assert torch.equal(alone, beside) and torch.equal(alone.signbit(), beside.signbit())


# --- Divergences ---------------------------------------------------------------------------------


@for_any(
    seed=seeds,
    N=rows_st,
    V=widths,
    T=temperatures,
    divergence=divergences,
    beta=betas,
    magnitude=magnitudes,
    same=st.booleans(),
)
def test_divergences_have_a_floor_and_a_ceiling(
    impl: str,
    seed: int,
    N: int,
    V: int,
    T: float,
    divergence: Any,
    beta: float,
    magnitude: float,
    same: bool,
) -> None:
    """At least 0, exactly 0 for the KL of equal inputs, and bounded where a mixture is involved."""
    s = drawn(seed, N, V, magnitude=magnitude).float()
    t = s.bfloat16() if same else drawn(seed + 7, N, V, magnitude=magnitude).bfloat16()
    s = t.float() if same else s
    options: Any = {"divergence": divergence, "temperature": T, "beta": beta, "reduction": "none"}
    value = bound(impl).kl_div(s, t, **options)
    span = torch.maximum(*(x.float().amax(-1) - x.float().amin(-1) for x in (s, t)))
    band = 8 * 2.0**-23 * T**2 * (span / T).clamp(min=1)
    assert (value >= -band).all()
    if same and divergence in ("forward_kl", "reverse_kl"):
        assert torch.equal(value, torch.zeros(N))
    if same:
        assert_zero(value, scale=T**2 * (span / T).clamp(min=1))
    ceiling = {
        "jsd": -beta * math.log(beta) - (1 - beta) * math.log(1 - beta),
        "skew_forward_kl": -math.log(beta),
        "skew_reverse_kl": -math.log(beta),
    }.get(divergence, math.inf)
    assert (value <= T**2 * ceiling + band).all()


# --- Compositions --------------------------------------------------------------------------------


@pytest.mark.few(1)
@for_any(
    seed=seeds,
    N=rows_st,
    V=st.integers(2, 97),
    D=st.integers(1, 16),
    softcap=st.sampled_from([None, 10.0]),
    logit_scale=st.floats(0.1, 2.0),
    objective=st.builds(
        Objective,
        ce_weight=weights,
        kd_weight=weights,
        z_loss=st.floats(0.0, 0.1),
        label_smoothing=st.floats(0.0, 0.5),
        temperature=temperatures,
        divergence=divergences,
        beta=betas,
    ),
)
def test_linear_ops_are_compositions(
    impl: str,
    seed: int,
    N: int,
    V: int,
    D: int,
    softcap: float | None,
    logit_scale: float,
    objective: Objective,
) -> None:
    """The linear op, and distill_loss of the head's logits in float64, at any chunk size."""

    def values(offset: int, *shape: int) -> Tensor:  # of the widest dtype the op takes
        return drawn(seed + offset, *shape).to(dtypes_of(impl)[0])

    head = Head(values(0, V, D), values(1, 1, V)[0], logit_scale, softcap, V - 1)
    hidden, y = values(2, N, D), labels_for(seed, N, V - 1)
    teacher = TeacherHidden(values(3, N, D), Head(values(4, V, D), valid_vocab=V - 1))

    exact_head = replace(head, weight=head.weight.double(), bias=values(1, 1, V)[0].double())
    z = replace(exact_head, softcap=None)(hidden.double())
    s = exact_head(hidden.double())
    t = teacher.hidden.double() @ teacher.head.weight[: V - 1].double().T
    composed = bound("torch").distill_loss(s, y, TeacherLogits(t), objective)
    magnitudes = [max(1.0, float(x.abs().max())) for x in (z, t)]
    kept, upstream = torch.ones(N, dtype=torch.bool), torch.tensor(1.0)
    scales = scales_of(objective, s, t, kept, upstream, float(N), *magnitudes)
    scales["lse"] = torch.tensor(magnitudes[0])
    for chunk_bytes in (None, 2000):
        direct = bound(impl, chunk_bytes).linear_distill_loss(hidden, head, y, teacher, objective)
        for name, exact in composed._asdict().items():
            assert_value(getattr(direct, name), exact.detach(), scale=scales.get(name, 0.0))
        parts = (
            objective.ce_weight * direct.ce
            + objective.kd_weight * direct.kd
            + objective.z_loss * direct.z
        )
        assert_value(direct.loss * direct.num_tokens, parts, scale=N * scales["loss"])


# --- What is left alone --------------------------------------------------------------------------


@for_any(
    seed=seeds,
    N=rows_st,
    V=widths,
    layout=layouts,
    dtype=dtypes,
    junk=st.sampled_from([math.nan, math.inf, -math.inf, 3.0]),
    ignored=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_ignored_rows_and_inputs_are_left_alone(
    impl: str,
    seed: int,
    N: int,
    V: int,
    layout: str,
    dtype: torch.dtype,
    junk: float,
    ignored: list[bool],
) -> None:
    """Ignored rows get exact zeros whatever they hold; every input keeps its bits and version."""
    drop = torch.tensor(ignored[:N])
    s, t = (drawn(seed + i, N, V).masked_fill(drop[:, None], junk) for i in (0, 7))
    s, t = place(s, layout, dtype).requires_grad_(), place(t, layout, dtype)
    y = labels_for(seed, N, V).masked_fill(drop, -100).view(s.shape[:-1])
    buffers = [x.detach().untyped_storage() for x in (s, t, y)]
    before = [(x._version, bytes(b)) for x, b in zip((s, t, y), buffers, strict=True)]
    ops = bound(impl)
    out = ops.distill_loss(s, y, TeacherLogits(t), Objective(ce_weight=1.0, temperature=2.0))
    rows = ops.cross_entropy(s, y, reduction="none")
    grads = torch.autograd.grad(out.loss + rows.sum(), s)[0].reshape(N, V)
    assert grads.isfinite().all() and out.loss.isfinite()
    assert not grads[drop].any() and not rows.flatten()[drop].any()
    assert float(out.num_tokens) == int((~drop).sum())
    after = [(x._version, bytes(b)) for x, b in zip((s, t, y), buffers, strict=True)]
    assert before == after
