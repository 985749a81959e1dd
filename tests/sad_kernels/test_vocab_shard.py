"""A vocabulary split over forked ranks: the losses and gradients of whole tensors.

Judged by the one rule of tolerance, as what one process computes is. That ranks agree to the bit is
asserted wherever they are put together (``support/vocab_shards.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from sad_kernels import (
    Head,
    Objective,
    TeacherHidden,
    TeacherLogits,
    VocabShard,
    cross_entropy,
    linear_cross_entropy,
    linear_distill_loss,
    reference,
)
from support.oracle import IMPLS, SLOW, Problem, bound, judge_outputs, measure, measure_of
from support.problems import plain
from support.ranks import run_ranks
from support.vocab_shards import Bounds, bounds_of, measure_sharded, sharded
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

V = 97
each_impl = pytest.mark.parametrize("impl", IMPLS)

ROWS: dict[str, dict[str, Any]] = {
    "ce": {"teacher": None, "ce_weight": 1.0, "label_smoothing": 0.1},
    "forward_kl": {"ce_weight": 1.0},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jeffreys": {"divergence": "jeffreys", "beta": 0.3},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "skew_forward_kl": {"divergence": "skew_forward_kl", "beta": 0.1},
    "skew_reverse_kl": {"divergence": "skew_reverse_kl", "beta": 0.1},
    "tvd": {"divergence": "tvd"},
    "bucket": {"teacher": "bucket", "label_smoothing": 0.1},
    "share": {"divergence": "reverse_kl", "teacher_share": 0.3},
}
"""What is minimised, beside the options of ``problem_of``."""

FEW = ("ce", "forward_kl", "reverse_kl", "jsd", "bucket")
"""What interpreted kernels are held to by default."""

SPLITS = {2: "even", 3: "uneven", 4: "empty"}
"""Ranks -> how they split the vocabulary, where one split is enough."""


def problem_of(row: str, impl: str, **options: Any) -> Problem:
    """One call of ``linear_distill_loss`` with padding, ignored rows, a bias and a z-loss."""
    how = {"teacher": "hidden", "z_loss": 1e-3, "ignore": "some", "cut": True, "upstream": "0.37"}
    how |= {"N": 3 if impl in SLOW else 9}
    return plain("linear_distill_loss", torch.float32, **(how | ROWS[row] | options))


def judge_sharded(
    problems: Sequence[Problem], kind: str, ranks: int, impl: str, chunk_bytes: int | None = None
) -> None:
    ours = measure_sharded(problems, bounds_of(kind, V, ranks), impl, chunk_bytes)
    by_rule = {"rounds_products": impl == "triton", "plain_forms": impl == "triton"}
    for problem, outputs in zip(problems, ours, strict=True):
        judge_outputs(problem, outputs, measure_of(problem, **by_rule))


# --- Against the oracle --------------------------------------------------------------------------


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("impl", "row"),
    [
        pytest.param(impl, row, marks=pytest.mark.slow if impl in SLOW and row not in FEW else ())
        for impl, row in product(IMPLS, ROWS)
    ],
)
def test_every_objective(row: str, impl: str) -> None:
    ranks = 2 + list(ROWS).index(row) % 3
    judge_sharded([problem_of(row, impl)], SPLITS[ranks], ranks, impl)


@pytest.mark.slow
@each_impl
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_objective_in_every_split(ranks: int, row: str, impl: str) -> None:
    shapes = [{}, {"softcap": 30.0}, {"temperature": 1.0, "cut": False}, {"distribution": "near"}]
    problems = [problem_of(row, impl, **options) for options in shapes]
    for kind, chunk_bytes in product(("even", "uneven", "empty"), (None, 2000)):
        judge_sharded(problems, kind, ranks, impl, chunk_bytes)


@each_impl
@pytest.mark.parametrize("teacher", ["logits", "zero"])
def test_other_teachers(teacher: str, impl: str) -> None:
    options = {"teacher": teacher, "softcap": 30.0, "label_smoothing": 0.1}
    judge_sharded([problem_of("jsd", impl, **options)], "even", 2, impl)


@pytest.mark.parametrize("row", ["ce", "reverse_kl", "jsd", "bucket"])
def test_slices_of_the_vocabulary(row: str) -> None:
    """A budget that holds no whole rows: the logits are made again in backward."""
    judge_sharded([problem_of(row, "torch")], "uneven", 3, "torch", chunk_bytes=2000)


@pytest.mark.parametrize("row", ["forward_kl", "bucket", "jsd"])
def test_16_bits(row: str) -> None:
    """dhidden is summed in fp32 and rounded once."""
    how = {"z_loss": 1e-3, "ignore": "some", "N": 9, "teacher": "hidden"} | ROWS[row]
    problem = plain("linear_distill_loss", torch.bfloat16, **how)
    judge_sharded([problem], "even", 4, "torch")


@each_impl
@pytest.mark.parametrize("divergence", ["forward_kl", "skew_reverse_kl"])
def test_near_agreement(divergence: str, impl: str) -> None:
    """A divergence, and its gradient, that are small rests: what one process keeps, shards keep."""
    options = {"distribution": "randn5+1e-3", "divergence": divergence, "temperature": 1.0}
    size = {"N": 4 if impl in SLOW else 32, "V": V, "reduction": "none", "upstream": "random"}
    judge_sharded([plain("kl_div", torch.float32, **options, **size)], "even", 3, impl)


@each_impl
def test_logits_of_a_shard(impl: str) -> None:
    few = {"N": 4, "ignore": "some", "cut": True, "softcap": 30.0}
    smooth = {"label_smoothing": 0.1, "z_loss": 1e-3}
    problems = [
        plain("cross_entropy", torch.float32, **few, **smooth, reduction="none", upstream="random"),
        plain("distill_loss", torch.float32, **few, **smooth),
        plain("kl_div", torch.float32, **few, divergence="tvd", reduction="sum"),
    ]
    judge_sharded(problems, "uneven", 3, impl)


# --- Options of rows and classes -----------------------------------------------------------------


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape)


def weighted_rows() -> Problem:
    """Weights of tokens, 0 among them, and two divergences by row."""
    torch.manual_seed(1)
    N, D, o = 6, 8, Objective(ce_weight=0.4, temperature=2.0, label_smoothing=0.1, z_loss=1e-3)
    o = replace(o, divergence="reverse_kl", other_divergence="jsd", other_beta=0.3)
    labels = torch.tensor([3, 96, -100, 50, 0, 41])
    on_ce, on_kd = torch.tensor([1.0, 0, 2, 0.5, 1, 3]), torch.tensor([0.5, 2, 1, 0, 0, 1.5])
    other = torch.tensor([True, False, True, True, False, True])
    leaves = {"hidden": drawn(N, D), "weight": drawn(V, D), "bias": drawn(V)}
    leaves |= {"th": drawn(N, D), "tw": drawn(V, D)}

    def call(ops: Any, x: dict[str, Tensor]) -> Any:
        return ops.linear_distill_loss(
            x["hidden"],
            Head(x["weight"], x["bias"], 1.5, 20.0),
            labels,
            TeacherHidden(x["th"], Head(x["tw"])),
            o,
            token_weights=on_ce,
            kd_token_weights=on_kd,
            other_rows=other,
        )

    wrt = "hidden", "weight", "bias"
    return Problem("weighted rows", call, leaves, wrt, torch.tensor(1.0), {}, magnitude=20.0)


def weighted_classes() -> Problem:
    """Weights of classes, those of padded columns too, with smoothing."""
    torch.manual_seed(2)
    labels, by_class = torch.tensor([3, 91, -100, 50, 0, 89]), torch.rand(V)
    by_class[50] = 0

    def call(ops: Any, x: dict[str, Tensor]) -> Tensor:
        return ops.linear_cross_entropy(
            x["hidden"],
            x["weight"],
            labels,
            class_weight=by_class[:92].to(x["hidden"].dtype),
            label_smoothing=0.1,
            valid_vocab=92,
        )

    leaves = {"hidden": drawn(6, 8), "weight": drawn(V, 8)}
    return Problem(
        "weighted classes", call, leaves, tuple(leaves), torch.tensor(1.0), {}, magnitude=10.0
    )


def soft_labels() -> Problem:
    """Labels that are probabilities: of each rank's own columns."""
    torch.manual_seed(3)
    by_class, soft = torch.rand(V), drawn(6, V).softmax(-1)

    def call(ops: Any, x: dict[str, Tensor]) -> Tensor:
        labels, weight = soft.to(x["logits"].dtype), by_class.to(x["logits"].dtype)
        return ops.cross_entropy(x["logits"], labels, weight=weight, label_smoothing=0.2)

    leaves = {"logits": drawn(6, V, scale=3.0)}
    return Problem("soft labels", call, leaves, ("logits",), torch.tensor(1.0), {}, magnitude=10.0)


