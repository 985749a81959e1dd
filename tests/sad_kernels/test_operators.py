"""What torch makes of the operators: traced, compiled, checkpointed, cast and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sad_kernels
import torch
from sad_kernels import Head, Objective, TeacherLogits
from support.oracle import bound, judge, measure
from support.problems import plain
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from sad_kernels import _operator as operator
from sad_kernels._operator import Encoded, OpArgs, encode
from sad_kernels._rows import LossSpec, RowTargets
from sad_kernels._triton import launch, linear, logits

N, V, D, K = 5, 40, 6, 3

ON_LOGITS = ("cross_entropy", "kl_div", "distill_loss")
LINEAR = ("linear_cross_entropy", "linear_distill_loss")
every_op = pytest.mark.parametrize("op", ON_LOGITS + LINEAR)
LAYOUTS = ("contiguous", "permuted", "sliced", "no rows")


# --- Registration --------------------------------------------------------------------------------


def laid_out(layout: str, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, columns], or no rows: columns next to each other, rows next to each other, or gaps."""
    match layout:
        case "permuted":
            return torch.randn(columns, N).to(dtype).T
        case "sliced":
            return torch.randn(N + 2, columns + 3).to(dtype)[1:-1, 1:-2]
        case "no rows":
            return torch.randn(0, columns).to(dtype)
        case _:
            return torch.randn(N, columns).to(dtype)


def labels_of(x: Tensor) -> Tensor:
    y = torch.arange(len(x)) % (V - 3)
    y[1::3] = -100
    return y


def packed(scale: float = 1.0, softcap: float | None = None, **options: Any) -> Encoded:
    usual: dict[str, Any] = {"ce_weight": 0.5, "z_loss": 0.01, "temperature": 3.0}
    objective = Objective(**usual | options)
    spec = LossSpec(objective, V - 2, -100, compute_ce=True, compute_metrics=True)
    return encode(OpArgs(spec, scale, softcap))


def teacher_of(kind: str, layout: str) -> tuple[Any, ...]:
    """Teacher's logits and the fields of a ``TopK``, as ``row_losses`` takes them."""
    if kind == "dense":
        return laid_out(layout, V, torch.bfloat16), None, None, None, None
    if kind == "none":
        return None, None, None, None, None
    log_probs = torch.randn(len(laid_out(layout, V)), V).log_softmax(-1)
    values, ids = log_probs.topk(K)
    top_k = launch.SortedTopK.prepare(ids % (V - 2), values, "bucket", V - 2)
    return None, top_k.ids, top_k.log_p, top_k.log_rest, top_k.best


def targets_of(kind: str, x: Tensor) -> RowTargets:
    """Labels alone, or one of the ways to say more of rows and classes."""
    rows, by_class = len(x), torch.rand(V - 2)
    match kind:
        case "weights":
            mask = torch.arange(rows) % 2 == 0
            of_rows = {"token_weights": torch.rand(rows), "kd_weights": mask.float()}
            return RowTargets(labels_of(x), **of_rows, other_rows=mask)
        case "no labels":
            return RowTargets(kd_weights=torch.rand(rows))
        case "classes":
            return RowTargets(labels_of(x), class_weight=by_class)
        case "probabilities":
            return RowTargets(soft=torch.rand(rows, V), class_weight=by_class)
        case _:
            return RowTargets(labels_of(x))


def row_arguments(layout: str, kind: str) -> tuple[Any, ...]:
    x = laid_out(layout, V)
    alone = kind in ("none", "classes", "probabilities")
    options: dict[str, Any] = {"kd_weight": 0.0 if alone else 0.7, "label_smoothing": 0.1}
    if kind == "weights":
        options["other_divergence"] = "jsd"
    if kind == "no labels":
        options["ce_weight"] = 0.0
    teacher = teacher_of("none" if alone else "bucket" if kind == "bucket" else "dense", layout)
    return x, *targets_of(kind, x), *teacher, *packed(**options)


