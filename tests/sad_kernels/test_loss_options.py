# Long because each option meets every function that takes it, every teacher, and both paths.
"""What people ask of a loss: weights, masks, soft labels, no labels, two divergences, caps, lse.

Every option against the specification by the one rule of tolerance, and what it must leave alone
bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from sad_kernels import Head, Objective, TeacherHidden, TeacherLogits, TeacherTopK
from sad_kernels.objective import DIVERGENCES, Divergence, Teacher
from support.oracle import IMPLS, Problem, assert_value, bound, judge, scales_of
from torch import Tensor

NAN, INF = math.nan, math.inf
IGNORED = -100
N, V, D, K = 6, 41, 8, 5
KEPT = torch.tensor([True, False, True, True, True, True])
ON_CE = torch.tensor([0.5, NAN, 0.0, 2.5, 1.0, 3.0])
ON_KD = torch.tensor([2.0, NAN, 1.5, 0.0, 0.0, 0.25])
OTHER = torch.tensor([True, True, False, True, False, False])

DTYPES = {"torch": (torch.float64, torch.bfloat16), "triton": (torch.float32, torch.bfloat16)}
EVERY = [(impl, dtype) for impl in IMPLS for dtype in DTYPES[impl]]


def grid(*default: Any, slow: Sequence[Any]) -> list[Any]:
    """What always runs, and what runs with ``-m slow`` only."""
    return [*default, *(pytest.param(x, marks=pytest.mark.slow) for x in slow)]


each_impl = pytest.mark.parametrize("impl", IMPLS)
each_dtype = pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        pytest.param(
            impl,
            dtype,
            id=f"{impl}-{str(dtype)[6:]}",
            marks=() if impl == "torch" or dtype == torch.float32 else pytest.mark.slow,
        )
        for impl, dtype in EVERY
    ],
)
each_divergence = pytest.mark.parametrize(
    "divergence",
    grid(
        "forward_kl", "jsd", "tvd", slow=sorted(DIVERGENCES.keys() - {"forward_kl", "jsd", "tvd"})
    ),
)
each_kind = pytest.mark.parametrize("kind", grid("logits", "bucket", slow=("hidden", "zero")))
given_or_linear = pytest.mark.parametrize("linear", grid(False, slow=(True,)))


def draw(*shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, dtype=torch.float64)


def some_labels() -> Tensor:
    return torch.randint(V, (N,)).where(KEPT, IGNORED)


def clean(weights: Tensor | None) -> Tensor:
    """Weights of rows in float64, 1 if there are none, 0 where ignored."""
    x = torch.ones(N) if weights is None else weights
    return x.double().where(KEPT, 0)


# --- Problems of the oracle ----------------------------------------------------------------------


def scales(
    objective: Objective,
    s: Tensor,  # [N, V]
    t: Tensor | None,
    upstream: Tensor,
    divisor: float | None,
    on_ce: Tensor,
    on_kd: Tensor,
    magnitude: float = 1.0,
) -> dict[str, Tensor]:
    """``scales_of`` for rows with weights, which are 0 where a row does not count."""
    keep = torch.ones(N, dtype=torch.bool)
    rest = None, magnitude, magnitude
    of_ce = scales_of(replace(objective, kd_weight=0.0), s, None, keep, upstream, *rest)
    only_kd = replace(objective, ce_weight=0.0, z_loss=0.0)
    of_kd = scales_of(only_kd, s, t, keep, upstream, *rest)
    loss, dlogits = (
        on_ce.abs() * of_ce[name] + on_kd.abs() * of_kd[name] for name in ("loss", "dlogits")
    )
    lse = s.logsumexp(-1).abs().clamp(min=1)
    kd = of_kd["loss"] / (objective.kd_weight or 1.0)
    return {
        "loss": loss if divisor is None else loss.sum() / divisor,
        "dlogits": dlogits / (divisor or 1.0),
        "ce": on_ce.abs().sum() * magnitude,
        "kd": (on_kd.abs() * kd).sum(),
        "z": (on_ce.abs() * 2 * lse).sum() * magnitude,
        "entropy": magnitude * torch.tensor(float(N)),
    }


def make_teacher(
    kind: str, dtype: torch.dtype, T: float, **transform: float
) -> tuple[Callable[[Mapping[str, Tensor]], Teacher], dict[str, Tensor], Tensor]:
    """How to build a teacher from leaves, the leaves, and its logits; -inf in rows without any."""
    t = draw(N, V)
    t[~KEPT] = NAN
    match kind:
        case "logits":
            leaves = {"teacher": t.to(dtype)}
            return lambda x: TeacherLogits(x["teacher"], None, **transform), leaves, t
        case "hidden":
            weight, hidden = draw(V, D, scale=1.0), draw(N, D, scale=1.0)
            hidden[~KEPT] = NAN
            leaves = {"th": hidden.to(dtype), "tw": weight.to(dtype)}
            return lambda x: TeacherHidden(x["th"], Head(x["tw"])), leaves, hidden @ weight.T
        case _:
            log_probs, ids = (t / T).log_softmax(-1).topk(K)
            log_probs[0, -1], ids[0, -1] = -INF, -3
            wide = {"log_probs": log_probs.to(torch.promote_types(dtype, torch.float32))}
            log_p = T * log_probs
            tail: Any = kind
            return lambda x: TeacherTopK(ids, x["log_probs"], tail), wide, log_p


def distill_problem(
    dtype: torch.dtype,
    objective: Objective,
    kind: str,
    *,
    linear: bool = False,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    kd_token_weights: Tensor | None = None,
    **options: Any,
) -> Problem:
    """One call of ``distill_loss`` or ``linear_distill_loss``."""
    without_labels = options.pop("without_labels", False)
    T = objective.temperature
    transform = {key: options.pop(f"teacher_{key}", None) for key in ("softcap", "logit_scale")}
    teacher, leaves, t = make_teacher(
        kind, dtype, T, **{key: x for key, x in transform.items() if x is not None}
    )
    y = None if without_labels else some_labels()
    if without_labels:
        assert kind in ("logits", "bucket", "zero")
        for name in leaves:
            leaves[name][~KEPT] = leaves[name][KEPT][:1]
        t[~KEPT] = t[KEPT][:1]
    counts = KEPT | without_labels
    if linear:
        hidden = draw(N, D, scale=1.0)
        head = {"weight": draw(V, D, scale=1.0).to(dtype), "bias": draw(V).to(dtype)}
        s = hidden.to(dtype).double() @ head["weight"].double().T + head["bias"].double()
        leaves |= {"hidden": hidden.masked_fill(~counts[:, None], NAN).to(dtype), **head}
        wrt = ("hidden", "weight", "bias")
    else:
        s = draw(N, V)
        leaves |= {"logits": s.masked_fill(~counts[:, None], NAN).to(dtype)}
        wrt = ("logits",)

    how = {
        "reduction": reduction,
        "token_weights": token_weights,
        "kd_token_weights": kd_token_weights,
        **options,
    }

    def call(ops: Any, x: dict[str, Tensor]) -> Any:
        if linear:
            head = Head(x["weight"], x["bias"])
            return ops.linear_distill_loss(x["hidden"], head, y, teacher(x), objective, **how)
        return ops.distill_loss(x["logits"], y, teacher(x), objective, **how)

    shape = (N,) if reduction == "none" else ()
    upstream = torch.randn(shape)
    given = 0 if reduction != "mean" else int(counts.sum())
    divisor = {"none": None, "sum": 1.0, "mean": float(options.get("num_items") or given)}
    on_ce = clean(token_weights)
    on_kd = on_ce if kd_token_weights is None else clean(kd_token_weights)
    if without_labels:
        on_ce, on_kd = torch.ones(N).double(), torch.ones(N).double()
    finite = [x.nan_to_num(0.0) for x in (s, t)]
    magnitude = max(1.0, float(s.abs().max()), 5.0 if kind == "hidden" else 1.0) if linear else 1.0
    if kind == "hidden":
        magnitude = max(magnitude, float(finite[1].abs().max()))
    return Problem(
        case=f"{kind} {objective.divergence} {how}",
        call=call,
        leaves=leaves,
        wrt=wrt,
        upstream=upstream,
        scales=scales(
            objective, finite[0], finite[1], upstream, divisor[reduction], on_ce, on_kd, magnitude
        ),
        magnitude=magnitude,
        zeros={name: ~counts for name in ("dlogits", "dhidden") if name[1:] in wrt},
    )


def ce_problem(
    dtype: torch.dtype,
    *,
    soft: bool = False,
    by_class: bool = False,
    linear: bool = False,
    reduction: str = "mean",
    **options: Any,
) -> Problem:
    """One call of ``cross_entropy`` or ``linear_cross_entropy``."""
    y = some_labels()
    labels = draw(N, V).softmax(-1).to(dtype) if soft else y
    counts = KEPT | soft
    weight = None
    if by_class:
        weight = torch.linspace(0, 3, V)[torch.randperm(V)]
        options["class_weight" if linear else "weight"] = weight
    leaves: dict[str, Tensor]
    if linear:
        leaves = {
            "hidden": draw(N, D, scale=1.0).masked_fill(~counts[:, None], NAN).to(dtype),
            "weight": draw(V, D, scale=1.0).to(dtype),
        }
        s = leaves["hidden"].double() @ leaves["weight"].double().T
    else:
        s = draw(N, V)
        leaves = {"logits": s.masked_fill(~counts[:, None], NAN).to(dtype)}
    s = s.nan_to_num(0.0)

    def call(ops: Any, x: dict[str, Tensor]) -> Tensor:
        how = {"reduction": reduction, **options}
        if linear:
            return ops.linear_cross_entropy(x["hidden"], x["weight"], labels, **how)
        return ops.cross_entropy(x["logits"], labels, **how)

    objective = Objective(ce_weight=1.0, kd_weight=0.0, z_loss=options.get("z_loss", 0.0))
    upstream = torch.randn((N,) if reduction == "none" else ())
    divisor = None if reduction == "none" else 1.0
    if reduction == "mean":
        mass = float(counts.sum()) if weight is None or soft else float(weight[y[KEPT]].sum())
        divisor = float(options.get("num_items", mass))
    largest = 1.0 if weight is None else float(weight.max())
    magnitude = max(1.0, float(s.abs().max())) if linear else 1.0
    on_ce = torch.full((N,), largest).double().where(counts, 0)
    return Problem(
        case=f"ce {options} {reduction}",
        call=call,
        leaves=leaves,
        wrt=tuple(leaves),
        upstream=upstream,
        scales=scales(objective, s, None, upstream, divisor, on_ce, on_ce, magnitude),
        magnitude=magnitude,
        zeros={name: ~counts for name in ("dlogits", "dhidden") if name[1:] in leaves},
    )


# --- Cross-entropy -------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("reduction", grid("mean", "none", slow=("sum",)))
@pytest.mark.parametrize("label_smoothing", grid(0.0, 0.1, slow=(1.0,)))
@pytest.mark.parametrize("linear", [False, True])
def test_weights_of_classes(
    linear: bool, label_smoothing: float, reduction: str, impl: str, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": 0.01}
    judge(ce_problem(dtype, by_class=True, linear=linear, reduction=reduction, **options),
          bound(impl))  # fmt: skip


@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("by_class", [False, True])
def test_labels_that_are_probabilities(
    by_class: bool, label_smoothing: float, reduction: str, impl: str, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": 0.01}
    options["valid_vocab"] = V - 3
    if by_class:
        options.pop("valid_vocab")
    judge(ce_problem(dtype, soft=True, by_class=by_class, reduction=reduction, **options),
          bound(impl))  # fmt: skip


@each_dtype
def test_full_smoothing(impl: str, dtype: torch.dtype) -> None:
    for linear in (False, True):
        judge(ce_problem(dtype, linear=linear, label_smoothing=1.0), bound(impl))


@each_impl
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_weighted_cross_entropy_is_torchs(label_smoothing: float, impl: str) -> None:
    """Means over classes divide by the labels' weights, over probabilities by the rows."""
    s, y = draw(N, V).float(), some_labels()
    weight, soft = torch.linspace(0, 3, V), draw(N, V).softmax(-1).float()
    for labels in (y, soft):
        options: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing}
        theirs = torch.nn.functional.cross_entropy(s, labels, **options)
        ours = bound(impl).cross_entropy(s, labels, **options)
        assert_value(ours, theirs, scale=16.0)


