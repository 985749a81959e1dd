"""Teachers with another tokenizer: columns of either side summed up by outcome."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from sad_kernels import (
    Head,
    Objective,
    Outcomes,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    VocabShard,
    linear_memory_bytes,
)
from sad_kernels.objective import Tail, Teacher
from support.allocations import peak_bytes
from support.oracle import (
    ALL,
    IMPLS,
    IN_FLOAT64,
    Problem,
    assert_value,
    bound,
    dtypes_of,
    judge,
    scales_of,
)
from torch import Tensor

V, V_T, COUNT, N, K = 30, 26, 14, 6, 4
"""Widths of student and teacher, outcomes, rows, and ids of a top-k teacher."""


def drawn(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(columns: int, count: int, seed: int) -> Tensor:
    """Every outcome once, then any, in an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    more = torch.randint(count, (columns - count,), generator=generator)
    order = torch.randperm(columns, generator=generator)
    return torch.cat((torch.arange(count), more))[order].int()


OUTCOMES = Outcomes(table(V, COUNT, 1), table(V_T, COUNT, 2), COUNT)
JOINT = Objective(ce_weight=0.4, kd_weight=0.6, temperature=2.0, label_smoothing=0.1, z_loss=0.01)
every_impl = pytest.mark.parametrize("impl", IMPLS)
of_all = pytest.mark.parametrize("impl", ALL)


def summed(p: Tensor, of: Tensor, count: int) -> Tensor:
    """The sums of probabilities by outcome, one column after another."""
    out = p.new_zeros(len(p), count)
    for column, outcome in enumerate(of.tolist()):
        out[:, outcome] += p[:, column]
    return out


def top_k(rows: int, tail: Tail, count: int = COUNT) -> TeacherTopK:
    """K distinct outcomes with eight tenths of the mass."""
    ids = torch.stack(
        [torch.randperm(count, generator=torch.Generator().manual_seed(i))[:K] for i in range(rows)]
    )
    return TeacherTopK(ids, drawn(rows, K, seed=9, scale=1.0).log_softmax(-1) + math.log(0.8), tail)


# --- Values ---------------------------------------------------------------------------------------


@of_all
def test_by_hand(impl: str) -> None:
    """p = [1/2, 1/2], q = [1/2, 1/4 + 1/4] of columns [1/8, 3/8] and [1/4, 1/4]: agreement; and
    q = [1/4, 3/4], of which the first is two columns."""
    tables = Outcomes(torch.tensor([0, 0, 1, 1]).int(), torch.tensor([1, 0]).int(), 2)
    s = torch.tensor([[1 / 8, 3 / 8, 1 / 4, 1 / 4], [1 / 16, 3 / 16, 1 / 2, 1 / 4]]).log()
    s.requires_grad_()
    loss = bound(impl).kl_div(s, torch.zeros(2, 2), outcomes=tables, reduction="none")
    assert_value(loss, [0.0, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)])
    (ds,) = torch.autograd.grad(loss.sum(), s)
    # q_v (1 - p/q) with p/q = 2 and 2/3
    assert_value(ds, [[0.0] * 4, [-1 / 16, -3 / 16, 1 / 6, 1 / 12]])


@of_all
def test_outcomes_without_mass(impl: str) -> None:
    """One that the teacher has no column for costs q; one that the student has none for all."""
    tables = Outcomes(torch.tensor([0, 1]).int(), torch.tensor([0, 0]).int(), 2)
    s = torch.zeros(1, 2, requires_grad=True)
    loss = bound(impl).kl_div(s, torch.zeros(1, 2), outcomes=tables)
    assert_value(loss, math.log(2))
    assert_value(torch.autograd.grad(loss, s)[0], [[-0.5, 0.5]])

    tables = Outcomes(torch.tensor([0, 0]).int(), torch.tensor([0, 1]).int(), 2)
    t = torch.tensor([[0.0, 0.0], [0.0, -math.inf]])
    loss = bound(impl).kl_div(torch.zeros(2, 2), t, outcomes=tables, reduction="none")
    assert loss[0] == math.inf and loss[1] == 0
    teacher = TeacherTopK(torch.tensor([[1], [0]]), torch.zeros(2, 1))
    out = bound(impl).distill_loss(
        torch.zeros(2, 2), None, teacher, Objective(), outcomes=tables, reduction="none"
    )
    assert out.loss[0] == math.inf and out.loss[1] == 0


