"""The losses of the torch path as torch operators, and what autograd, compilers and vmap see.

``torch_rows`` gives a loss per row, and a few numbers per row from which ``torch_rows_gradient``
makes the gradients, with the logits read or made once more. ``torch_mean`` gives the sum of the
rows' losses over a number of items, with the gradients, so that logits made from hidden states are
made once. All are opaque: a compiler sees the shapes of their results, and never the number of rows
that count, which depends on the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sad_kernels._operator import (
    OpArgs,
    Operator,
    batch_first,
    decode,
    eager_autograd_only,
    encode,
    join_rows,
    no_second_backward,
    part_rows,
    save_call,
    saved_call,
)
from sad_kernels._rows import (
    NOT_BY_ROW,
    LogitTransform,
    LossSpec,
    RowResults,
    RowTargets,
    arithmetic_dtype,
)
from sad_kernels._tiles import TileShape
from sad_kernels._torch.problem import ModelInput, Problem, SavedRows, TopKInput
from sad_kernels._torch.scratch import borrowed_scratch
from sad_kernels._torch.sources import Gradients
from sad_kernels._torch.statistics import GRADIENT_SUMS
from sad_kernels.objective import Tail

PARTS = len(RowResults._fields) - 1  # beside the loss


class LossInputs(NamedTuple):
    """What all operators of this file take first, in the schema's order."""

    x: Tensor  # [N, D] hidden states, or without a weight logits [N, >= V]
    weight: Tensor | None  # [>= V, D]
    bias: Tensor | None  # [>= V]
    labels: Tensor | None  # these eight are RowTargets
    soft: Tensor | None
    class_weight: Tensor | None
    token_weights: Tensor | None
    kd_weights: Tensor | None
    other_rows: Tensor | None
    outcomes: Tensor | None
    teacher_outcomes: Tensor | None
    t_x: Tensor | None  # the teacher's, as the student's
    t_weight: Tensor | None
    t_bias: Tensor | None
    ids: Tensor | None  # [N, K] of a top-k teacher
    log_probs: Tensor | None  # [N, K]
    tail: str
    integers: Sequence[int]  # these three are an OpArgs, see encode
    numbers: Sequence[float]
    words: str
    tile: Sequence[int]  # a TileShape

    @contextmanager
    def problem(self) -> Iterator[Problem]:
        """The call that these inputs stand for, with the buffers it works in."""
        args = decode(self.integers, self.numbers, self.words)
        student = ModelInput(
            self.x, self.weight, self.bias, LogitTransform(args.scale, args.softcap)
        )
        teacher: ModelInput | TopKInput | None = None
        if self.ids is not None:
            assert self.log_probs is not None
            teacher = TopKInput(self.ids, self.log_probs, cast(Tail, self.tail))
        elif self.t_x is not None:
            transform = LogitTransform(args.teacher_scale, args.teacher_softcap)
            teacher = ModelInput(self.t_x, self.t_weight, self.t_bias, transform)
        targets = RowTargets(*self[3 : 3 + len(RowTargets._fields)])
        shape = TileShape(*self.tile)
        # Autocast would act inside an operator too, whose dtypes are chosen.
        autocast = torch.autocast(self.x.device.type, enabled=False)
        scratch = borrowed_scratch(arithmetic_dtype(self.x), self.x.device)
        with autocast, torch.no_grad(), scratch as buffers:
            yield Problem(args.spec, student, targets, teacher, shape, buffers)


def loss_inputs(
    spec: LossSpec,
    student: ModelInput,
    targets: RowTargets,
    teacher: ModelInput | TopKInput | None,
    shape: TileShape,
) -> LossInputs:
    """The records of a call as an operator's inputs."""
    args = OpArgs(spec, student.transform.logit_scale, student.transform.softcap)
    dense: list[Tensor | None] = [None, None, None]
    ids = log_probs = None
    tail = ""
    if isinstance(teacher, TopKInput):
        ids, log_probs, tail = teacher
    elif teacher is not None:
        *dense, transform = teacher
        args = args._replace(teacher_scale=transform.logit_scale, teacher_softcap=transform.softcap)
    return LossInputs(
        *student[:3], *targets, *dense, ids, log_probs, tail, *encode(args), list(shape)
    )


PER_CLASS = tuple(LossInputs._fields.index(name) for name in NOT_BY_ROW)
"""The tensors among a call's inputs from logits that do not have a row for each of theirs."""


# --- A loss per row ------------------------------------------------------------------------------