@each_impl
def test_a_class_without_weight_does_not_count(impl: str) -> None:
    """0 times an infinite term is 0, in a row that torch would make NaN."""
    s = draw(N, V).float()
    s[:, 3] = -INF
    s.requires_grad_()
    weight = torch.ones(V)
    weight[3] = 0
    for labels in (torch.full((N,), 3), torch.nn.functional.one_hot(torch.full((N,), 3), V)):
        labels = labels.float() if labels.ndim == 2 else labels
        loss = bound(impl).cross_entropy(s, labels, weight=weight, reduction="sum")
        assert float(loss.detach()) == 0
        assert not torch.autograd.grad(loss, s)[0].any()


@each_impl
def test_no_weight_at_all_gives_zero(impl: str) -> None:
    s = draw(N, V).float().requires_grad_()
    loss = bound(impl).cross_entropy(s, some_labels(), weight=torch.zeros(V))
    assert float(loss.detach()) == 0 and not torch.autograd.grad(loss, s)[0].any()


# --- Softcap and scale of given logits -----------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("reduction", grid("mean", slow=("none",)))
def test_given_logits_have_a_scale_and_a_softcap(
    reduction: str, impl: str, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"softcap": 3.0, "logit_scale": 0.6}
    judge(ce_problem(dtype, label_smoothing=0.1, reduction=reduction, **options), bound(impl))
    both: dict[str, Any] = options | {"teacher_softcap": 4.0, "teacher_logit_scale": 1.7}
    for divergence in ("forward_kl", "jsd"):
        objective = Objective(ce_weight=0.4, divergence=divergence, temperature=2.0)
        judge(distill_problem(dtype, objective, "logits", reduction=reduction, **both), bound(impl))
    for kind in ("hidden", "bucket"):
        objective = Objective(ce_weight=0.4, temperature=2.0)
        judge(distill_problem(dtype, objective, kind, reduction=reduction, **options), bound(impl))
    of_teacher: dict[str, Any] = {"teacher_softcap": 4.0, "teacher_logit_scale": 1.7}
    problem = distill_problem(dtype, Objective(), "logits", linear=True, **of_teacher)
    judge(problem, bound(impl))