@each_impl
@pytest.mark.parametrize("problem", [weighted_rows, weighted_classes, soft_labels])
def test_weights_of_rows_and_classes(problem: Callable[[], Problem], impl: str) -> None:
    judge_sharded([problem()], "even", 3, impl)


@each_impl
def test_a_foreign_label_poisons_its_row_on_every_rank(impl: str) -> None:
    """Past ``valid_vocab``, where a column is, as well as past all columns."""
    problem = plain("cross_entropy", torch.float32, N=4, reduction="none", upstream="one", cut=90)
    logits = problem.leaves["logits"]
    labels = torch.tensor([3, 95, V, -1])

    def call(ops: Any, x: dict[str, Tensor]) -> Tensor:
        return ops.cross_entropy(x["logits"], labels, valid_vocab=90, reduction="none")

    poisoned = replace(problem, call=call, leaves={"logits": logits.nan_to_num(0)})
    (ours,) = measure_sharded([poisoned], bounds_of("even", V, 2), impl)
    assert ours["loss"].isnan().tolist() == [False, True, True, True]
    assert ours["dlogits"][:, :90].isnan().all(1).tolist() == [False, True, True, True]
    assert not ours["dlogits"][:, 90:].any()


# --- What is sent --------------------------------------------------------------------------------


class Sent:
    """Counts the collectives of this process, and the bytes that each takes from it."""

    def __init__(self) -> None:
        self.gathers: list[int] = []
        self.sums: list[int] = []

    def __enter__(self) -> Sent:
        self.before = dist.all_gather, dist.all_reduce

        def all_gather(out: Any, x: Tensor, **how: Any) -> Any:
            self.gathers.append(x.nbytes)
            return self.before[0](out, x, **how)

        def all_reduce(x: Tensor, **how: Any) -> Any:
            assert x.dtype == torch.float32
            self.sums.append(x.nbytes)
            return self.before[1](x, **how)

        dist.all_gather, dist.all_reduce = all_gather, all_reduce
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather, dist.all_reduce = self.before