@of_all
def test_agreement_is_of_outcomes(impl: str) -> None:
    tables = Outcomes(torch.tensor([1, 0, 1]).int(), torch.tensor([0, 1]).int(), 2)
    s = torch.tensor([[0.0, 2.0, 1.0]]).repeat(3, 1)
    t = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    for teacher in (TeacherLogits(t), TeacherTopK(torch.tensor([[0, 1]] * 3), t.log_softmax(-1))):
        out = bound(impl).distill_loss(s, None, teacher, Objective(), outcomes=tables)
        assert float(out.agree) == 2


@every_impl
@pytest.mark.parametrize("order", ["equal", "permuted"])
def test_equal_tokenizers_give_the_ordinary_loss(order: str, impl: str) -> None:
    """To 1e-6, and with permuted columns on the teacher's side too; gradients alike."""
    columns = torch.arange(V)
    if order == "permuted":
        columns = torch.randperm(V, generator=torch.Generator().manual_seed(3))
    tables = Outcomes(torch.arange(V).int(), columns.int(), V)
    h, w = drawn(N, 8, scale=1.0), drawn(V, 8, seed=1, scale=1.0)
    h_t, w_t = drawn(N, 6, seed=2, scale=1.0), drawn(V, 6, seed=3, scale=1.0)
    y = torch.tensor([1, 2, -100, 3, 4, 5])
    found = []
    for teacher, outcomes in (
        (TeacherHidden(h_t, Head(w_t)), None),
        (TeacherHidden(h_t, Head(w_t[columns])), tables),
    ):
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        loss = partial(bound(impl).linear_distill_loss, leaves[0], Head(leaves[1]), y, teacher)
        out = loss(JOINT, outcomes=outcomes)
        found.append((*out[:-1], *torch.autograd.grad(out.loss, leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_impl
def test_equal_sides_give_exactly_nothing(impl: str) -> None:
    s = drawn(N, V).requires_grad_()
    tables = Outcomes(OUTCOMES.student, OUTCOMES.student, COUNT)
    loss = bound(impl).kl_div(s, s.detach(), outcomes=tables, reduction="none", temperature=2.0)
    assert not loss.any() if impl == "torch" else loss.abs().max() < 1e-7
    assert torch.autograd.grad(loss.sum(), s)[0].abs().max() < 1e-7


# --- Against the oracle ---------------------------------------------------------------------------

DISTRIBUTIONS = ("plain", "offset", "near", "sure", "impossible")


def logits_of(distribution: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    s, t = drawn(N, V), drawn(N, V_T, seed=1)
    match distribution:
        case "offset":
            s, t = s + 1e4, t - 1e4
        case "near":  # the teacher's outcomes have nearly the student's probabilities
            logs = summed(s.softmax(-1), OUTCOMES.student, COUNT).log()
            size = torch.bincount(OUTCOMES.teacher, minlength=COUNT).log()
            t = (logs - size)[:, OUTCOMES.teacher.long()] + 1e-3 * t
        case "sure":  # of a column whose outcome's others lie 300 nats below; and everything else
            s, t = 100 * s, 10 * t
        case "impossible":
            s[:, 3:20:4] = -math.inf
            lost = summed((s == -math.inf).float(), OUTCOMES.student, COUNT)
            size = torch.bincount(OUTCOMES.student, minlength=COUNT)
            t = t.masked_fill((lost[0] == size)[OUTCOMES.teacher.long()], -math.inf)
            t[0, 5] = -math.inf
    return s.to(dtype), t.to(dtype)


def on_logits(
    dtype: torch.dtype, kind: str, distribution: str = "plain", cut: bool = False, **objective: Any
) -> Problem:
    """A joint loss per call; the third row is ignored, the fourth without a divergence."""
    s, t = logits_of(distribution, dtype)
    width, width_t = (V + 2, V_T + 3) if cut else (V, V_T)
    y = torch.tensor([0, 1, -100, 2, 4, 5])
    keep, on_kd = y != -100, torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0, 1.0])
    usual: dict[str, Any] = {"ce_weight": 0.3, "kd_weight": 0.7, "temperature": 2.0}
    how = Objective(**usual | objective)
    leaves = {"logits": torch.nn.functional.pad(s, (0, width - V), value=math.nan)}
    leaves["logits"][2] = math.nan
    tables = Outcomes(
        torch.cat((OUTCOMES.student, OUTCOMES.student[: width - V])),
        torch.cat((OUTCOMES.teacher, OUTCOMES.teacher[: width_t - V_T])),
        COUNT,
    )
    if kind == "logits":
        leaves["t"] = torch.nn.functional.pad(t, (0, width_t - V_T), value=math.nan)
        leaves["t"][2:4] = math.nan

    def call(ops: Any, given: dict[str, Tensor]) -> Any:
        z, valid = given["logits"], V if cut else None
        if kind != "logits":
            ids, log_probs, _ = vars(top_k(N, kind)).values()  # pyright: ignore
            ids = ids.masked_fill(~keep[:, None], -7)
            z = z[:, :V]
            own = Outcomes(OUTCOMES.student, OUTCOMES.teacher, COUNT)
            teacher: Teacher = TeacherTopK(ids, log_probs, kind)  # pyright: ignore
            return ops.distill_loss(z, y, teacher, how, kd_token_weights=on_kd, outcomes=own)
        teacher = TeacherLogits(given["t"], V_T if cut else None)
        return ops.distill_loss(
            z[:, :valid],
            y,
            teacher,
            how,
            kd_token_weights=on_kd,
            outcomes=(Outcomes(tables.student[:V], tables.teacher, COUNT)),
        )

    s64 = s.double().masked_fill(~keep[:, None], 0)
    scales = scales_of(how, s64, t.double(), keep, torch.ones(()), float(keep.sum()))
    zeros = {"dlogits": torch.zeros_like(leaves["logits"], dtype=torch.bool)}
    zeros["dlogits"][2], zeros["dlogits"][:, V:] = True, True
    return Problem(
        f"{kind} {distribution}", call, leaves, ("logits",), torch.ones(()), scales, zeros=zeros
    )


@pytest.mark.parametrize(
    ("dtype", "impl"),
    [
        pytest.param(dtype, impl, id=f"{str(dtype).removeprefix('torch.')}-{impl}")
        for impl in IMPLS
        for dtype in dtypes_of(impl)
    ],
)
@pytest.mark.parametrize("kind", ["logits", "bucket", "zero"])
def test_every_kind_of_teacher(kind: str, dtype: torch.dtype, impl: str) -> None:
    judge(on_logits(dtype, kind, cut=True), bound(impl))


@every_impl
@pytest.mark.parametrize(
    ("kind", "distribution"),
    [*(("logits", each) for each in DISTRIBUTIONS[1:]), ("bucket", "offset"), ("bucket", "sure")],
)
def test_extreme_logits(distribution: str, kind: str, impl: str) -> None:
    judge(on_logits(torch.float32, kind, distribution, temperature=1.0), bound(impl))


@every_impl
@pytest.mark.parametrize("kind", ["hidden", "logits", "bucket"])
def test_hidden_states(kind: str, impl: str) -> None:
    """In one piece and in many; both sides with padding, bias, scale and softcap of their own."""
    h, w = drawn(N, 8, scale=1.0), drawn(V + 2, 8, seed=1, scale=1.0)
    b, h_t, w_t = drawn(V + 2, seed=4), drawn(N, 6, seed=2), drawn(V_T + 3, 6, seed=3, scale=0.4)
    t = (h_t @ w_t.T)[:, :V_T].contiguous()
    y = torch.tensor([0, 1, -100, 2, 4, 5])
    h[2], h_t[2:4], t[2:4], w[V:], w_t[V_T:] = (math.nan,) * 5
    keep, on_kd = y != -100, torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0, 1.0])

    def call(ops: Any, x: dict[str, Tensor]) -> Any:
        head = Head(x["weight"], x["bias"], 0.5, 20.0, V)
        match kind:
            case "hidden":
                teacher: Teacher = TeacherHidden(
                    x["teacher"], Head(w_t.to(x["teacher"].dtype), valid_vocab=V_T)
                )
            case "logits":
                teacher = TeacherLogits(x["teacher"], softcap=9.0)
            case _:
                teacher = top_k(N, "bucket")
        return ops.linear_distill_loss(
            x["hidden"], head, y, teacher, JOINT, kd_token_weights=on_kd, outcomes=OUTCOMES
        )

    leaves = {"hidden": h, "weight": w, "bias": b, "teacher": h_t if kind == "hidden" else t}
    s = 0.5 * (h @ w[:V].T + b[:V]).double().masked_fill(~keep[:, None], 0)
    scales = scales_of(
        JOINT, s, s, keep, torch.ones(()), float(keep.sum()), float(s.abs().max()), 30.0
    )
    scales = {name: x for name, x in scales.items() if name != "dlogits"}
    zeros = {name: torch.zeros_like(leaves[name[1:]], dtype=torch.bool) for name in ("dhidden",)}
    zeros["dhidden"][2] = True
    problem = Problem(
        kind, call, leaves, ("hidden", "weight", "bias"), torch.ones(()), scales,
        float(s.abs().max()), zeros,
    )  # fmt: skip
    judge(problem, bound(impl))
    if kind == "hidden":
        judge(problem, bound(impl, 100))