@each_divergence
@each_dtype
def test_kl_div_has_scales_and_softcaps(
    impl: str, dtype: torch.dtype, divergence: Divergence
) -> None:
    s, t = draw(N, V).to(dtype), draw(N, V).to(dtype)
    how: dict[str, Any] = {"softcap": 3.0, "logit_scale": 0.6}
    how |= {"teacher_softcap": 4.0, "teacher_logit_scale": 1.7}
    problem = Problem(
        case=divergence,
        call=lambda ops, x: ops.kl_div(
            x["logits"], x["teacher"], divergence=divergence, reduction="none", **how
        ),
        leaves={"logits": s, "teacher": t},
        wrt=("logits",),
        upstream=torch.randn(N),
        scales={"loss": torch.full((N,), 8.0), "dlogits": torch.full((N,), 8.0)},
    )
    judge(problem, bound(impl))


# --- num_items, lse, no labels -------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_num_items_replace_the_divisor(kind: Callable[[int], Any], impl: str) -> None:
    ops, items = bound(impl), kind(7)
    s, t, y = draw(N, V).float(), draw(N, V).float(), some_labels()
    hidden, weight = draw(N, D).float(), draw(V, D).float()
    by_class = torch.linspace(0, 1, V)
    for of in (
        lambda **how: ops.cross_entropy(s, y, **how),
        lambda **how: ops.cross_entropy(s, y, weight=by_class, **how),
        lambda **how: ops.cross_entropy(s, t.softmax(-1), **how),
        lambda **how: ops.kl_div(s, t, labels=y, **how),
        lambda **how: ops.kl_div(s, t, **how),
        lambda **how: ops.linear_cross_entropy(hidden.nan_to_num(), weight, y, **how),
        lambda **how: ops.distill_loss(s, y, TeacherLogits(t), Objective(), **how).loss,
    ):
        assert_value(of(num_items=items) * 7, of(reduction="sum"), scale=100.0)
        for reduction in ("sum", "none"):
            with pytest.raises(ValueError, match=r"num_items must be None .*got.*; "):
                of(num_items=items, reduction=reduction)


