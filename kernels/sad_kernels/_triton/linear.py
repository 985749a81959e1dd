"""Operators and entry points for losses of hidden states and a head.

``linear_loss`` is the sum over rows divided by ``items``. Its forward also computes the gradients,
chunk by chunk, while a chunk's logits are in memory (``6 N V D`` FLOP for a student alone), and
backward multiplies them by the upstream gradient. ``linear_rows`` returns a loss per row, whose
gradients need each row's upstream first, so backward computes the logits again (``8 N V D`` FLOP).
Where no gradient is wanted both compute losses only.

fp16. The gradient ``g`` of the logits, divided by the number of items, would vanish below fp16's
smallest number. It is stored as ``c g`` near the top of fp16's range instead, with a power of two
taken out of ``1 / items`` and of a bound on ``|g|`` that the objective gives; dhidden stays in fp32
until backward, where the power of two and the upstream (a GradScaler's, say) come in. dweight and
dbias stay in fp32 until then in every dtype: they are rounded once, in the pass that scales them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sad_kernels._divergence_table import DIVERGENCES
from sad_kernels._operator import (
    OpArgs,
    Operator,
    decode,
    encode,
    no_second_backward,
    save_call,
    saved_call,
)
from sad_kernels._rows import LossSpec, RowLayout, RowResults, RowTargets
from sad_kernels._triton import chunks
from sad_kernels._triton.chunks import GradMask, Result
from sad_kernels._triton.gemm import HiddenWithHead
from sad_kernels._triton.launch import Logits, SortedTopK
from sad_kernels._triton.logits import TopKTensors, teacher_of, top_k_tensors
from sad_kernels._triton.rows import PARTS
from sad_kernels._triton.scale import scaled
from sad_kernels.objective import (
    Head,
    Objective,
    Teacher,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
)

LARGEST_EXPONENT = 14  # stored gradients stay below 2^15; fp16 ends at 2^16


def mean_loss(
    spec: LossSpec,
    hidden: Tensor,  # [N, D]
    head: Head,
    targets: RowTargets,
    teacher: Teacher | None,
    layout: RowLayout,
    items: Tensor,  # []
    chunk_bytes: int | None,
    compact: bool,
) -> tuple[Tensor, RowResults]:
    """``sum of row losses / items``, differentiable, and the row losses and parts, detached."""
    inputs = _inputs(spec, hidden, head, targets, teacher, layout, chunk_bytes, compact)
    grad_mask = list(_grad_mask(hidden, head))
    total, rows, parts, *_ = linear_loss(*inputs, items, grad_mask)
    return total, RowResults(rows.detach(), *parts.detach())


def row_losses_from_hidden(
    spec: LossSpec,
    hidden: Tensor,
    head: Head,
    targets: RowTargets,
    teacher: Teacher | None,
    layout: RowLayout,
    chunk_bytes: int | None,
    compact: bool,
) -> RowResults:
    """The loss of every row, differentiable, and its parts, detached."""
    inputs = _inputs(spec, hidden, head, targets, teacher, layout, chunk_bytes, compact)
    loss, parts = linear_rows(*inputs)
    return RowResults(loss, *parts.detach())


def _grad_mask(hidden: Tensor, head: Head) -> GradMask:
    """Which gradients forward has to compute: none where autograd is off."""
    bias = head.bias is not None and head.bias.requires_grad
    needed = GradMask(hidden.requires_grad, head.weight.requires_grad, bias)
    return needed if torch.is_grad_enabled() else GradMask(False, False, False)


def _inputs(
    spec: LossSpec,
    hidden: Tensor,
    head: Head,
    targets: RowTargets,
    teacher: Teacher | None,
    layout: RowLayout,
    chunk_bytes: int | None,
    compact: bool,
) -> LinearInputs:
    """The common inputs of the operators, from what a caller passes."""
    t_hidden = t_weight = t_bias = None
    top_k: TopKTensors = (None, None, None, None)
    args = OpArgs(spec, float(head.logit_scale), head.softcap)
    match teacher:
        case TeacherHidden(hidden=t_hidden, head=other):
            t_hidden = layout.rows(t_hidden)
            t_weight, t_bias = other.weight, other.bias
            args = args._replace(
                teacher_scale=float(other.logit_scale), teacher_softcap=other.softcap
            )
        case TeacherLogits(logits=logits, logit_scale=scale, softcap=softcap):
            t_hidden = layout.rows(logits)
            args = args._replace(teacher_scale=float(scale), teacher_softcap=softcap)
        case TeacherTopK():
            top_k = top_k_tensors(teacher, layout, spec.num_outcomes or spec.vocab)
    student = hidden, head.weight, head.bias
    return LinearInputs(
        *student, *_without_soft(targets), t_hidden, t_weight, t_bias, *top_k, *encode(args),
        chunk_bytes, compact,
    )  # fmt: skip


def _without_soft(targets: RowTargets) -> tuple[Tensor | None, ...]:
    """The fields but for labels that are probabilities, which losses of given logits take alone."""
    assert targets.soft is None
    labels, _, *others = targets
    return labels, *others


class LinearInputs(NamedTuple):
    """What all operators of this file take first, in the schema's order."""

    hidden: Tensor  # [N, D_s]
    weight: Tensor  # [>= V, D_s]
    bias: Tensor | None  # [>= V]
    labels: Tensor | None  # [N]; this and what follows are fields of RowTargets
    class_weight: Tensor | None  # [V]
    token_weights: Tensor | None  # [N]
    kd_weights: Tensor | None  # [N]
    other_rows: Tensor | None  # [N]
    outcomes: Tensor | None  # [>= V]
    teacher_outcomes: Tensor | None  # [>= V_t]
    t_hidden: Tensor | None  # [N, D_t]; without t_weight the teacher's logits [N, >= V]
    t_weight: Tensor | None  # [>= V, D_t]
    t_bias: Tensor | None  # [>= V]
    ids: Tensor | None  # the fields of a SortedTopK
    log_p: Tensor | None
    log_rest: Tensor | None
    best: Tensor | None
    integers: Sequence[int]  # these three are an OpArgs, see encode
    numbers: Sequence[float]
    words: str
    chunk_bytes: int | None
    compact: bool  # logits as codes, where these can be, see ``compact.py``

    @property
    def args(self) -> OpArgs:
        return decode(self.integers, self.numbers, self.words)

    @property
    def targets(self) -> RowTargets:
        return RowTargets(
            self.labels,
            None,
            self.class_weight,
            self.token_weights,
            self.kd_weights,
            self.other_rows,
            self.outcomes,
            self.teacher_outcomes,
        )

    def student(self) -> HiddenWithHead:
        args, weight = self.args, self.weight.to(self.hidden.dtype)
        return HiddenWithHead(self.hidden, weight, _adjacent(self.bias), args.scale, args.softcap)

    def teacher(self) -> HiddenWithHead | Logits | SortedTopK | None:
        x, weight, args = self.t_hidden, self.t_weight, self.args
        scale, softcap = args.teacher_scale, args.teacher_softcap
        if x is None or weight is None:
            top_k = self.ids, self.log_p, self.log_rest, self.best
            return teacher_of(x, top_k, scale, softcap)
        return HiddenWithHead(x, weight.to(x.dtype), _adjacent(self.t_bias), scale, softcap)