def sent_by(problem: Problem, bounds: Bounds, impl: str, chunk_bytes: int | None) -> Any:
    shard = VocabShard(*bounds[dist.get_rank()], bounds)
    with Sent() as sent:
        measure(problem, sharded(bound(impl, chunk_bytes), shard))
    return sent.gathers, sent.sums


BYTES_PER_ROW = {
    ("ce", "torch"): (28,),
    ("forward_kl", "torch"): (44,),
    ("bucket", "torch"): (36 + 4 * 5,),
    ("jsd", "torch"): (44, 8),
    ("bucket", "triton"): (32 + 4 * 5,),
    ("jsd", "triton"): (40, 8),
}
"""Of the exchanges of a forward block, 4 for each number: a mixture has a second one."""


@pytest.mark.parametrize(("row", "impl"), [key for key in BYTES_PER_ROW if key[1] in IMPLS])
def test_one_exchange_per_block_and_one_sum(row: str, impl: str) -> None:
    """And no other bytes than these, whatever V is."""
    problem = problem_of(row, impl, ignore="none", N=3)
    for gathers, sums in run_ranks(2, sent_by, problem, bounds_of("even", V, 2), impl, None):
        assert gathers == [3 * of_row for of_row in BYTES_PER_ROW[row, impl]]
        assert sums == [problem.leaves["hidden"].numel() * 4]