@each_impl
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_lse_is_in_the_callers_order(reduction: str, impl: str) -> None:
    """[b, s, V] that is laid out [s, b, V] in memory."""
    s = draw(3, 2, V).float().transpose(0, 1)
    y = torch.randint(V, (2, 3))
    y[0, 1] = IGNORED
    out = bound(impl).distill_loss(
        s, y, None, Objective(ce_weight=1.0, kd_weight=0.0), reduction=reduction
    )
    expected = s.double().logsumexp(-1).masked_fill(y == IGNORED, 0).flatten()
    assert out.lse.shape == (6,) and not out.lse.requires_grad
    assert_value(out.lse, expected, scale=10.0)
    hidden, weight = draw(3, 2, D).float().transpose(0, 1), draw(V, D).float()
    linear = bound(impl).linear_distill_loss(
        hidden, Head(weight), y, None, Objective(ce_weight=1.0, kd_weight=0.0), reduction=reduction
    )
    z = (hidden.double() @ weight.double().T).logsumexp(-1).masked_fill(y == IGNORED, 0)
    assert_value(linear.lse, z.flatten(), scale=100.0)


@pytest.mark.few(7)
@each_dtype
@pytest.mark.parametrize("kind", ["logits", "bucket"])
@pytest.mark.parametrize("linear", [False, True])
def test_without_labels_every_row_counts(
    linear: bool, kind: str, impl: str, dtype: torch.dtype
) -> None:
    for reduction in ("mean", "none"):
        objective = Objective(temperature=2.0, z_loss=0.01, label_smoothing=0.1)
        problem = distill_problem(
            dtype, objective, kind, linear=linear, reduction=reduction, without_labels=True
        )
        judge(problem, bound(impl))