@pytest.fixture
def zeroed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved of ignored rows is never written nor read, but ``opcheck`` compares it."""
    monkeypatch.setattr(Tensor, "new_empty", Tensor.new_zeros)


registered = pytest.mark.usefixtures("zeroed_memory")


every_layout = pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *((layout, "dense") for layout in LAYOUTS),
        ("contiguous", "bucket"),
        ("no rows", "none"),
        ("permuted", "weights"),
        ("contiguous", "no labels"),
        ("sliced", "classes"),
        ("permuted", "probabilities"),
    ],
)


@pytest.mark.few(3)
@registered
@every_layout
def test_row_losses_are_registered(layout: str, kind: str) -> None:
    arguments = row_arguments(layout, kind)
    arguments[0].requires_grad_()
    torch.library.opcheck(torch.ops.sad_kernels.row_losses, arguments)


@pytest.mark.few(2)
@registered
@every_layout
def test_row_means_are_registered(layout: str, kind: str) -> None:
    arguments = row_arguments(layout, kind)
    arguments[0].requires_grad_()
    items = torch.tensor(7.0) if kind == "bucket" else None
    torch.library.opcheck(torch.ops.sad_kernels.row_mean, (*arguments, items))


@pytest.mark.few(5)
@registered
@every_layout
def test_row_gradients_are_registered(layout: str, kind: str) -> None:
    arguments = row_arguments(layout, kind)
    rows, _, *saved = logits.row_losses(*arguments)
    torch.library.opcheck(
        torch.ops.sad_kernels.row_gradient, (*arguments, *saved, torch.randn(len(rows)))
    )


def linear_arguments(layout: str, kind: str, needed: str) -> list[Any]:
    """What the linear operators take before their own."""
    hidden, weight, bias = laid_out(layout, D), torch.randn(V, D), torch.randn(V)
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        x.requires_grad_(name in needed)
    t_hidden = t_weight = None
    _, *top_k = teacher_of("bucket" if kind == "bucket" else "none", layout)
    if kind == "hidden":
        t_hidden, t_weight = laid_out(layout, D + 1), torch.randn(V, D + 1)
    labels, _, *others = targets_of("weights" if layout == "permuted" else kind, hidden)
    other: Any = {"other_divergence": "jsd"} if layout == "permuted" else {}
    tensors = [hidden, weight, bias, labels, *others, t_hidden, t_weight, None, *top_k]
    compact = layout == "sliced"
    return [*tensors, *packed(0.5, 20.0, kd_weight=0.7, **other), 2000, compact]


every_linear_layout = pytest.mark.parametrize(
    ("layout", "kind", "needed"),
    [
        ("contiguous", "hidden", "hidden,weight,bias"),
        ("permuted", "hidden", "hidden"),
        ("sliced", "bucket", "weight"),
        ("no rows", "hidden", "hidden,weight,bias"),
    ],
)


@pytest.mark.few(1)
@registered
@every_linear_layout
def test_linear_losses_are_registered(layout: str, kind: str, needed: str) -> None:
    wanted = [name in needed for name in ("hidden", "weight", "bias")]
    arguments = linear_arguments(layout, kind, needed)
    items = torch.tensor(7.0)
    torch.library.opcheck(torch.ops.sad_kernels.linear_loss, (*arguments, items, wanted))


@pytest.mark.few(1)
@registered
@every_linear_layout
def test_linear_rows_are_registered(layout: str, kind: str, needed: str) -> None:
    arguments = linear_arguments(layout, kind, needed)
    torch.library.opcheck(torch.ops.sad_kernels.linear_rows, tuple(arguments))
    frozen = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    wanted = [name in needed for name in ("hidden", "weight", "bias")]
    upstream = torch.randn(len(frozen[0]))
    torch.library.opcheck(torch.ops.sad_kernels.linear_rows_gradient, (*frozen, wanted, upstream))


# --- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# What torch's own compiler warns of when it is imported.
@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@every_op
@pytest.mark.parametrize(
    "backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager", "inductor"]
)
def test_compiled_without_graph_breaks(op: str, backend: str) -> None:
    """The rule for losses that are reduced, and equal bits for row losses: they are the operator's.

    https://github.com/linkedin/Liger-Kernel/pull/1338: 61.7 instead of 21.4 once compiled.
    """
    eager = getattr(bound("triton"), op)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    judge(plain(op, torch.bfloat16, ignore="some", N=4), SimpleNamespace(**{op: compiled}))
    if "distill" not in op:
        rows = plain(op, torch.float32, reduction="none", upstream="random", N=3)
        ours = measure(rows, SimpleNamespace(**{op: compiled}))
        for name, value in measure(rows, bound("triton")).items():
            assert torch.equal(ours[name], value), name


def weighted_losses(ops: Any, s: Tensor, t: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    """Losses of given logits and of hidden states with what may be said of rows and classes."""
    objective = Objective(temperature=2.0, other_divergence="reverse_kl", z_loss=0.1)
    how = {"token_weights": w, "kd_token_weights": w.round(), "other_rows": mask}
    out = ops.distill_loss(s, None, TeacherLogits(t), objective, reduction="none", **how)
    linear = ops.linear_distill_loss(s, Head(t), None, TeacherLogits(t), objective, **how)
    y = mask.long()
    by_class = ops.cross_entropy(s, y, weight=w[0].expand(s.shape[1]), logit_scale=0.5)
    soft = ops.cross_entropy(s, t.softmax(-1), softcap=3.0, num_items=7)
    return out.loss.sum() + out.lse.sum() + linear.loss + by_class + soft


# What torch's own compiler warns of when it is imported.
@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_weights_and_masks_compile_without_graph_breaks(backend: str) -> None:
    ops = bound("triton")

    def loss(s: Tensor, *others: Tensor) -> Tensor:
        return weighted_losses(ops, s, *others)

    s, t = torch.randn(5, 5).requires_grad_(), torch.randn(5, 5)
    given = s, t.detach(), torch.rand(5), torch.arange(5) % 2 == 0
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    eager, ours = loss(*given), compiled(*given)
    gradients = [torch.autograd.grad(x, s)[0] for x in (eager, ours)]
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(*gradients)


@pytest.mark.few(1)
@pytest.mark.usefixtures("fresh_compiler")
@every_op
def test_new_shapes_compile_once_more_at_most(op: str) -> None:
    counter = CompileCounter()
    compiled = torch.compile(getattr(bound("triton"), op), fullgraph=True, backend=counter)
    for N in (2, 3, 4, 5):
        judge(plain(op, torch.float32, N=N), SimpleNamespace(**{op: compiled}))
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("op", ON_LOGITS)
def test_new_vocabularies_compile_once_more_at_most(op: str) -> None:
    """Their number is a symbol then, of which no operator's shapes may depend."""
    counter = CompileCounter()
    compiled = torch.compile(getattr(bound("triton"), op), fullgraph=True, backend=counter)
    for V in (31, 40, 53):
        judge(plain(op, torch.float32, N=3, V=V), SimpleNamespace(**{op: compiled}))
    assert counter.frame_count <= 2