def test_an_exchange_for_each_block() -> None:
    """Rows that do not fit at once, and a widest shard that decides how they are cut."""
    problem = plain("linear_cross_entropy", torch.float32, N=300, V=97)
    per_row, hidden = 12, problem.leaves["hidden"]
    for gathers, sums in run_ranks(
        2, sent_by, problem, bounds_of("uneven", V, 2), "torch", 100_000
    ):
        assert len(gathers) > 1 and sum(gathers) == 300 * per_row and sums == [4 * hidden.numel()]


def second_backward(bounds: Bounds, impl: str) -> list[Tensor]:
    torch.manual_seed(0)
    start, stop = bounds[dist.get_rank()]
    hidden, weight = drawn(5, 8).requires_grad_(), drawn(V, 8)[start:stop].requires_grad_()
    shard = VocabShard(start, stop, bounds)
    labels = torch.tensor([1, 50, 96, -100, 3])
    loss = linear_cross_entropy(hidden, weight, labels, vocab_shard=shard, impl=impl)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    return [*first, *torch.autograd.grad(loss, (hidden, weight))]


@each_impl
def test_a_second_backward(impl: str) -> None:
    for dhidden, dweight, *again in run_ranks(2, second_backward, bounds_of("even", V, 2), impl):
        torch.testing.assert_close(again, [dhidden, dweight])


# --- Beside other kinds of parallelism -----------------------------------------------------------


class GatherRows(torch.autograd.Function):
    """The rows of all ranks; backward sums the gradient up over them and keeps this rank's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(dist.get_world_size(), *x.shape)
        dist.all_gather(list(out.unbind(0)), x)
        return out.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        pieces = list(g.contiguous().chunk(dist.get_world_size()))
        out = torch.empty_like(pieces[0])
        dist.reduce_scatter(out, pieces)
        return out


def split_data() -> dict[str, Tensor]:
    torch.manual_seed(4)
    shapes = {"hidden": (8, 16), "weight": (V, 16), "th": (8, 12), "tw": (V, 12)}
    return {name: drawn(*shape) for name, shape in shapes.items()}


LABELS = torch.tensor([5, -100, 96, 0, 48, 49, 20, 77])
JOINT = Objective(ce_weight=0.5, kd_weight=0.7, temperature=2.0, label_smoothing=0.1)


def rows_and_columns(bounds: Bounds) -> tuple[Tensor, ...]:
    """Own rows and own columns: gather the rows, loss on the columns, reduce-scatter dhidden."""
    x, rank, ranks = split_data(), dist.get_rank(), dist.get_world_size()
    start, stop = bounds[rank]
    shard = VocabShard(start, stop, bounds, sum_dhidden=False)
    hidden = x["hidden"].chunk(ranks)[rank].clone().requires_grad_()
    weight = x["weight"][start:stop].requires_grad_()
    teacher = TeacherHidden(
        GatherRows.apply(x["th"].chunk(ranks)[rank].contiguous()),
        Head(x["tw"][start:stop], shard=shard),
    )
    head = Head(weight, shard=shard)
    out = linear_distill_loss(GatherRows.apply(hidden), head, LABELS, teacher, JOINT)
    return out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))


def whole(dtype: torch.dtype, function: Callable[..., Any]) -> tuple[Tensor, ...]:
    x = {name: each.to(dtype) for name, each in split_data().items()}
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    teacher = TeacherHidden(x["th"], Head(x["tw"]))
    loss = function(hidden, Head(weight), LABELS, teacher, JOINT).loss
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def assert_as_one_process(ours: Sequence[Tensor]) -> None:
    """Errors no larger than a few times those of one process in fp32."""
    oracle = whole(torch.float64, reference.linear_distill_loss)
    one = whole(torch.float32, linear_distill_loss)
    for x, o, e in zip(ours, oracle, one, strict=True):
        limit = 3 * error(e, o) + 2**-23
        assert error(x, o) <= limit, (error(x, o), limit)


def error(x: Tensor, oracle: Tensor) -> float:
    return float((x.double() - oracle).norm() / oracle.norm())


def test_rows_and_vocabulary_split_over_the_same_ranks() -> None:
    ranks = run_ranks(2, rows_and_columns, bounds_of("even", V, 2))
    losses, dhidden, dweight = zip(*ranks, strict=True)
    assert torch.equal(losses[0], losses[1])
    assert_as_one_process([losses[0], torch.cat(dhidden), torch.cat(dweight)])


class Model(torch.nn.Module):
    """A layer, and a loss whose head is a parameter of its own; the rows are this rank's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer = torch.nn.Linear(16, 16)
        self.head = torch.nn.Parameter(drawn(V, 16))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = self.layer(x).tanh()
        if not isinstance(self.head, DTensor):
            return linear_cross_entropy(hidden, self.head, labels, label_smoothing=0.1)
        shard = replace(VocabShard.of(self.head), sum_dhidden=False)
        return linear_cross_entropy(
            GatherRows.apply(hidden),
            self.head.to_local(),
            labels,
            label_smoothing=0.1,
            vocab_shard=shard,
        )


