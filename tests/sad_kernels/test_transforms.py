"""The losses under what torch does to functions: right, or one line that says what to call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from sad_kernels import Head, Objective, TeacherHidden, TeacherLogits, TeacherTopK, reference
from sad_kernels._torch.scratch import release_scratch
from support.oracle import IMPLS, bound
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

N, V, D, K = 6, 40, 8, 5
JOINT = Objective(ce_weight=0.5, kd_weight=0.5, label_smoothing=0.1, temperature=2.0)
JSD = Objective(ce_weight=0.5, kd_weight=0.5, divergence="jsd")

Loss = Callable[[Any, Tensor], Tensor]
"""(public functions, a leaf [N, V] or [N, D]) -> a scalar."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LABELS = torch.tensor([1, 2, -100, 3, 4, 5])
LOGITS, TEACHER = drawn(N, V), drawn(N, V + 1)[:, :V]
HIDDEN, STATES, TEACHER_WEIGHT = drawn(N, D), drawn(N, 3), drawn(V, 3)
WEIGHT = torch.nn.Parameter(drawn(V, D), requires_grad=False)


def top_k() -> TeacherTopK:
    log_probs, ids = TEACHER.log_softmax(-1).topk(K)
    return TeacherTopK(ids, log_probs)


def of_hidden(objective: Objective) -> Loss:
    def loss(ops: Any, x: Tensor) -> Tensor:
        teacher = TeacherHidden(STATES, Head(TEACHER_WEIGHT))
        return ops.linear_distill_loss(x, Head(WEIGHT), LABELS, teacher, objective).loss

    return loss


ON_LOGITS: dict[str, Loss] = {
    "cross_entropy": lambda ops, x: ops.cross_entropy(x, LABELS, label_smoothing=0.1),
    "kl_div": lambda ops, x: ops.kl_div(x, TEACHER, labels=LABELS),
    "a loss per row": lambda ops, x: ops.kl_div(x, TEACHER, reduction="none").square().sum(),
    "distill_loss": lambda ops, x: ops.distill_loss(x, LABELS, TeacherLogits(TEACHER), JOINT).loss,
    "a mixture": lambda ops, x: ops.distill_loss(x, LABELS, TeacherLogits(TEACHER), JSD).loss,
    "top-k": lambda ops, x: ops.distill_loss(x, LABELS, top_k(), JOINT).loss,
}
ON_HIDDEN: dict[str, Loss] = {
    "linear_cross_entropy": lambda ops, x: ops.linear_cross_entropy(x, WEIGHT, LABELS),
    "linear rows": lambda ops, x: (
        ops.linear_cross_entropy(x, WEIGHT, LABELS, reduction="none").square().sum()
    ),
    "linear_distill_loss": of_hidden(JOINT),
    "linear mixture": of_hidden(JSD),
}
LOSSES = ON_LOGITS | ON_HIDDEN

every_loss = pytest.mark.parametrize("name", LOSSES)
every_impl = pytest.mark.parametrize("impl", IMPLS)
torchs_warning = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def function_and_leaf(name: str, impl: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    return partial(LOSSES[name], bound(impl)), LOGITS if name in ON_LOGITS else HIDDEN


def plain_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


# --- A second derivative: refused, never dropped --------------------------------------------------


@every_impl
@every_loss
def test_a_hessian_is_refused(name: str, impl: str) -> None:
    """It was 0, because the gradient came back without a graph."""
    function, x = function_and_leaf(name, impl)
    with pytest.raises(RuntimeError, match=r"differentiated again.*sad_kernels\.reference"):
        torch.autograd.functional.hessian(function, x)
    assert torch.autograd.functional.hessian(partial(LOSSES[name], reference), x).any()


@every_impl
@every_loss
def test_a_penalty_on_the_gradient_is_refused(name: str, impl: str) -> None:
    function, x = function_and_leaf(name, impl)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    torch.testing.assert_close(gradient.detach(), plain_gradient(function, x))
    with pytest.raises(RuntimeError, match=r"differentiated again.*sad_kernels\.reference"):
        gradient.square().sum().backward()


# --- The same bits --------------------------------------------------------------------------------


@every_impl
@every_loss
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(name: str, impl: str, reentrant: bool) -> None:
    """Saved tensors may be unpacked once: it raised where they were read twice."""
    function, x = function_and_leaf(name, impl)
    leaf = x.clone().requires_grad_()
    checkpoint(function, leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, plain_gradient(function, x))  # pyright: ignore


@every_impl
@every_loss
def test_a_second_backward_gives_the_same(name: str, impl: str) -> None:
    """Within rounding: the logits may be made again in other pieces."""
    function, x = function_and_leaf(name, impl)
    leaf = x.clone().requires_grad_()
    loss = function(leaf)
    (first,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(first, 3 * second)


# --- torch.func -----------------------------------------------------------------------------------


@every_impl
@every_loss
def test_func_grad(name: str, impl: str) -> None:
    function, x = function_and_leaf(name, impl)
    torch.testing.assert_close(torch.func.grad(function)(x), plain_gradient(function, x))
    vjp: Any = torch.func.vjp(function, x)[1]
    torch.testing.assert_close(vjp(torch.tensor(2.0))[0], 2 * plain_gradient(function, x))


@every_impl
@pytest.mark.parametrize("name", ON_LOGITS)
def test_vmap_of_logits(name: str, impl: str) -> None:
    function, x = function_and_leaf(name, impl)
    batch = torch.stack([x, x.flip(0)])
    expected = torch.stack([function(each) for each in batch])
    torch.testing.assert_close(torch.func.vmap(function)(batch), expected)
    gradients = torch.stack([plain_gradient(function, each) for each in batch])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(function))(batch), gradients)