@pytest.mark.skipif("triton" not in IMPLS, reason="triton is not installed")
def test_sums_that_reach_over_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernel: an outcome's columns begin in one tile and end two tiles on."""
    from sad_kernels._triton import outcomes

    monkeypatch.setattr(outcomes, "BLOCK", 32)
    monkeypatch.setattr(outcomes, "SPREAD_BLOCK", 32)
    width = 75
    tables = Outcomes(table(width, 3, 5), table(40, 3, 6), 3)
    s, t = drawn(2, width).requires_grad_(), drawn(2, 40, seed=1)
    found = []
    for impl in ("torch", "triton"):
        loss = bound(impl).kl_div(s, t, outcomes=tables, reduction="none")
        found.append((loss, *torch.autograd.grad(loss.sum(), s)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IN_FLOAT64)
@pytest.mark.parametrize("kind", ["logits", "bucket", "zero"])
def test_finite_differences(kind: str, impl: str) -> None:
    s = drawn(3, V, scale=1.0).double().requires_grad_()
    teacher: Teacher = TeacherLogits(drawn(3, V_T, seed=1).double())
    if kind != "logits":
        teacher = top_k(3, kind)  # pyright: ignore[reportArgumentType]

    def loss(s: Tensor) -> Tensor:
        how = Objective(temperature=1.5)
        out = bound(impl).distill_loss(s, None, teacher, how, outcomes=OUTCOMES, reduction="none")
        return out.loss

    torch.autograd.gradcheck(loss, s)


# --- Rows by themselves ---------------------------------------------------------------------------


@of_all
def test_bad_values_poison_their_row_alone(impl: str) -> None:
    """NaN on either side, an id that is no outcome, one that occurs twice."""
    s, t = drawn(4, V), drawn(4, V_T, seed=1)
    t[1, 3], t[2] = math.nan, -math.inf
    s[3, 5] = math.inf
    kl = partial(bound(impl).kl_div, outcomes=OUTCOMES, reduction="none")
    assert kl(s, t).isnan().tolist() == [False, True, True, True]
    ids = torch.tensor([[0, 1], [0, COUNT], [2, 2], [-1, 4]])
    teacher = TeacherTopK(ids, torch.full((4, 2), 0.25).log())
    out = bound(impl).distill_loss(
        drawn(4, V), None, teacher, Objective(), outcomes=OUTCOMES, reduction="none"
    )
    assert out.loss.isnan().tolist() == [False, True, True, True]


@every_impl
def test_padding_alone_has_no_divergence(impl: str) -> None:
    teacher = TeacherTopK(torch.zeros(2, 2).long(), torch.full((2, 2), -math.inf), "zero")
    s = drawn(2, V).requires_grad_()
    out = bound(impl).distill_loss(s, None, teacher, Objective(), outcomes=OUTCOMES)
    assert out.kd.abs() < 1e-7 and torch.autograd.grad(out.loss, s)[0].abs().max() < 1e-7


@every_impl
def test_rows_do_not_depend_on_each_other(impl: str) -> None:
    """To the bit, and neither on a row whose sums underflow."""
    s, t = drawn(4, V), drawn(4, V_T, seed=1)
    s[1] *= 100
    kl = partial(bound(impl).kl_div, outcomes=OUTCOMES, reduction="none")
    together = kl(s, t)
    assert torch.equal(together, torch.cat([kl(s[i : i + 1], t[i : i + 1]) for i in range(4)]))


# --- Memory ---------------------------------------------------------------------------------------


def test_the_logits_are_never_held_whole() -> None:
    """Beyond its inputs and gradients a call takes ``chunk_bytes`` and its tables in 64 bits."""
    rows, width, width_t, count, D = 400, 4000, 3000, 2500, 8
    tables = Outcomes(table(width, count, 1), table(width_t, count, 2), count)
    h, w = drawn(rows, D).requires_grad_(), drawn(width, D).requires_grad_()
    teacher = TeacherHidden(drawn(rows, D), Head(drawn(width_t, D)))
    y = torch.zeros(rows, dtype=torch.long)
    chunk_bytes = 1 << 20
    ops = bound("torch", chunk_bytes)

    def both() -> Any:
        out = ops.linear_distill_loss(h, Head(w), y, teacher, JOINT, outcomes=tables)
        return torch.autograd.grad(out.loss, (h, w))

    both()
    said = linear_memory_bytes(
        rows, width, D, teacher="hidden", teacher_width=D, chunk_bytes=chunk_bytes
    )
    taken = peak_bytes(both)
    assert taken <= said.total + chunk_bytes // 4 + 8 * (width + width_t) + (64 << 10)
    assert taken < 4 * rows * (width + width_t) / 2


# --- What is refused ------------------------------------------------------------------------------


def test_bad_tables() -> None:
    own = torch.arange(3).int()
    with pytest.raises(TypeError, match="the student's outcomes must be an int32 tensor, got"):
        Outcomes(own.long(), own, 3)
    with pytest.raises(ValueError, match="the teacher's outcomes must have one entry per column"):
        Outcomes(own, own[None], 3)
    with pytest.raises(ValueError, match=r"must have one entry per column, got shape \(0,\)"):
        Outcomes(own[:0], own, 3)
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\), got 0 to 2"):
        Outcomes(own, own, 2)
    with pytest.raises(ValueError, match="must lie in"):
        Outcomes(own, own - 1, 3)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        Outcomes(own, own, 0)
    with pytest.raises(TypeError, match="count must be an int, got True"):
        Outcomes(own, own, True)
    with pytest.raises(ValueError, match="must be on one device, got cpu and meta"):
        Outcomes(own, own.to("meta"), 3)