# --- Weights of rows -----------------------------------------------------------------------------


@pytest.mark.few(3)
@each_dtype
@each_kind
@pytest.mark.parametrize("linear", [False, True])
def test_weights_of_rows(linear: bool, kind: str, impl: str, dtype: torch.dtype) -> None:
    objective = Objective(
        ce_weight=0.4, kd_weight=0.7, z_loss=0.01, label_smoothing=0.1, temperature=2.0
    )
    for reduction in ("mean", "none"):
        every: tuple[dict[str, Any], ...] = (
            {"token_weights": ON_CE},
            {"token_weights": ON_CE, "kd_token_weights": ON_KD},
            {"kd_token_weights": ON_KD},
        )
        for weights in every:
            problem = distill_problem(
                dtype, objective, kind, linear=linear, reduction=reduction, **weights
            )
            judge(problem, bound(impl))


@each_impl
@each_divergence
@pytest.mark.parametrize("kind", ["logits", "bucket"])
def test_weights_of_rows_on_every_divergence(kind: str, divergence: Divergence, impl: str) -> None:
    objective = Objective(kd_weight=0.7, temperature=2.0, divergence=divergence, beta=0.3)
    weights: dict[str, Any] = {"token_weights": ON_CE, "kd_token_weights": ON_KD}
    judge(distill_problem(torch.float32, objective, kind, reduction="none", **weights), bound(impl))


def garbage(teacher: Teacher, rows: Tensor) -> Teacher:
    """The teacher with rows that cannot be used."""
    match teacher:
        case TeacherLogits(logits=x):
            return TeacherLogits(x.masked_fill(rows[:, None], NAN))
        case TeacherHidden(hidden=x, head=head):
            return TeacherHidden(x.masked_fill(rows[:, None], NAN), head)
        case TeacherTopK(ids=ids, log_probs=x, tail=tail):
            wrong = ids.masked_fill(rows[:, None], 7)  # the same id K times
            return TeacherTopK(wrong, x.masked_fill(rows[:, None], NAN), tail)