@every_impl
@pytest.mark.parametrize("name", ON_HIDDEN)
def test_vmap_of_hidden_states_is_refused(name: str, impl: str) -> None:
    function, x = function_and_leaf(name, impl)
    for transformed in (function, torch.func.grad(function)):
        with pytest.raises(RuntimeError, match=r"must not be batched by vmap.*pass all rows"):
            torch.func.vmap(transformed)(torch.stack([x, x]))


@torchs_warning
@every_impl
@every_loss
def test_forward_mode_is_refused(name: str, impl: str) -> None:
    function, x = function_and_leaf(name, impl)
    for call in (
        lambda: torch.func.jvp(function, (x,), (x,)),
        lambda: torch.func.jacfwd(function)(x),
        lambda: torch.func.hessian(function)(x),
        lambda: torch.autograd.functional.jvp(function, x, x, strict=False),
    ):
        with pytest.raises(
            (NotImplementedError, RuntimeError), match=r"must not .*sad_kernels\.reference"
        ):
            call()


@torchs_warning
@every_impl
@every_loss
def test_a_dual_tensor_is_refused(name: str, impl: str) -> None:
    function, x = function_and_leaf(name, impl)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="must not carry"):
        function(forward_ad.make_dual(x, x))
    with forward_ad.dual_level():
        function(x)  # one without a tangent is like any other


# --- Kinds of tensors -----------------------------------------------------------------------------


@every_impl
def test_a_teacher_of_inference_mode_is_taken(impl: str) -> None:
    """Autograd refuses to save such tensors."""
    with torch.inference_mode():
        logits, states, weight = TEACHER.clone(), STATES.clone(), TEACHER_WEIGHT.clone()
        labels = LABELS.clone()
    ops, s, h = bound(impl), LOGITS.clone().requires_grad_(), HIDDEN.clone().requires_grad_()
    teacher, head = TeacherHidden(states, Head(weight)), Head(WEIGHT)
    losses: list[tuple[Tensor, Tensor, str]] = [
        (s, ops.kl_div(s, logits, labels=labels), "kl_div"),
        (s, ops.distill_loss(s, labels, TeacherLogits(logits), JOINT).loss, "distill_loss"),
        (h, ops.linear_distill_loss(h, head, labels, teacher, JOINT).loss, "linear_distill_loss"),
    ]
    for leaf, loss, name in losses:
        expected = plain_gradient(partial(LOSSES[name], ops), leaf.detach())
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


@every_impl
@every_loss
def test_inside_inference_mode(name: str, impl: str) -> None:
    function, x = function_and_leaf(name, impl)
    with torch.inference_mode():
        assert torch.equal(function(x.clone()), function(x))


