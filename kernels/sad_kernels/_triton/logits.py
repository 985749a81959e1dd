"""Operators and entry points for losses of logits.

``row_losses`` returns a loss per row. ``row_mean`` returns their mean, which most callers want, in
one operator, because each costs the host more time than a kernel of few rows takes. Both also
return the few numbers per row that ``row_gradient`` needs. That reads the logits again in backward
and multiplies by the upstream gradient it is given: right for any reduction, for ``retain_graph``
and under activation checkpointing, and the caller's logits are not overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sad_kernels._operator import (
    OpArgs,
    Operator,
    decode,
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
    RowLayout,
    RowResults,
    RowTargets,
)
from sad_kernels._triton import outcomes
from sad_kernels._triton.gemm import times
from sad_kernels._triton.launch import Forward, Logits, SortedTopK
from sad_kernels._triton.reduce import Reduced, reduced
from sad_kernels._triton.rows import PARTS, SAVED
from sad_kernels.objective import (
    DistillOutput,
    Head,
    Teacher,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
)


def row_losses_from_logits(
    spec: LossSpec,
    logits: Tensor,  # [N, >= V]
    transform: LogitTransform,
    targets: RowTargets,
    teacher: Teacher | None,
    layout: RowLayout,
) -> RowResults:
    """The loss of every row, differentiable by the logits, and its parts, detached."""
    loss, parts, *_ = row_losses(*_inputs(spec, logits, transform, targets, teacher, layout))
    return RowResults(loss, *parts.detach())


def mean_loss_from_logits(
    spec: LossSpec,
    logits: Tensor,
    transform: LogitTransform,
    targets: RowTargets,
    teacher: Teacher | None,
    layout: RowLayout,
    items: int | Tensor | None,
) -> DistillOutput:
    """``loss``: sum of row losses / max(items, 1), differentiable by the logits.

    Items are the rows that count, unless given. The other fields are sums over rows, detached, but
    for ``lse`` [N].
    """
    if isinstance(items, int):
        items = torch.full((), items, dtype=torch.float32, device=logits.device)
    inputs = _inputs(spec, logits, transform, targets, teacher, layout)
    loss, num_tokens, ce, kd, z, correct, agree, entropy, lse, *_ = row_mean(*inputs, items)
    sums = (x.detach() for x in (ce, kd, z, num_tokens, correct, agree, entropy))
    return DistillOutput(loss, *sums, layout.restore(lse.detach()).flatten())


def _inputs(
    spec: LossSpec,
    logits: Tensor,
    transform: LogitTransform,
    targets: RowTargets,
    teacher: Teacher | None,
    layout: RowLayout,
) -> RowInputs:
    """The common inputs of the operators, from what a caller passes."""
    t_logits = None
    top_k: TopKTensors = (None, None, None, None)
    args = OpArgs(spec, float(transform.logit_scale), transform.softcap)
    match teacher:
        case TeacherLogits(logit_scale=scale, softcap=softcap):
            t_logits = layout.rows(teacher.logits)
            args = args._replace(teacher_scale=float(scale), teacher_softcap=softcap)
        case TeacherHidden(hidden=hidden, head=head):
            t_logits = head_logits(layout.rows(hidden), head, _teacher_width(spec))
        case TeacherTopK():
            top_k = top_k_tensors(teacher, layout, spec.num_outcomes or spec.vocab)
    return RowInputs(logits, *targets, t_logits, *top_k, *encode(args))


def _teacher_width(spec: LossSpec) -> int:
    return spec.teacher_columns if spec.num_outcomes else spec.width


class RowInputs(NamedTuple):
    """What all operators of this file take first, in the schema's order."""

    student: Tensor  # [N, >= V]
    labels: Tensor | None  # [N], the first field of RowTargets; the others follow
    soft: Tensor | None  # [N, >= V]
    class_weight: Tensor | None  # [V]
    token_weights: Tensor | None  # [N]
    kd_weights: Tensor | None  # [N]
    other_rows: Tensor | None  # [N]
    outcomes: Tensor | None  # [>= V]
    teacher_outcomes: Tensor | None  # [>= V_t]
    teacher: Tensor | None  # [N, >= V]
    ids: Tensor | None  # [N, K], the first field of a SortedTopK; the others follow
    log_p: Tensor | None  # [N, K]
    log_rest: Tensor | None  # [N]
    best: Tensor | None  # [N]
    integers: Sequence[int]  # these three are an OpArgs, see encode
    numbers: Sequence[float]
    words: str

    @property
    def targets(self) -> RowTargets:
        soft = self.soft
        return RowTargets(
            self.labels,
            None if soft is None else columns_adjacent(soft).x,
            self.class_weight,
            self.token_weights,
            self.kd_weights,
            self.other_rows,
            self.outcomes,
            self.teacher_outcomes,
        )

    def sides(self) -> tuple[OpArgs, Logits, Logits | SortedTopK | None]:
        """The loss, the student's logits and the teacher's."""
        args = decode(self.integers, self.numbers, self.words)
        student = columns_adjacent(self.student, args.scale, args.softcap)
        top_k = self.ids, self.log_p, self.log_rest, self.best
        teacher = teacher_of(self.teacher, top_k, args.teacher_scale, args.teacher_softcap)
        return args, student, teacher