@every_impl
def test_what_outcomes_do_not_go_with(impl: str) -> None:
    s, t = torch.zeros(2, V), torch.zeros(2, V_T)
    loss = partial(bound(impl).distill_loss, s, None, outcomes=OUTCOMES)
    with pytest.raises(ValueError, match="divergence must be forward_kl for outcomes, got jsd;"):
        loss(TeacherLogits(t), Objective(divergence="jsd"))
    with pytest.raises(ValueError, match="must be forward_kl for outcomes, got forward_kl and jsd"):
        loss(TeacherLogits(t), Objective(other_divergence="jsd"))
    with pytest.raises(ValueError, match=r"teacher_share must be 1 for outcomes.*, got 0\.5"):
        loss(TeacherLogits(t), Objective(teacher_share=0.5))
    with pytest.raises(ValueError, match="teacher must be given with outcomes, got None"):
        loss(None, Objective(kd_weight=0.0))
    with pytest.raises(TypeError, match="outcomes must be an Outcomes, got tuple"):
        bound(impl).kl_div(s, t, outcomes=(OUTCOMES.student, OUTCOMES.teacher))
    with pytest.raises(ValueError, match=f"student's outcomes .* {V - 1} columns, got {V};"):
        bound(impl).kl_div(s[:, 1:], t, outcomes=OUTCOMES)
    with pytest.raises(ValueError, match=f"teacher's outcomes .* {V_T - 1} columns, got {V_T};"):
        bound(impl).kl_div(s, t[:, 1:], outcomes=OUTCOMES)
    shard = VocabShard(0, V, ((0, V), (V, 2 * V)))
    with pytest.raises(ValueError, match="outcomes must be compared on whole rows of logits"):
        bound(impl).kl_div(s, s, vocab_shard=shard, outcomes=OUTCOMES)


# --- What torch makes of it -----------------------------------------------------------------------


@pytest.mark.few(1)
@every_impl
def test_compiled_without_graph_breaks(impl: str) -> None:
    s, t = drawn(N, V).requires_grad_(), drawn(N, V_T, seed=1)
    loss = partial(bound(impl).kl_div, outcomes=OUTCOMES)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for f in (loss, compiled):
        (gradient,) = torch.autograd.grad(f(s, t), s)
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(s, t), s)[0])


@every_impl
def test_vmap_over_rows_but_not_over_tables(impl: str) -> None:
    s, t = drawn(2, 3, V), drawn(2, 3, V_T, seed=1)
    loss = partial(bound(impl).kl_div, outcomes=OUTCOMES, reduction="none")
    batched = torch.func.vmap(loss)(s, t)
    torch.testing.assert_close(batched, torch.stack([loss(s[0], t[0]), loss(s[1], t[1])]))
