r"""Losses from hidden states and a head, computed in chunks: the N x V logits never exist.

With ``z = softcap(logit_scale * (h W^T + b))`` the losses are those of ``ce.py`` and ``kd.py``, and
for a gradient ``g`` of the logits, taken before softcap and scale,

    dhidden = g W        dweight = g^T h        dbias = sum over rows of g

``impl="triton"`` cuts the rows into chunks and computes the gradients in forward, while a chunk's
logits are in memory (``_triton/chunks.py``, ``_triton/linear.py``): ``N V (6 D_s + 2 D_t)`` FLOP in
library products with fp32 results, and row kernels that read every logit twice (three times for the
mixtures) and write ``g`` once, in the dtype of the hidden states. Backward multiplies by the
upstream. With ``reduction="none"`` backward computes the logits again. Memory beyond inputs and
gradients: ``chunk_bytes``, the fp32 sum of ``dweight``, and copies of the hidden states of a chunk.
With ``logits="compact"`` the products of a slab that fits a GPU's cache become codes of 16 bits,
over which ``g`` is written (``_triton/compact.py``).

``impl="torch"`` likewise makes whole rows of logits at a time, as many as fit ``chunk_bytes``, and
the gradients with them: ``N V (6 D_s + 2 D_t)`` FLOP. Backward multiplies by the upstream gradient,
in place, and hands the gradients out; a second backward computes them again. Where fewer than 64
whole rows fit, for a loss per row, for fp16 (whose gradients over ``num_items`` would vanish) and
without gradients, the vocabulary is cut into slices and the rows into blocks: forward adds the
logits of a slice to row statistics, a few numbers per row; a mixture (JSD, the skews) needs two
rounds. Backward computes the logits again, forms ``g`` with the true upstream gradient, adds
``g W`` to ``dhidden`` and writes the slice of ``dweight`` once: ``N V (8 D_s + 4 D_t)`` FLOP
(``+ 2 D_s + 2 D_t`` for the mixtures). A frozen leaf costs nothing, and without gradients the
statistics are all there is.

Its memory beyond the inputs, in bytes, with ``i`` the item size of the arithmetic (4, or 8 for
fp64) and ``n <= N`` the rows that count (``linear_memory_bytes`` adds it up):

    forward    a chunk_bytes + copies + b N + gradients + i n D_s       a = 1.25, b = 256
    backward   the same, where the logits are made again

With ``outcomes`` rows are always whole, one at least, and the gradients of a loss per row made with
logits made again; ``8 (V + V_t)`` bytes more are the tables.

``copies`` are ``i n D_s`` if the hidden states are not in the dtype of the arithmetic or some row
is ignored, and ``i n D_t`` for the teacher's likewise; ``gradients`` are what is returned, and
``i V D_s`` more for a weight in 16 bits whose rows do not all fit at once. A ``TeacherTopK`` adds
``b = 64 K``. ``chunk_bytes`` too small for one row and one column counts as what they need. The
buffers of ``chunk_bytes`` stay with the thread for its next call.

Precision. With ``impl="torch"`` arithmetic is fp32 (fp64 for fp64 inputs) whatever the inputs are:
16-bit factors are exact in it, so logits, ``g`` and all sums are never rounded to 16 bits, and
every gradient is rounded once (twice in 16 bits where backward's factor is no power of two). On a
processor that multiplies bf16, logits of bf16 factors come from two bf16 products and have 16 bits,
a teacher's relative to the student's, and ``g`` is rounded to bf16, as eager PyTorch's is
(``_torch/gemm.py``). A weight wider than the hidden states is rounded to their dtype, as autocast
does, and gets its gradient in its own dtype, unrounded.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from sad_kernels import _check
from sad_kernels._dispatch import resolve_impl
from sad_kernels._rows import (
    LossSpec,
    RowLayout,
    RowResults,
    RowTargets,
    count_valid,
    distill_output,
    divisor_of,
    mean_divisor,
    reduce_rows,
)
from sad_kernels._tiles import LogitStorage
from sad_kernels.objective import DistillOutput, Head, Objective, Teacher, dense_tensors
from sad_kernels.outcomes import Outcomes
from sad_kernels.vocab import VocabShard


def linear_cross_entropy(
    hidden: Tensor,  # [..., D_s]
    weight: Tensor,  # [>= V, D_s]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [>= V]
    class_weight: Tensor | None = None,  # [V]
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    chunk_bytes: int | None = None,
    impl: str = "auto",
    logits: LogitStorage = "exact",
    vocab_shard: VocabShard | None = None,
) -> Tensor:
    """``cross_entropy`` of the logits ``softcap(logit_scale * (hidden @ weight.T + bias))``.

    The logits are computed in chunks and never held whole. Mathematics, masking, labels (classes
    only), reductions and result as for ``cross_entropy``, whose ``weight`` is ``class_weight``
    here; gradients for ``hidden``, ``weight`` and ``bias``, each in its own dtype. ``chunk_bytes``
    bounds the memory (see the module's docstring; by default 128 MiB with ``impl="torch"`` and
    1 GiB with ``impl="triton"``) and moves results by rounding only.

    ``logits="compact"`` lets ``impl="triton"`` keep the logits of a chunk in 16 bits, as
    ``linear_distill_loss`` does; gradients have the errors of "exact" in all that was tried.
    ``chunk_bytes`` is 1.3 GiB by default then.

    With a ``vocab_shard`` weight and bias are those of its columns; classes, ``class_weight`` and
    ``valid_vocab`` are those of the whole vocabulary. See ``linear_distill_loss``.

    Raises ``TypeError`` and ``ValueError`` for arguments that do not fit, and for an ``impl`` that
    does not work on them. Backward cannot be differentiated again.

    >>> import torch
    >>> hidden, weight = torch.zeros(3, 8), torch.zeros(16, 8)
    >>> linear_cross_entropy(hidden, weight, torch.tensor([1, -100, 2]))  # log 16
    tensor(2.7726)
    """
    head = Head(weight, bias, logit_scale, softcap, valid_vocab, vocab_shard)
    objective = Objective(
        ce_weight=1.0, kd_weight=0.0, label_smoothing=label_smoothing, z_loss=z_loss
    )
    _check.require_rows("hidden", hidden)
    labels = _check.require_labels(labels, hidden, "hidden")
    call = _checked_call(
        hidden,
        head,
        labels,
        None,
        objective,
        compute_metrics=False,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
        chunk_bytes=chunk_bytes,
        impl=impl,
        logits=logits,
    )
    by_class = _check.class_weight(
        class_weight,
        hidden,
        "hidden",
        call.spec.vocab,
        what="class_weight",
        width=head.num_columns,
    )
    call = call._replace(targets=call.targets._replace(class_weight=by_class))
    if reduction == "none":
        return call.layout.restore(_rows(call).loss)
    if reduction == "sum":
        divisor = divisor_of(count_valid(None, ignore_index, hidden), 1)
    else:
        divisor = mean_divisor(call.spec, call.targets, hidden, num_items)
    loss, _ = _total(call, divisor)
    return loss


def linear_distill_loss(
    hidden: Tensor,  # [..., D_s]
    head: Head,
    labels: Tensor | None,  # [...]
    teacher: Teacher | None,
    objective: Objective,
    *,
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,  # [...] or [N]
    kd_token_weights: Tensor | None = None,  # [...] or [N]
    other_rows: Tensor | None = None,  # [...] or [N], bool
    chunk_bytes: int | None = None,
    impl: str = "auto",
    logits: LogitStorage = "exact",
    outcomes: Outcomes | None = None,
) -> DistillOutput:
    """``distill_loss`` of the logits ``head(hidden)``, computed in chunks and never held whole.

    Mathematics, masking, labels, weights and result as for ``distill_loss``; any kind of teacher,
    and with ``TeacherHidden`` its logits are never held whole either. Gradients for ``hidden`` and
    for the head's ``weight`` and ``bias``, each in its own dtype. ``chunk_bytes`` as for
    ``linear_cross_entropy``. ``hidden`` in 16 bits may meet a weight in fp32, as under autocast.

    The head may be split over processes, by its ``shard``, with a teacher as for ``distill_loss``
    with a ``vocab_shard``. All ranks of the shard's group call with the same rows and
    ``chunk_bytes``, and ask for the same gradients. All get the same result and gradient of
    ``hidden``, and each the gradients of its own rows of weight and bias.

    With ``outcomes`` the teacher's head may have other columns than the student's, see
    ``distill_loss``.

    ``logits`` is a format in which ``impl="triton"`` keeps the logits of a chunk: "exact" is fp32,
    "compact" 16 bits, relative to the exact maximum of 256 columns. It takes half the memory
    traffic; half again as many rows fit the same ``chunk_bytes``, whose default is 1.3 GiB then.
    The loss is that of rounded logits, each off by up to ``2^-13`` of 1/4 and its distance from the
    largest of its 256. Where both models agree to the bit, and ``teacher_share`` is 1, there is no
    divergence and no gradient. In bf16 the relative error of the gradients of a batch, beside that
    of their rounding to 16 bits, is at most 1.1 times that of "exact" where the divergence (without
    T^2) is above 1e-2 nats, at temperature 1 above 1e-3, in rows as peaked as a language model's,
    whose likeliest token has a tenth or more. Nearer it grows, as the gradient vanishes: 4 times at
    3e-6 nats and temperature 1, 3 times at 1e-4 and temperature 2, 9 times at 3e-5 and temperature
    4; and likewise in flat rows, 1.8 times at 1e-3. In fp16, whose own rounding is smaller, it is
    1.4 to 2 times at 2e-3 nats. A finite logit more than 8191 below the largest of its 256, such as
    a column that is masked by -1e4, counts as 8191 below it.

    Computed with "exact" logits in any case are: hidden states in fp32; a student's softcap; a
    teacher that is no ``TeacherHidden``; divergences but for forward_kl and reverse_kl, and two of
    them by row; a shard; outcomes; temperatures below 0.25 or above 64. So is everything with
    ``impl="torch"``, which has no use for the format.

    Raises ``TypeError`` and ``ValueError`` for arguments that do not fit, and for an ``impl`` that
    does not work on them. Backward cannot be differentiated again.

    >>> import torch
    >>> from sad_kernels import Head, Objective, TeacherHidden
    >>> student = Head(torch.zeros(16, 8))
    >>> teacher = TeacherHidden(torch.zeros(3, 4), Head(torch.zeros(16, 4)))
    >>> labels, objective = torch.tensor([1, -100, 2]), Objective(ce_weight=0.3, kd_weight=0.7)
    >>> out = linear_distill_loss(torch.zeros(3, 8), student, labels, teacher, objective)
    >>> out.loss, out.kd, out.num_tokens  # 0.3 log 16
    (tensor(0.8318), tensor(0.), tensor(2.))
    """
    call = _checked_call(
        hidden,
        head,
        labels,
        teacher,
        objective,
        compute_metrics=True,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
        chunk_bytes=chunk_bytes,
        impl=impl,
        logits=logits,
        token_weights=token_weights,
        kd_token_weights=kd_token_weights,
        other_rows=other_rows,
        outcomes=outcomes,
    )
    num_tokens = count_valid(call.targets.labels, ignore_index, hidden)
    if reduction == "none":
        rows = _rows(call)
        loss = reduce_rows(rows.loss, None, reduction, call.layout)
    else:
        divisor = divisor_of(num_tokens, num_items if reduction == "mean" else 1)
        loss, rows = _total(call, divisor)
    return distill_output(loss, rows, num_tokens, call.layout)


class _Call(NamedTuple):
    """A checked call of one of the two functions."""

    spec: LossSpec
    hidden: Tensor  # [..., D_s]
    head: Head
    targets: RowTargets
    teacher: Teacher | None
    layout: RowLayout
    chunk_bytes: int | None
    impl: Literal["triton", "torch"]
    compact: bool


def _checked_call(
    hidden: Tensor,
    head: Head,
    labels: Tensor | None,
    teacher: Teacher | None,
    objective: Objective,
    *,
    compute_metrics: bool,
    ignore_index: int,
    reduction: str,
    num_items: int | Tensor | None,
    chunk_bytes: int | None,
    impl: str,
    logits: str,
    token_weights: Tensor | None = None,
    kd_token_weights: Tensor | None = None,
    other_rows: Tensor | None = None,
    outcomes: Outcomes | None = None,
) -> _Call:
    """Check the arguments, flatten the labels, and choose the implementation."""
    _check.require_rows("hidden", hidden)
    _check.require_head(head, hidden)
    _check.require_teacher(teacher, hidden, "hidden")
    _check.require_objective(objective, teacher, has_labels=labels is not None)
    _check.require_int("ignore_index", ignore_index)
    _check.require_chunk_bytes(chunk_bytes)
    _check.require_choice("logits", logits, get_args(LogitStorage))
    _check.require_reduction(reduction)
    _check.require_divisor(num_items, reduction, hidden, "hidden")
    shard = _check.shard_of_columns("head shard", head.shard, len(head.weight), teacher, outcomes)
    vocab, *sums = _check.compared_columns(
        head.num_columns, head.valid_vocab, teacher, shard, objective, outcomes, hidden, "hidden"
    )
    layout = RowLayout(hidden)
    targets = _check.row_targets(
        hidden,
        "hidden",
        layout,
        objective,
        labels=labels,
        token_weights=token_weights,
        kd_token_weights=kd_token_weights,
        other_rows=other_rows,
    )
    targets = _check.with_outcomes(targets, outcomes)
    given = [x for x in (hidden, head.weight, labels) if x is not None]
    resolved = resolve_impl(impl, *given, *dense_tensors(teacher))
    spec = LossSpec(objective, vocab, ignore_index, True, compute_metrics, shard, *sums)
    compact = logits == "compact"
    return _Call(spec, hidden, head, targets, teacher, layout, chunk_bytes, resolved, compact)


def _total(call: _Call, items: Tensor) -> tuple[Tensor, RowResults]:
    """The sum of all row losses over ``items``, differentiable, and the rows."""
    if call.impl == "triton":
        from sad_kernels._triton import linear as triton_path

        return triton_path.mean_loss(*_rows_of(call), items, call.chunk_bytes, call.compact)
    from sad_kernels._torch import linear as torch_path

    return torch_path.mean_loss(*_rows_of(call), items, call.chunk_bytes)


def _rows(call: _Call) -> RowResults:
    """The losses of all rows, each differentiable on its own."""
    if call.impl == "triton":
        from sad_kernels._triton import linear as triton_path

        return triton_path.row_losses_from_hidden(*_rows_of(call), call.chunk_bytes, call.compact)
    from sad_kernels._torch import linear as torch_path

    return torch_path.row_losses_from_hidden(*_rows_of(call), call.chunk_bytes)


def _rows_of(
    call: _Call,
) -> tuple[LossSpec, Tensor, Head, RowTargets, Teacher | None, RowLayout]:
    """The arguments that say whose rows are compared with what."""
    x = call.layout.rows(call.hidden)
    return call.spec, x, call.head, call.targets, call.teacher, call.layout