@each_impl
@each_divergence
@each_kind
@given_or_linear
def test_a_weight_of_zero_reads_nothing_of_the_teachers_row(
    linear: bool, kind: str, divergence: Divergence, impl: str
) -> None:
    """Whatever the row holds, all results have the same bits, and its divergence adds 0."""
    if kind == "zero" and DIVERGENCES[divergence].needs_full_support:
        pytest.skip("refused for a teacher without a tail")
    objective = Objective(ce_weight=1.0, temperature=2.0, divergence=divergence)
    make, leaves, _ = make_teacher(kind, torch.float32, 2.0)
    some = {name: x.where(KEPT[:, None], x[:1]) if len(x) == N else x for name, x in leaves.items()}
    teacher = make(some)
    weights, y = ON_KD.where(KEPT, 1.0), torch.randint(V, (N,))
    s = draw(N, V).float()
    s[3, 5:9] = -INF  # in a row that is not compared: no divergence of it is finite
    s[4, 0] = 50.0  # the argmax of a teacher's row of which nothing is known
    s.requires_grad_()
    hidden, head = draw(N, D).float().requires_grad_(), Head(draw(V, D).float())

    def results(of: Teacher, **how: Any) -> list[Tensor]:
        if linear:
            out = bound(impl).linear_distill_loss(hidden, head, y, of, objective, **how)
        else:
            out = bound(impl).distill_loss(s, y, of, objective, **how)
        leaf = hidden if linear else s
        grad = torch.autograd.grad(out.loss, leaf, torch.ones_like(out.loss))
        return [x.detach() for x in (*out, *grad)]

    for reduction in ("mean", "none"):
        how: dict[str, Any] = {"kd_token_weights": weights, "reduction": reduction}
        plain, dirty = results(teacher, **how), results(garbage(teacher, weights == 0), **how)
        assert all(torch.equal(a, b) for a, b in zip(plain, dirty, strict=True))
        assert plain[-1].isfinite().all() and plain[2].isfinite()
    off = results(teacher, kd_token_weights=torch.zeros(N))
    assert off[2] == 0 and off[6] == 0  # kd, agree


@each_impl
def test_a_weight_of_zero_switches_an_infinite_row_off(impl: str) -> None:
    s = draw(N, V).float()
    s[2, 4] = -INF
    s.requires_grad_()
    y = torch.full((N,), 4)
    on_ce = torch.ones(N)
    on_ce[2] = 0
    out = bound(impl).distill_loss(
        s, y, None, Objective(ce_weight=1.0, kd_weight=0.0, z_loss=0.1), token_weights=on_ce
    )
    assert out.loss.isfinite() and out.ce.isfinite()
    (grad,) = torch.autograd.grad(out.loss, s)
    assert grad.isfinite().all() and not grad[2].any() and grad[3].any()


@each_impl
def test_a_foreign_label_is_nan_whatever_its_weight(impl: str) -> None:
    y = torch.randint(V, (N,))
    y[2] = V
    out = bound(impl).distill_loss(
        draw(N, V).float(), y, TeacherLogits(draw(N, V).float()), Objective(ce_weight=1.0),
        token_weights=torch.zeros(N), reduction="none",
    )  # fmt: skip
    assert out.loss.isnan().tolist() == [row == 2 for row in range(N)]