@Operator
def linear_loss(
    inputs: LinearInputs,
    items: Tensor,  # []
    want: Sequence[bool],  # a GradMask
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss [], row losses [N] and parts [PARTS, N]; dhidden, dweight, dbias, their factor [].

    The gradients are those of the loss once multiplied by the factor, see ``unit_scale``.
    """
    hidden = inputs.hidden
    inverse = 1 / items.float()
    upstream, factor = unit_scale(inputs.args, inputs.targets, inverse, hidden.dtype)
    result = _run(inputs, GradMask(*want), upstream[None])
    loss = result.loss.sum() / items
    gradients = result.dhidden, result.dweight, result.dbias
    return loss, result.loss, result.parts, *gradients, factor


@linear_loss.register_fake
def _(inputs: LinearInputs, items: Tensor, want: Sequence[bool]) -> tuple[Tensor, ...]:
    hidden, wanted = inputs.hidden, GradMask(*want)
    N = hidden.shape[0]
    rows = hidden.new_empty(N, dtype=torch.float32)

    def like(x: Tensor | None, wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return rows.new_empty(x.shape if wanted and x is not None else 0, dtype=dtype)

    return (
        rows.new_empty(()),
        rows,
        rows.new_empty(PARTS, N),
        like(hidden, wanted.hidden, _dhidden_dtype(hidden)),
        like(inputs.weight, wanted.weight),
        like(inputs.bias, wanted.bias),
        rows.new_empty(()),
    )


def _dhidden_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which forward leaves dhidden for backward."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the gradients for backward, in place of the inputs that they were computed from."""
    hidden, weight, bias = inputs[:3]
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
    ctx.grad_mask = inputs[-1]
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)  # a zero for dweight would be as large as the weight in fp32
    ctx.save_for_backward(*output[3:])


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Backward of ``linear_loss``: the saved gradients times factor and upstream."""
    *gradients, factor = ctx.saved_tensors
    if upstream is None:
        return (None,) * ctx.num_inputs
    out = [
        scaled_gradient(gradient, factor, upstream, dtype) if wanted else None
        for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.grad_mask, strict=True)
    ]
    return *out, *[None] * (ctx.num_inputs - 3)


@Operator
def scaled_gradient(
    gradient: Tensor, factor: Tensor, upstream: Tensor, dtype: torch.dtype
) -> Tensor:
    """``gradient * factor * upstream``, an operator so that a second backward can be refused."""
    return scaled(gradient, factor * upstream, dtype)


@scaled_gradient.register_fake
def _(gradient: Tensor, factor: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


scaled_gradient.register_autograd(no_second_backward)
linear_loss.register_autograd(_scale_gradients, setup_context=_save_gradients)


@Operator
def linear_rows(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
    """Row losses [N] and their parts [PARTS, N]."""
    result = _run(inputs, GradMask(False, False, False), None)
    return result.loss, result.parts


@linear_rows.register_fake
def _(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
    N = inputs.hidden.shape[0]
    rows = inputs.hidden.new_empty(N, dtype=torch.float32)
    return rows, rows.new_empty(PARTS, N)


@Operator
def linear_rows_gradient(
    inputs: LinearInputs,
    want: Sequence[bool],  # a GradMask
    upstream: Tensor,  # [N]
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias of ``sum(upstream * losses)``, empty where not wanted."""
    hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
    upstream, factor = unit_scale(inputs.args, inputs.targets, upstream.float(), hidden.dtype)
    result = _run(inputs, GradMask(*want), upstream)
    gradients = result.dhidden, result.dweight, result.dbias
    dtypes = hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype
    unscaled = hidden.dtype != torch.float16
    dhidden, dweight, dbias = (
        g if unscaled and g.dtype == dtype else scaled(g, factor, dtype)
        for g, dtype in zip(gradients, dtypes, strict=True)
    )
    return dhidden, dweight, dbias