# --- Autograd ------------------------------------------------------------------------------------


def loss_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.loss


def problem_and_loss(op: str, **options: Any) -> tuple[dict[str, Tensor], list[Tensor], Any]:
    """Leaves, those that require a gradient, and a function of all leaves to one loss."""
    problem = plain(op, options.pop("dtype", torch.float32), N=3, **options)
    leaves = {
        name: x.detach().requires_grad_(name in problem.wrt) for name, x in problem.leaves.items()
    }
    ops = bound("triton")

    def loss(*tensors: Tensor) -> Tensor:
        return loss_of(problem.call(ops, dict(zip(leaves, tensors, strict=True)))).sum()

    return leaves, [leaves[name] for name in problem.wrt], loss


@pytest.mark.few(3)
@pytest.mark.usefixtures("route")
@every_op
@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_activation_checkpointing(op: str, use_reentrant: bool) -> None:
    """The forward pass runs twice, and gradients are those of the second."""
    for reduction in ("mean", "none"):
        leaves, wrt, loss = problem_and_loss(op, ignore="some", reduction=reduction)
        plainly = torch.autograd.grad(loss(*leaves.values()), wrt)
        checkpoint(loss, *leaves.values(), use_reentrant=use_reentrant).backward()
        for x, expected in zip(wrt, plainly, strict=True):
            assert x.grad is not None and torch.equal(x.grad, expected)