def fully_sharded() -> dict[str, Tensor]:
    """Gradients of the layer, whose rows are this rank's, and of the head, whose columns are."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, mesh = Model(), init_device_mesh("cpu", (ranks,))
    model.head = torch.nn.Parameter(distribute_tensor(model.head.data, mesh, [Shard(0)]))
    fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.head})
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    loss = model(split_data()["hidden"].chunk(ranks)[rank], LABELS)
    loss.backward()
    parameters: dict[str, Any] = dict(model.named_parameters())
    grads = {name: p.grad.full_tensor() for name, p in parameters.items()}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step()
    return {"loss": loss.detach(), **grads}


def in_one_process(dtype: torch.dtype, ops: Any) -> dict[str, Any]:
    model = Model().to(dtype)
    hidden = model.layer(split_data()["hidden"].to(dtype)).tanh()
    loss = ops.linear_cross_entropy(hidden, model.head, LABELS, label_smoothing=0.1)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_rest_of_the_model_fully_sharded(ranks: int) -> None:
    """FSDP2 with the head among ``ignored_params``; V = 97 is cut unevenly."""
    oracle = in_one_process(torch.float64, reference)
    one = in_one_process(torch.float32, bound("torch"))
    for ours in run_ranks(ranks, fully_sharded):
        assert ours.keys() == one.keys()
        for name, x in ours.items():
            limit = 3 * error(one[name], oracle[name]) + 2**-23
            assert error(x, oracle[name]) <= limit, name


# --- What a shard is -----------------------------------------------------------------------------


def shards_of_tensors() -> dict[str, Any]:
    ranks = dist.get_world_size()
    mesh, weight = init_device_mesh("cpu", (ranks,)), torch.zeros(9, 4)
    shard = VocabShard.of(distribute_tensor(weight, mesh, [Shard(0)]))
    own = distribute_tensor(weight, mesh, [Shard(0)]).to_local()
    assert own.shape[0] == shard.width and shard.vocab_size == 9
    messages = []
    for placements in ([Shard(1)], [Replicate()]):
        with pytest.raises(ValueError, match=r"one placement, Shard\(0\)") as caught:
            VocabShard.of(distribute_tensor(weight, mesh, placements))
        messages.append(str(caught.value))
    plane = init_device_mesh("cpu", (ranks // 2, 2))
    with pytest.raises(ValueError, match=r"one placement, Shard\(0\)"):
        VocabShard.of(distribute_tensor(weight, plane, [Replicate(), Shard(0)]))
    assert not any("\n" in message for message in messages)
    return {"bounds": shard.bounds, "own": (shard.start, shard.stop)}


def test_the_shard_of_a_dtensor() -> None:
    """Cut as ``torch.chunk`` does, of 9 rows on 4 ranks: the last has none."""
    bounds = ((0, 3), (3, 6), (6, 9), (9, 9))
    for rank, shard in enumerate(run_ranks(4, shards_of_tensors)):
        assert shard == {"bounds": bounds, "own": bounds[rank]}
    with pytest.raises(TypeError, match=r"weight must be a DTensor, got Tensor; .*VocabShard\("):
        VocabShard.of(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("error", "arguments", "complaint"),
    [
        (ValueError, (0, 4, ((0, 4), (5, 9))), r"neighbouring ranges.*got \(\(0, 4\), \(5, 9\)\);"),
        (ValueError, (1, 4, ((1, 4), (4, 9))), "neighbouring ranges of columns from 0"),
        (ValueError, (0, 4, ((0, 5), (5, 9))), r"start and stop must be.*got \(0, 4\); pass"),
        (TypeError, (0, 4.0, ((0, 4),)), "stop must be an int, got 4.0"),
        (TypeError, (0, 4, ((0, 4, 5),)), r"bounds must hold pairs \(start, stop\)"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(error: Any, arguments: Any, complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        VocabShard(*arguments)


def test_a_head_has_the_rows_of_its_shard() -> None:
    shard = VocabShard(4, 9, ((0, 4), (4, 9)))
    head = Head(torch.eye(5), valid_vocab=8, shard=shard)
    assert head.num_columns == 9 and head.vocab_size == 8
    assert head(torch.ones(5)).shape == (4,)  # of columns 4 to 8
    with pytest.raises(ValueError, match="must have the 5 columns of its shard, got 4 rows; pass"):
        Head(torch.eye(4), shard=shard)
    with pytest.raises(TypeError, match="shard must be a VocabShard or None, got int"):
        Head(torch.eye(4), shard=4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"valid_vocab must lie in \[1, 9\]"):
        Head(torch.eye(5), valid_vocab=10, shard=shard)
    with pytest.raises(ValueError, match="head must hold the whole vocabulary, got the shard 4"):
        reference.linear_distill_loss(
            torch.ones(1, 5), head, torch.tensor([1]), None, Objective(ce_weight=1.0, kd_weight=0.0)
        )


def refusals() -> list[str]:
    """What a rank of two is told, without waiting for the other."""
    bounds = ((0, 4), (4, 9))
    shard = VocabShard(*bounds[dist.get_rank()], bounds)
    width = shard.width
    other = VocabShard(0, width, ((0, width), (width, width), (width, 9)))
    y, h, o = torch.tensor([1]), torch.ones(1, 3), Objective()
    w, whole = torch.ones(shard.width, 3), torch.ones(9, 3)
    head, logits = Head(w, shard=shard), torch.ones(1, shard.width)

    def teacher(head: Head) -> TeacherHidden:
        return TeacherHidden(h, head)

    calls: list[Callable[[], Any]] = [
        lambda: linear_distill_loss(h, head, y, teacher(Head(whole)), o),
        lambda: linear_distill_loss(h, Head(whole), y, teacher(head), o),
        lambda: linear_distill_loss(h, head, y, teacher(Head(w, shard=other)), o),
        lambda: linear_distill_loss(h, head, y, TeacherLogits(torch.ones(1, 9)), o),
        lambda: cross_entropy(torch.ones(1, 9), y, vocab_shard=shard),
        lambda: cross_entropy(logits, y, vocab_shard=other),
        lambda: cross_entropy(logits, y, vocab_shard=9),  # pyright: ignore[reportArgumentType]
    ]
    said = []
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        said.append(str(caught.value))
    return said


def test_sides_that_do_not_fit_are_refused() -> None:
    for said in run_ranks(2, refusals):
        assert all("\n" not in message and ";" in message for message in said)
        for message in said[:3]:
            assert "student and teacher must have equal bounds" in message
        assert "teacher logits must have the" in said[3]
        assert "vocab_shard must have the 9 columns of the student's logits" in said[4]
        assert "vocab_shard must have the bounds of the 2 rank(s) of its group" in said[5]
        assert "vocab_shard must be a VocabShard or None, got int" in said[6]


def test_a_shard_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"must have a process group, got none.*; call"):
        cross_entropy(torch.ones(1, 4), torch.tensor([1]), vocab_shard=VocabShard(0, 4, ((0, 4),)))