@linear_rows_gradient.register_fake
def _(inputs: LinearInputs, want: Sequence[bool], upstream: Tensor) -> tuple[Tensor, ...]:
    hidden, weight, bias, wanted = inputs.hidden, inputs.weight, inputs.bias, GradMask(*want)
    return (
        hidden.new_empty(hidden.shape if wanted.hidden else 0),
        weight.new_empty(weight.shape if wanted.weight else 0),
        hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape if wanted.bias else 0),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_call(ctx, inputs)


def _gradients_of_rows(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Backward of ``linear_rows``: the logits again, with each row's upstream."""
    inputs, _saved = saved_call(ctx)
    if upstream is None:
        return (None,) * len(inputs)
    grad_mask = list(ctx.needs_input_grad[:3])
    gradients = linear_rows_gradient(*inputs, grad_mask, upstream)
    out = [g if want else None for g, want in zip(gradients, grad_mask, strict=True)]
    return *out, *[None] * (len(inputs) - 3)


linear_rows.register_autograd(_gradients_of_rows, setup_context=_save_inputs)
linear_rows_gradient.register_autograd(no_second_backward)


def _no_vmap(*_: Any) -> None:
    """Refuse vmap, within which the inputs that want a gradient cannot be told from the others."""
    raise RuntimeError(
        "a loss of hidden states must not be batched by vmap, got batched inputs; "
        "pass all rows at once"
    )


for _operator in (linear_loss, linear_rows, linear_rows_gradient):
    _operator.register_vmap(_no_vmap)


def unit_scale(
    args: OpArgs, targets: RowTargets, upstream: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The upstream that the stored ``g`` gets, and the factor that its products get afterwards.

    For fp32 and bf16, whose exponents reach far enough, the second is 1. For fp16 ``upstream = u
    2^x`` with ``1 <= max |u| < 2``, and the first is ``u 2^k`` with k as large as the bound on
    ``|g|`` lets it be. Past that bound a value becomes inf, and a GradScaler skips the step.
    """
    if dtype != torch.float16:
        return upstream * args.scale, torch.ones((), device=upstream.device)
    exponent = upstream.abs().max().frexp().exponent - 1 if upstream.numel() else 0
    shift = LARGEST_EXPONENT - _exponent_of_bound(args.spec, targets) - exponent
    one = torch.ones((), device=upstream.device)
    return torch.ldexp(upstream, shift), torch.ldexp(one, -shift) * args.scale


def _exponent_of_bound(spec: LossSpec, targets: RowTargets) -> int | Tensor:  # []
    """The exponent of a power of two that no row's gradient by a logit is above."""
    labels, by_class = targets.labels, targets.class_weight
    on_ce, on_kd = targets.token_weights, targets.kd_weights
    ce, z, kd = _bounds(spec.objective)
    if by_class is None and on_ce is None and on_kd is None:
        return math.ceil(math.log2(max(ce + z + kd, 2.0**-100)))
    if by_class is not None:
        ce = ce * by_class.abs().max()
    rows: Any = (ce + z) * (1.0 if on_ce is None else on_ce.abs())
    rows = rows + kd * (1.0 if on_kd is None else on_kd.abs())
    # Rows that do not count may hold anything, and one that is not a number spoils no other.
    counts = rows.isfinite()
    if labels is not None:
        counts = counts & (labels != spec.ignore_index)
    rows = rows.where(counts, 2.0**-100)
    largest = rows.max() if rows.numel() else rows.new_ones(())
    return largest.clamp(min=2.0**-100).frexp().exponent


def _bounds(o: Objective) -> tuple[float, float, float]:
    """Bounds on a row's gradient by a logit: of CE, of the z-loss for an lse of up to 128, and of
    the divergence. The table of divergences says how far the unbounded reverse KL is covered.
    """
    factor = DIVERGENCES[o.divergence].gradient_bound(o.beta)
    if o.other_divergence is not None:
        factor = max(factor, DIVERGENCES[o.other_divergence].gradient_bound(o.other_beta))
    return o.ce_weight, 256 * o.z_loss, o.kd_weight * o.kd_scale / o.temperature * factor


def _run(inputs: LinearInputs, grad_mask: GradMask, upstream: Tensor | None) -> Result:
    """Losses, and the wanted gradients of ``sum(upstream * loss)``; None: losses only."""
    hidden = inputs.hidden
    with torch.autocast(hidden.device.type, enabled=False):  # it acts inside operators too
        return chunks.run(
            inputs.args.spec,
            inputs.student(),
            inputs.targets,
            inputs.teacher(),
            grad_mask=grad_mask,
            upstream=upstream,
            dhidden_dtype=_dhidden_dtype(hidden),
            chunk_bytes=inputs.chunk_bytes,
            compact_logits=inputs.compact,
        )


def _adjacent(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