PER_CLASS = tuple(RowInputs._fields.index(name) for name in NOT_BY_ROW)
"""The tensors among the inputs that do not have a row for each of the student's."""

TopKTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""The fields of a ``SortedTopK``, as operators take them."""


def top_k_tensors(teacher: TeacherTopK, layout: RowLayout, vocab: int) -> TopKTensors:
    """Flatten a top-k teacher to rows and sort its ids."""
    ids, log_probs = layout.rows(teacher.ids), layout.rows(teacher.log_probs)
    top_k = SortedTopK.prepare(ids, log_probs, teacher.tail, vocab)
    return top_k.ids, top_k.log_p, top_k.log_rest, top_k.best


def head_logits(hidden: Tensor, head: Head, vocab: int) -> Tensor:
    """The logits of a teacher given by its head, in fp32, beside a student's whole logits."""
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the factors
        z = times(hidden, head.weight[:vocab].to(hidden.dtype).T)
    if head.bias is not None:
        z += head.bias[:vocab]
    z *= head.logit_scale
    return z if head.softcap is None else z.div_(head.softcap).tanh_().mul_(head.softcap)


@Operator
def row_losses(inputs: RowInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row losses [N], their parts [PARTS, N]; saved, inside and outside of a ``Forward``."""
    args, student, teacher = inputs.sides()
    result = outcomes.forward(args.spec, student, inputs.targets, teacher)
    return result.loss, result.parts, result.saved, result.inside, result.outside


@row_losses.register_fake
def _(inputs: RowInputs) -> Any:
    return _fake_rows(inputs.student, inputs.ids)


def _fake_rows(student: Tensor, ids: Tensor | None) -> tuple[Tensor, ...]:
    N = student.shape[0]  # not len(), which compiles anew for every N
    rows = student.new_empty(N, dtype=torch.float32)
    K = 0 if ids is None else ids.shape[1]
    inside = rows.new_empty(0, 0) if ids is None else rows.new_empty(N, K)
    outside = rows.new_empty(0) if ids is None else rows.new_empty(N)
    return rows, rows.new_empty(PARTS, N), rows.new_empty(SAVED, N), inside, outside


@row_losses.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    B = info.batch_size
    if any(in_dims[at] is not None for at in PER_CLASS):
        return _one_by_one(row_losses, B, in_dims, inputs)
    flat = [join_rows(x, dim, B) for x, dim in zip(inputs, in_dims, strict=True)]
    for at in PER_CLASS:
        flat[at] = inputs[at]
    out_dims = (0, 1, 1, 0, 0)  # where each output has its rows
    return part_rows(row_losses(*flat), out_dims, B), out_dims


def _one_by_one(
    operator: Operator, B: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> Any:
    """A loop over a batch of B calls."""

    def each(x: Any, dim: int | None) -> Sequence[Any]:
        batched = isinstance(x, Tensor) and dim is not None
        return x.unbind(dim) if batched else [x] * B

    calls = zip(*(each(x, dim) for x, dim in zip(inputs, in_dims, strict=True)), strict=True)
    outputs = [operator(*one) for one in calls]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    stacked = tuple(map(torch.stack, zip(*outputs, strict=True)))
    return stacked, (0,) * len(stacked)


@Operator
def row_mean(
    inputs: RowInputs,
    items: Tensor | None,  # []
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """The fields of ``Reduced``, the divisor last; saved, inside and outside of a ``Forward``."""
    (spec, *_), student, teacher = inputs.sides()
    rows = outcomes.forward(spec, student, inputs.targets, teacher)
    mean, divisor, *sums = reduced(rows.loss, rows.parts, inputs.labels, spec.ignore_index, items)
    return mean, *sums, divisor, rows.saved, rows.inside, rows.outside  # pyright: ignore


@row_mean.register_fake
def _(inputs: RowInputs, items: Tensor | None) -> Any:
    loss, _parts, *saved = _fake_rows(inputs.student, inputs.ids)
    mean, divisor, *sums = (loss.new_empty(()) for _ in Reduced._fields[:-1])
    return mean, *sums, loss.new_empty(loss.shape), divisor, *saved


@row_mean.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    """A loop over the batch: each element divides by its own number of rows."""
    return _one_by_one(row_mean, info.batch_size, in_dims, inputs)


@Operator
def row_gradient(
    inputs: RowInputs, saved: Tensor, inside: Tensor, outside: Tensor, upstream: Tensor
) -> Tensor:
    """The gradient of ``sum(upstream * losses)`` by the student's logits, in their dtype."""
    args, student, teacher = inputs.sides()
    out = inputs.student.new_empty(inputs.student.shape)
    # vmap gives views of a batch's, kernels count on rows that follow each other.
    saved, inside, outside = saved.contiguous(), inside.contiguous(), outside.contiguous()
    forward = Forward(upstream, upstream, saved, inside, outside)
    if args.scale != 1:  # of the logits, which the kernels leave to the upstream
        upstream = upstream * args.scale
    outcomes.gradient(args.spec, student, inputs.targets, teacher, forward, upstream, out)
    return out


@row_gradient.register_fake
def _(inputs: RowInputs, *_: Tensor) -> Tensor:
    return inputs.student.new_empty(inputs.student.shape)


@row_gradient.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    """A loop over the batch: the upstream is a number per row, or one for all of an element's."""
    return _one_by_one(row_gradient, info.batch_size, in_dims, inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_call(ctx, inputs, output[2:])


def _setup_context_of_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The divisor is saved, not the items, which may change in place until backward.
    save_call(ctx, inputs[:-1], output[-4:])


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    inputs, saved = saved_call(ctx)
    nothing = [None] * (len(inputs) - 1)
    if upstream is None or not ctx.needs_input_grad[0]:
        return None, *nothing
    return row_gradient(*inputs, *saved, upstream), *nothing


def _backward_of_mean(ctx: Any, upstream: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    inputs, (divisor, *saved) = saved_call(ctx)
    nothing = [None] * len(inputs)  # one more are the items
    if upstream is None or not ctx.needs_input_grad[0]:
        return None, *nothing
    share = (upstream / divisor).reshape(1)  # of every row
    return row_gradient(*inputs, *saved, share), *nothing


row_losses.register_autograd(_backward, setup_context=_setup_context)
row_mean.register_autograd(_backward_of_mean, setup_context=_setup_context_of_mean)
row_gradient.register_autograd(no_second_backward)


def teacher_of(
    logits: Tensor | None, top_k: TopKTensors, scale: float, softcap: float | None
) -> Logits | SortedTopK | None:
    """The teacher that an operator's tensors stand for: logits, a top-k teacher, or none."""
    if top_k[0] is not None:
        return SortedTopK(*top_k)  # pyright: ignore[reportArgumentType]
    return None if logits is None else columns_adjacent(logits, scale, softcap)


def columns_adjacent(x: Tensor, scale: float = 1.0, softcap: float | None = None) -> Logits:
    """Rows of logits as kernels read them, copied if their columns are strided."""
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return Logits(x, scale=scale, softcap=softcap)