@pytest.mark.few(2)
@pytest.mark.usefixtures("route")
@every_op
def test_without_gradients_there_is_no_gradient_work(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    gradient = launch.gradient
    monkeypatch.setattr(
        launch, "gradient", lambda *args: (launched.append("gradient"), gradient(*args))
    )
    for reduction in ("mean", "none"):
        leaves, wrt, loss = problem_and_loss(op, reduction=reduction)
        with torch.no_grad():
            loss(*leaves.values())
        with torch.inference_mode():
            loss(*leaves.values())
        loss(*(x.detach() for x in leaves.values()))
        assert not launched
        torch.autograd.grad(loss(*leaves.values()), wrt)
        assert launched
        launched.clear()


@pytest.mark.few(13)
@pytest.mark.usefixtures("route")
@every_op
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(op: str, reduction: str) -> None:
    leaves, wrt, loss = problem_and_loss(op, reduction=reduction)
    gradients = torch.autograd.grad(loss(*leaves.values()), wrt, create_graph=True)
    with pytest.raises(RuntimeError, match=r"must not be differentiated again, got .*; call "):
        torch.autograd.grad([g.square().sum() for g in gradients], wrt)


@pytest.mark.few(3)
@pytest.mark.usefixtures("route")
@every_op
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
def test_autocast_changes_nothing(op: str, dtype: torch.dtype) -> None:
    """Losses in fp32, gradients in the leaf's dtype, and both with the bits they have without."""
    for reduction in ("mean", "none"):
        leaves, wrt, loss = problem_and_loss(op, dtype=dtype, reduction=reduction)
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                value = loss(*leaves.values())
            results.append((value.detach(), *torch.autograd.grad(value, wrt)))
        (value, *gradients), autocast = results
        assert value.dtype == torch.float32
        assert all(g.dtype == x.dtype for g, x in zip(gradients, wrt, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(results[0], autocast, strict=True))


# --- By name, or past torch's machinery ----------------------------------------------------------


OPERATORS = (
    logits.row_losses, logits.row_mean, logits.row_gradient,
    linear.linear_loss, linear.scaled_gradient, linear.linear_rows, linear.linear_rows_gradient,
)  # fmt: skip


@pytest.fixture(params=["alone", "by name"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of calling an operator, each with the other one closed."""
    by_name = request.param == "by name"
    if by_name:
        monkeypatch.setattr(operator, "eager_autograd_only", lambda inputs: False)

    def closed(*_: Any) -> None:
        raise AssertionError("the wrong way to call an operator")

    for each in OPERATORS:
        if by_name:
            monkeypatch.setattr(each.differentiable, "apply", closed)
        else:
            monkeypatch.setattr(each, "registered", closed)


@every_op
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_ways_of_calling_give_the_same_bits(
    op: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, wrt, loss = problem_and_loss(op, ignore="some", reduction=reduction)
    results = []
    for by_name in (False, True):
        with monkeypatch.context() as patch:
            if by_name:
                patch.setattr(operator, "eager_autograd_only", lambda inputs: False)
            value = loss(*leaves.values())
            gradients = torch.autograd.grad(value, wrt, torch.tensor(0.3))
            results.append((value.detach(), *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Names(TorchDispatchMode):
    """The operators of this package that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "sad_kernels":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("op", "reduction", "forward", "backward"),
    [
        ("cross_entropy", "mean", "row_mean", "row_gradient"),
        ("cross_entropy", "none", "row_losses", "row_gradient"),
        ("kl_div", "mean", "row_mean", "row_gradient"),
        ("kl_div", "none", "row_losses", "row_gradient"),
        ("distill_loss", "mean", "row_mean", "row_gradient"),
        ("linear_cross_entropy", "mean", "linear_loss", "scaled_gradient"),
        ("linear_cross_entropy", "none", "linear_rows", "linear_rows_gradient"),
        ("linear_distill_loss", "mean", "linear_loss", "scaled_gradient"),
    ],
)
def test_a_dispatch_mode_sees_operators(
    op: str, reduction: str, forward: str, backward: str
) -> None:
    """Counters of FLOP, selective checkpointing and profilers of memory are such modes."""
    leaves, wrt, loss = problem_and_loss(op, reduction=reduction)
    with Names() as names:
        torch.autograd.grad(loss(*leaves.values()), wrt)
    assert names.seen[0] == forward and set(names.seen[1:]) == {backward}


@pytest.mark.parametrize("op", ON_LOGITS)
def test_tracers_find_operators(op: str) -> None:
    leaves, _, loss = problem_and_loss(op)
    graph = make_fx(loss)(*leaves.values())
    targets = [str(node.target) for node in graph.graph.nodes]
    assert "sad_kernels.row_mean.default" in targets
    with FakeTensorMode(allow_non_fake_inputs=True):  # no kernel can run: shapes are all there is
        fake = loss(*leaves.values())
    assert fake.shape == () and type(fake) is not Tensor


def test_a_subclass_of_tensor_is_not_looked_through() -> None:
    """Its ``__torch_dispatch__`` decides what an operator does to it; it has no address."""
    x = TwoTensor(torch.randn(N, V), torch.randn(N, V))
    y = torch.randint(V, (N,))
    loss: Any = sad_kernels.cross_entropy(x, y, impl="triton")
    for ours, each in ((loss.a, x.a), (loss.b, x.b)):
        assert torch.equal(ours, sad_kernels.cross_entropy(each, y, impl="triton"))


# --- vmap ----------------------------------------------------------------------------------------

ROW_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda s, t, y: sad_kernels.cross_entropy(
        s, y, label_smoothing=0.1, reduction="none", impl="triton"
    ),
    "kl_div": lambda s, t, y: sad_kernels.kl_div(
        s, t, labels=y, divergence="jsd", reduction="none", impl="triton"
    ),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 0, 0), (0, None, 1), (0, None, None)])
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_vmap_of_row_losses_is_a_loop(
    name: str, in_dims: tuple[int | None, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """One launch for all, not torch's loop over the batch, which warns where no filter sees it."""
    function, B = ROW_LOSSES[name], 3
    y = torch.randint(V, (B, N))
    y[:, 1] = -100
    whole = [torch.randn(B, N, V), torch.randn(B, N, V), y]
    given = [
        x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(whole, in_dims, strict=True)
    ]
    looped = torch.stack(
        [
            function(
                *(x if d is None else x.select(d, i) for x, d in zip(given, in_dims, strict=True))
            )
            for i in range(B)
        ]
    )
    assert torch.equal(torch.vmap(function, in_dims)(*given), looped)
    assert "batching rule" not in "".join(capfd.readouterr())  # torch's own loop says so


@pytest.mark.parametrize("dim", [None, 0])
def test_vmap_shares_or_splits_the_weights_of_classes(dim: int | None) -> None:
    B, y = 3, torch.randint(V, (N,))
    s, weight = torch.randn(B, N, V), torch.rand(B, V) if dim == 0 else torch.rand(V)
    rows = torch.rand(B, N)

    def losses(s: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        by_class = sad_kernels.cross_entropy(
            s, y, weight=weight, label_smoothing=0.1, reduction="none", impl="triton"
        )
        objective = Objective(ce_weight=1.0, kd_weight=0.0)
        out = sad_kernels.distill_loss(
            s, y, None, objective, token_weights=rows, reduction="none", impl="triton"
        )
        return by_class + out.loss

    looped = [losses(s[i], weight if dim is None else weight[i], rows[i]) for i in range(B)]
    assert torch.equal(torch.vmap(losses, (0, dim, 0))(s, weight, rows), torch.stack(looped))


@pytest.mark.parametrize("op", ON_LOGITS)
def test_vmap_of_any_loss_of_logits_is_a_loop(op: str) -> None:
    problem, ops, B = plain(op, torch.float32, ignore="some", N=3), bound("triton"), 3
    first = problem.wrt[0]
    x = torch.stack([(1 + i) * problem.leaves[first] for i in range(B)]).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return loss_of(problem.call(ops, {**problem.leaves, first: x}))

    losses, looped = torch.vmap(loss)(x), torch.stack([loss(each) for each in x])
    assert torch.equal(losses, looped)
    upstream = torch.randn(B)
    gradients = [torch.autograd.grad(each, x, upstream)[0] for each in (losses, looped)]
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_of_losses_of_hidden_states_is_refused(op: str, reduction: str) -> None:
    """Within vmap no input says that it requires a gradient, and so none would get one."""
    problem, ops = plain(op, torch.float32, reduction=reduction), bound("triton")
    hidden = problem.leaves["hidden"].expand(3, -1, -1).clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"must not be batched by vmap, got .*; pass "):
        torch.vmap(lambda h: loss_of(problem.call(ops, {**problem.leaves, "hidden": h})))(hidden)