@each_impl
@pytest.mark.parametrize("weight", [1e-3, 1.0, 3e4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_large_and_small_weights_keep_16_bit_gradients(
    weight: float, reduction: str, impl: str
) -> None:
    """The scale of what fp16 stores between two products follows the weights."""
    objective = Objective(ce_weight=0.4, divergence="reverse_kl", temperature=2.0)
    weights = torch.full((N,), weight).where(KEPT, INF)
    weights[3] /= 100
    make, leaves, _ = make_teacher("logits", torch.float16, 2.0)
    y = some_labels()
    hidden, head = draw(N, D, scale=0.3).half(), Head(draw(V, D, scale=0.3).half())
    hidden[~KEPT] = NAN

    def gradient(ops: Any, hidden: Tensor, factor: float, **how: Any) -> Tensor:
        own = hidden.detach().requires_grad_()
        leaf = Head(head.weight.to(hidden.dtype))
        of = {name: x.to(hidden.dtype) for name, x in leaves.items()}
        out = ops.linear_distill_loss(own, leaf, y, make(of), objective, **how)
        return torch.autograd.grad(out.loss * factor, own, torch.ones_like(out.loss))[0]

    how = {"token_weights": weights, "reduction": reduction}
    ours = gradient(bound(impl), hidden, 1 / weight, **how)
    exact = gradient(bound("reference"), hidden.double(), 1 / weight, **how)
    error = (ours.double() - exact).norm() / exact.norm()
    assert error < 2e-3, error  # a few roundings to 11 bits, added up


# --- Two divergences -----------------------------------------------------------------------------


@each_dtype
@each_kind
@given_or_linear
def test_rows_of_two_divergences(linear: bool, kind: str, impl: str, dtype: torch.dtype) -> None:
    objective = Objective(
        ce_weight=0.4,
        divergence="skew_forward_kl",
        beta=0.1,
        other_divergence="skew_reverse_kl",
        other_beta=0.3,
        temperature=2.0,
    )
    for reduction in ("mean", "none"):
        problem = distill_problem(
            dtype, objective, kind, linear=linear, reduction=reduction, other_rows=OTHER
        )
        judge(problem, bound(impl))


@each_impl
@each_divergence
@pytest.mark.parametrize("kind", ["logits", "bucket"])
def test_each_row_has_the_bits_of_its_own_divergence(
    kind: str, divergence: Divergence, impl: str
) -> None:
    """The mask may be given in the rows' shape, and weights of rows apply to either divergence."""
    first = Objective(ce_weight=0.5, divergence="forward_kl", temperature=2.0)
    second = replace(first, divergence=divergence, beta=0.3)
    both = replace(first, other_divergence=divergence, other_beta=0.3)
    make, leaves, _ = make_teacher(kind, torch.float32, 2.0)
    teacher, y = make(leaves), some_labels()
    s = draw(N, V).float().masked_fill(~KEPT[:, None], NAN).requires_grad_()
    weights: dict[str, Any] = {"token_weights": ON_CE, "kd_token_weights": ON_KD}

    def results(objective: Objective, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
        ops = bound(impl)
        out = ops.distill_loss(s, y, teacher, objective, reduction="none", **weights, **how)
        (grad,) = torch.autograd.grad(out.loss, s, torch.ones(N))
        return out.loss.detach(), grad, out.lse

    ours = results(both, other_rows=OTHER)
    for a, b, mine in zip(results(first), results(second), ours, strict=True):
        mask = OTHER[:, None] if a.ndim == 2 else OTHER
        assert torch.equal(mine, torch.where(mask, b, a))


@each_impl
def test_a_choice_of_divergence_needs_both_of_its_arguments(impl: str) -> None:
    s, y, teacher = draw(N, V).float(), some_labels(), TeacherLogits(draw(N, V).float())
    two = Objective(other_divergence="jsd")
    for objective, how in ((two, {}), (Objective(), {"other_rows": OTHER})):
        with pytest.raises(ValueError, match=r"other_rows must be given together .*got.*; "):
            bound(impl).distill_loss(s, y, teacher, objective, **how)


# --- The default device --------------------------------------------------------------------------


@each_divergence
def test_the_default_device_need_not_be_the_tensors(divergence: Divergence) -> None:
    """A script on a GPU sets one, and computes a loss of tensors on the CPU."""
    h, w, h_t, w_t = draw(N, 8), draw(130, 8), draw(N, 4), draw(130, 4)
    h, w, h_t, w_t = (x.float() for x in (h, w, h_t, w_t))
    y, s, t = torch.arange(N), h @ w.T, TeacherLogits(h_t @ w_t.T)
    ops, objective = bound("torch"), Objective(divergence=divergence, label_smoothing=0.1)
    hidden = TeacherHidden(h_t, Head(w_t))
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: ops.cross_entropy(s, y, label_smoothing=0.1),
        lambda: ops.kl_div(s, t.logits, divergence=divergence),
        lambda: ops.distill_loss(s, y, t, objective).loss,
        lambda: ops.linear_cross_entropy(h, w, y),
        lambda: ops.linear_distill_loss(h, Head(w), y, hidden, objective).loss,
    )
    for x in (s, h, w):
        x.requires_grad_(x.is_leaf)
    for call in calls:
        expected = call()
        with torch.device("meta"):
            assert torch.equal(call(), expected)


# --- A teacher without any token -----------------------------------------------------------------


@each_impl
@each_divergence
def test_a_top_k_row_without_any_token_is_zero(divergence: Divergence, impl: str) -> None:
    if DIVERGENCES[divergence].needs_full_support:
        pytest.skip("refused for a teacher without a tail")
    make, leaves, _ = make_teacher("zero", torch.float32, 1.0)
    log_probs = leaves["log_probs"].masked_fill((torch.arange(N) == 2)[:, None], -INF)
    s = draw(N, V).float().requires_grad_()
    objective = Objective(divergence=divergence)
    teacher = make({"log_probs": log_probs.nan_to_num(0.0, neginf=-INF)})
    y = some_labels()
    out = bound(impl).distill_loss(s, y, teacher, objective, reduction="none")
    (grad,) = torch.autograd.grad(out.loss, s, torch.ones(N))
    loss = out.loss.detach()
    assert float(loss[2]) == 0 and not grad[2].any()
    assert loss.isfinite().all() and grad[3].any()