@every_impl
@every_loss
def test_after_inference_mode(name: str, impl: str) -> None:
    """A call must not leave the next one memory that cannot be written to outside the mode."""
    function, x = function_and_leaf(name, impl)
    release_scratch()
    with torch.inference_mode():
        function(x.clone())
    assert torch.isfinite(plain_gradient(function, x)).all()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_teachers_parameters_get_no_gradient(impl: str, with_bias: bool) -> None:
    """A teacher that is not frozen is taken as it is."""
    ops, hidden = bound(impl), HIDDEN.clone().requires_grad_()
    weight = torch.nn.Parameter(TEACHER_WEIGHT.clone())
    bias = torch.nn.Parameter(drawn(V)) if with_bias else None
    teacher = TeacherHidden(STATES, Head(weight, bias))
    ops.linear_distill_loss(hidden, Head(WEIGHT), LABELS, teacher, JOINT).loss.backward()
    assert hidden.grad is not None and weight.grad is None
    logits = LOGITS.clone().requires_grad_()
    ops.distill_loss(logits, LABELS, teacher, JOINT).loss.backward()
    assert weight.grad is None and (bias is None or bias.grad is None)
    with pytest.raises(ValueError, match="head weight must not require a gradient"):
        TeacherHidden(STATES, Head(2 * weight))  # computed from something that would get one


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@every_impl
def test_distributed_tensors_are_refused(impl: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    ops = bound(impl)
    with one_process():
        mesh = init_device_mesh("cpu", (1,))
        x, h, w, y = (
            distribute_tensor(t, mesh, [Replicate()]) for t in (LOGITS, HIDDEN, WEIGHT, LABELS)
        )
        ones, bias = y.to(torch.float32), w[:, 0]
        teacher = TeacherLogits(TEACHER)
        for name, call in {
            "logits": lambda: ops.cross_entropy(x, LABELS),
            "student_logits": lambda: ops.kl_div(x, TEACHER),
            "teacher logits": lambda: ops.kl_div(LOGITS, x),
            "hidden": lambda: ops.linear_cross_entropy(h, WEIGHT, LABELS),
            "head weight": lambda: ops.linear_cross_entropy(HIDDEN, w, LABELS),
            "head bias": lambda: ops.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, bias=bias),
            "labels": lambda: ops.cross_entropy(LOGITS, y),
            "weight": lambda: ops.cross_entropy(LOGITS, LABELS, weight=bias.to(torch.float32)),
            "num_items": lambda: ops.cross_entropy(LOGITS, LABELS, num_items=ones.sum()),
            "token_weights": lambda: ops.distill_loss(
                LOGITS, LABELS, teacher, JOINT, token_weights=ones
            ),
            "teacher head weight": lambda: ops.linear_distill_loss(
                HIDDEN, Head(WEIGHT), LABELS, TeacherHidden(STATES, Head(w)), JOINT
            ),
        }.items():
            with pytest.raises(TypeError, match=f"^{name} must be a plain tensor") as caught:
                call()
            said = str(caught.value)
            assert "its to_local()" in said and "Head(..., shard=...)" in said and "\n" not in said


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", ["cross_entropy", "kl_div", "distill_loss", *ON_HIDDEN])
def test_one_graph_of_the_torch_path(name: str, dynamic: bool) -> None:
    """``fullgraph`` stopped at the number of rows that count; products of hidden states failed."""
    function, x = function_and_leaf(name, "torch")
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    loss = compiled(leaf)
    assert torch.equal(loss.detach(), function(x))
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], plain_gradient(function, x))


@pytest.mark.parametrize("name", ["distill_loss", "linear_distill_loss"])
def test_the_number_of_rows_that_count_makes_no_new_graph(name: str) -> None:
    graphs = 0

    def backend(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module

    torch.compiler.reset()
    weight, x = WEIGHT, LOGITS if name == "distill_loss" else HIDDEN

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        ops = bound("torch")
        if name == "distill_loss":
            return ops.distill_loss(x, labels, TeacherLogits(TEACHER), JOINT).loss
        teacher = TeacherHidden(STATES, Head(TEACHER_WEIGHT))
        return ops.linear_distill_loss(x, Head(weight), labels, teacher, JOINT).loss

    compiled = torch.compile(loss, backend=backend)
    for count in range(N + 1):
        labels = torch.full((N,), -100).masked_fill(torch.arange(N) < count, 3)
        torch.testing.assert_close(compiled(x, labels), loss(x, labels))
    assert graphs <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill_loss", "linear_cross_entropy", "linear_distill_loss"])
def test_inductor_compiles_the_torch_path(name: str) -> None:
    function, x = function_and_leaf(name, "torch")
    torch.compiler.reset()
    leaf = x.clone().requires_grad_()
    loss = torch.compile(function, fullgraph=True)(leaf)
    torch.testing.assert_close(loss.detach(), function(x))
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], plain_gradient(function, x))