@Operator
def torch_rows(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row losses [N], their parts [PARTS, N]; the two fields of ``SavedRows``."""
    with inputs.problem() as problem:
        (loss, *parts), saved = problem.losses()
        return loss, torch.stack(parts), saved.sums, saved.inside


def row_results(inputs: LossInputs) -> RowResults:
    """The losses of all rows, each differentiable on its own, and their parts, detached."""
    loss, parts, *_ = torch_rows(*inputs)
    return RowResults(loss, *parts.detach())


@torch_rows.register_fake
def _(inputs: LossInputs) -> tuple[Tensor, ...]:
    N = inputs.x.shape[0]
    rows = inputs.x.new_empty(N, dtype=arithmetic_dtype(inputs.x))
    inside = rows.new_empty(N, 0 if inputs.ids is None else inputs.ids.shape[1])
    return rows, rows.new_empty(PARTS, N), rows.new_empty(GRADIENT_SUMS, N), inside


@Operator
def torch_rows_gradient(
    inputs: LossInputs,
    want: Sequence[bool],  # of x, weight and bias
    sums: Tensor,
    inside: Tensor,
    upstream: Tensor,  # [N]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``sum(upstream * losses)``, empty where not wanted."""
    with inputs.problem() as problem:
        saved = SavedRows(sums, inside)
        return _filled(inputs, problem.gradients(saved, upstream, _wanted(want)))


@torch_rows_gradient.register_fake
def _(inputs: LossInputs, want: Sequence[bool], *_: Tensor) -> tuple[Tensor, ...]:
    return _empty_gradients(inputs, want)


def _wanted(want: Sequence[bool]) -> tuple[bool, bool, bool]:
    x, weight, bias = want
    return x, weight, bias


def _filled(inputs: LossInputs, gradients: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as an operator returns them: tensors, empty where there is none."""
    x, weight, bias = (inputs.x.new_empty(0) if g is None else g for g in gradients)
    return x, weight, bias


def _empty_gradients(inputs: LossInputs, want: Sequence[bool]) -> tuple[Tensor, ...]:
    leaves = inputs.x, inputs.weight, inputs.bias
    return tuple(
        x.new_empty(x.shape) if wanted and x is not None else inputs.x.new_empty(0)
        for x, wanted in zip(leaves, want, strict=True)
    )


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_call(ctx, inputs, output[2:])


def _gradients_of_rows(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Backward of ``torch_rows``: the logits again, with each row's upstream."""
    inputs, saved = saved_call(ctx)
    if upstream is None:
        return (None,) * len(inputs)
    want = list(ctx.needs_input_grad[:3])
    gradients = torch_rows_gradient(*inputs, want, *saved, upstream)
    return _returned(gradients, want, len(inputs))


def _returned(
    gradients: Sequence[Tensor | None], want: Sequence[bool], num_inputs: int
) -> tuple[Tensor | None, ...]:
    """One gradient for each input of an operator."""
    out = [g if wanted else None for g, wanted in zip(gradients, want, strict=True)]
    return *out, *[None] * (num_inputs - 3)


@torch_rows.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    if LossInputs(*inputs).weight is not None:
        _no_vmap()
    for name, at in zip(("class weights", "outcomes", "outcomes"), PER_CLASS, strict=True):
        if in_dims[at] is not None:
            raise RuntimeError(
                f"{name} must not be batched by vmap, got a batch of them; call once for each"
            )
    out_dims = (0, 1, 1, 0)  # where each output has its rows
    outputs = torch_rows(*_join_inputs(inputs, in_dims, info.batch_size))
    return part_rows(outputs, out_dims, info.batch_size), out_dims


@torch_rows_gradient.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    B, count = info.batch_size, len(LossInputs._fields)
    want, sums, inside, upstream = inputs[count:]
    _, sums_dim, inside_dim, upstream_dim = in_dims[count:]
    dx, dweight, dbias = torch_rows_gradient(
        *_join_inputs(inputs[:count], in_dims[:count], B),
        want,
        batch_first(sums, sums_dim, B).movedim(0, 1).flatten(1, 2),  # [sums, B N]
        join_rows(inside, inside_dim, B),
        join_rows(upstream, upstream_dim, B),
    )
    dx = part_rows([dx], [0], B)[0] if want[0] else dx.expand(B, 0)
    return (dx, dweight.expand(B, 0), dbias.expand(B, 0)), (0, 0, 0)


def _join_inputs(inputs: Sequence[Any], in_dims: Sequence[Any], B: int) -> list[Any]:
    """The inputs of a batch of calls as those of one call of all their rows."""
    flat = [join_rows(x, dim, B) for x, dim in zip(inputs, in_dims, strict=True)]
    for at in PER_CLASS:
        flat[at] = inputs[at]
    return flat


def _no_vmap(*_: Any) -> None:
    """Refuse vmap, within which the inputs that want a gradient cannot be told from the others."""
    raise RuntimeError(
        "a loss of hidden states must not be batched by vmap, got batched inputs; "
        "pass all rows at once"
    )


torch_rows.register_autograd(_gradients_of_rows, setup_context=_save_rows)
torch_rows_gradient.register_autograd(no_second_backward)


# --- A mean, whose gradients are made with it ----------------------------------------------------


@Operator
def torch_mean(
    inputs: LossInputs,
    items: Tensor,  # []
    want: Sequence[bool],  # of x, weight and bias
    whole_rows: int,  # of logits that are made at a time
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss [], row losses [N], parts [PARTS, N]; the three gradients, empty if not wanted."""
    results, gradients = _mean(inputs, items, want, whole_rows)
    loss, *parts = results
    return loss.sum() / items, loss, torch.stack(parts), *_filled(inputs, gradients)


def _mean(
    inputs: LossInputs, items: Tensor, want: Sequence[bool], whole_rows: int
) -> tuple[RowResults, Gradients]:
    with inputs.problem() as problem:
        upstream = (1 / items.to(problem.dtype)).expand(problem.num_rows)
        return problem.losses_and_gradients(whole_rows, upstream, _wanted(want))


@torch_mean.register_fake
def _(
    inputs: LossInputs, items: Tensor, want: Sequence[bool], whole_rows: int
) -> tuple[Tensor, ...]:
    N = inputs.x.shape[0]
    rows = inputs.x.new_empty(N, dtype=arithmetic_dtype(inputs.x))
    return rows.new_empty(()), rows, rows.new_empty(PARTS, N), *_empty_gradients(inputs, want)


@Operator
def torch_replay(
    inputs: LossInputs,
    want: Sequence[bool],
    upstream: Tensor,  # [N]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``sum(upstream * losses)``, from the inputs alone: a second backward."""
    with inputs.problem() as problem:
        _, saved = problem.losses()
        return _filled(inputs, problem.gradients(saved, upstream, _wanted(want)))


@torch_replay.register_fake
def _(inputs: LossInputs, want: Sequence[bool], upstream: Tensor) -> tuple[Tensor, ...]:
    return _empty_gradients(inputs, want)


@Operator
def torch_scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """``gradient * upstream``, an operator so that a second derivative can be refused."""
    return gradient * upstream  # in the arithmetic of 32 bits, with an upstream of 32 bits


@torch_scaled.register_fake
def _(gradient: Tensor, upstream: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.want, ctx.num_inputs = inputs[-2], len(inputs)
    ctx.set_materialize_grads(False)  # a zero for dweight would be as large as the weight
    ctx.save_for_backward(*output[3:])


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * ctx.num_inputs
    gradients = [
        torch_scaled(g, upstream) if wanted else g
        for g, wanted in zip(ctx.saved_tensors, ctx.want, strict=True)
    ]
    return _returned(gradients, ctx.want, ctx.num_inputs)


torch_replay.register_autograd(no_second_backward)
torch_scaled.register_autograd(no_second_backward)
torch_mean.register_autograd(_scale_gradients, setup_context=_save_gradients)
for _operator in (torch_mean, torch_replay):
    _operator.register_vmap(_no_vmap)


class _EagerMean(torch.autograd.Function):
    """``torch_mean`` where only autograd looks on: the first backward hands out its gradients
    without a copy, so that of a large weight there is one."""

    @staticmethod
    def forward(
        ctx: Any, items: Tensor, want: Sequence[bool], whole_rows: int, *inputs: Any
    ) -> tuple[Tensor, ...]:
        results, ctx.gradients = _mean(LossInputs(*inputs), items, want, whole_rows)
        ctx.want = want
        save_call(ctx, (*inputs, items))
        loss, *parts = results
        rows = loss, torch.stack(parts)
        ctx.mark_non_differentiable(*rows)
        return loss.sum() / items, *rows

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        num_inputs = len(LossInputs._fields)
        if upstream is None:
            return (None,) * (3 + num_inputs)
        gradients: Sequence[Tensor | None]
        ready, ctx.gradients = ctx.gradients, None
        if ready is None or torch.is_grad_enabled():
            # Handed out already, or to be differentiated again, which the operator refuses.
            (*given, items), _saved = saved_call(ctx)
            share = (upstream / items).expand(given[0].shape[0])
            gradients = torch_replay(*given, ctx.want, share)
        else:
            gradients = [g if g is None else g.mul_(upstream) for g in ready]
        return None, None, None, *_returned(gradients, ctx.want, num_inputs)


def mean_with_gradients(
    inputs: LossInputs, items: Tensor, want: Sequence[bool], whole_rows: int
) -> tuple[Tensor, RowResults]:
    """``sum of row losses / items``, differentiable, and the rows' losses and parts, detached."""
    if eager_autograd_only((*inputs, items)):
        loss, rows, parts = _EagerMean.apply(items, want, whole_rows, *inputs)
    else:
        loss, rows, parts, *_ = torch_mean(*inputs, items, want, whole_rows)
    return loss, RowResults(rows.detach(), *parts.detach())
