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

``impl="torch"`` cuts the vocabulary into slices and the rows into blocks, so that what is alive at
a time fits ``chunk_bytes``. Forward computes the student's and the teacher's logits of a slice and
adds them to row statistics, a few numbers per row; a mixture (JSD, the skews) needs a second round.
Backward computes them again, forms ``g`` with the true upstream gradient, adds ``g W`` to
``dhidden`` and writes the slice of ``dweight`` once. Work: ``N V (8 D_s + 4 D_t)`` FLOP (``+ 2 D_s
+ 2 D_t`` for the mixtures), of which ``N V (2 D_s + 2 D_t)`` are spent on the logits of backward:
the price for any reduction, any upstream gradient, ``retain_graph`` and checkpointing with the same
code. A frozen leaf costs nothing, and without gradients the statistics are all there is.

Its memory beyond the inputs, in bytes, with ``i`` the item size of the arithmetic (4, or 8 for
fp64) and ``n <= N`` the rows that count (``linear_memory_bytes`` adds it up):

    forward    a chunk_bytes + copies + b N
    backward   a chunk_bytes + copies + b N + gradients + i n D_s        a = 1.25, b = 256

``copies`` are ``i n D_s`` if the hidden states are not in the dtype of the arithmetic or some row
is ignored, and ``i n D_t`` for the teacher's likewise; ``gradients`` are what is returned. A
``TeacherTopK`` adds ``b = 64 K``. ``chunk_bytes`` too small for one row and one column counts as
what they need. Between forward and backward only the inputs and a few numbers per row are kept.

Precision. With ``impl="torch"`` arithmetic is fp32 (fp64 for fp64 inputs) whatever the inputs are:
16-bit factors are exact in it, so logits, ``g`` and all sums are never rounded to 16 bits, and
every gradient is rounded once. 16-bit products would be faster on a CPU, but their results are
16-bit too: near KL = 0 such logits leave a gradient of noise, and a rounded ``g`` fails where the
rows of a class cancel. A weight wider than the hidden states is rounded to their dtype, as autocast
does, and gets its gradient in its own dtype, unrounded.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sad_kernels import _check
from sad_kernels._dispatch import HAS_TRITON, resolve_impl
from sad_kernels._rows import LossSpec, RowLayout, RowResults, count_valid, distill_output, divisor
from sad_kernels._tiles import DEFAULT_CHUNK_BYTES, TileShape, head_tiles, term_tiles
from sad_kernels._torch.autograd import ModelInput, TopKInput, head_input, row_losses, teacher_input
from sad_kernels.objective import DistillOutput, Head, Objective, Teacher, dense_tensors

if HAS_TRITON:
    from sad_kernels._triton.linear import mean_loss, row_losses_from_hidden


def linear_cross_entropy(
    hidden: Tensor,  # [..., D_s]
    weight: Tensor,  # [>= V, D_s]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [>= V]
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """``cross_entropy`` of the logits ``softcap(logit_scale * (hidden @ weight.T + bias))``.

    The logits are computed in chunks and never held whole. Mathematics, masking, labels, reductions
    and result as for ``cross_entropy``; gradients for ``hidden``, ``weight`` and ``bias``, each in
    its own dtype. ``chunk_bytes`` bounds the memory (see the module's docstring; by default 32 MiB
    with ``impl="torch"`` and 1 GiB with ``impl="triton"``) and moves results by rounding only.

    Raises ``TypeError`` and ``ValueError`` for arguments that do not fit, and for an ``impl`` that
    does not work on them. Backward cannot be differentiated again.

    >>> import torch
    >>> hidden, weight = torch.zeros(3, 8), torch.zeros(16, 8)
    >>> linear_cross_entropy(hidden, weight, torch.tensor([1, -100, 2]))  # log 16
    tensor(2.7726)
    """
    head = Head(weight, bias, logit_scale, softcap, valid_vocab)
    objective = Objective(
        ce_weight=1.0, kd_weight=0.0, label_smoothing=label_smoothing, z_loss=z_loss
    )
    _check.require_reduction(reduction)
    call = _checked_call(
        hidden,
        head,
        labels,
        None,
        objective,
        compute_metrics=False,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
        impl=impl,
    )
    if reduction == "none":
        return call.layout.restore(_rows(call).loss)
    num_tokens = count_valid(call.labels, ignore_index, hidden)
    loss, _ = _total(call, divisor(num_tokens, None if reduction == "mean" else 1))
    return loss


def linear_distill_loss(
    hidden: Tensor,  # [..., D_s]
    head: Head,
    labels: Tensor,  # [...]
    teacher: Teacher | None,
    objective: Objective,
    *,
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> DistillOutput:
    """``distill_loss`` of the logits ``head(hidden)``, computed in chunks and never held whole.

    Mathematics, masking, labels and result as for ``distill_loss``; any kind of teacher, and with
    ``TeacherHidden`` its logits are never held whole either. Gradients for ``hidden`` and for the
    head's ``weight`` and ``bias``, each in its own dtype. ``chunk_bytes`` as for
    ``linear_cross_entropy``. ``hidden`` in 16 bits may meet a weight in fp32, as under autocast.

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
    _check.require_rows("hidden", hidden)
    _check.require_num_items(num_items, hidden, "hidden")
    call = _checked_call(
        hidden,
        head,
        labels,
        teacher,
        objective,
        compute_metrics=True,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
        impl=impl,
    )
    num_tokens = count_valid(call.labels, ignore_index, hidden)
    loss, rows = _total(call, divisor(num_tokens, num_items))
    return distill_output(loss, rows, num_tokens)


class _Call(NamedTuple):
    """A checked call of one of the two functions."""

    spec: LossSpec
    hidden: Tensor  # [..., D_s]
    head: Head
    labels: Tensor  # [N]
    teacher: Teacher | None
    layout: RowLayout
    chunk_bytes: int | None
    impl: Literal["triton", "torch"]


def _checked_call(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    objective: Objective,
    *,
    compute_metrics: bool,
    ignore_index: int,
    chunk_bytes: int | None,
    impl: str,
) -> _Call:
    """Check the arguments, flatten the labels, and choose the implementation."""
    _check.require_rows("hidden", hidden)
    _check.require_head(head, hidden)
    _check.require_labels(labels, hidden, "hidden")
    _check.require_teacher(teacher, hidden, "hidden")
    _check.require_objective(objective, teacher)
    _check.require_int("ignore_index", ignore_index)
    _check.require_chunk_bytes(chunk_bytes)
    vocab = _check.common_vocab(head.weight.shape[0], head.valid_vocab, teacher)
    resolved = resolve_impl(impl, hidden, head.weight, labels, *dense_tensors(teacher))
    layout = RowLayout(hidden)
    y = layout.flat(labels)
    assert y is not None
    spec = LossSpec(
        objective, vocab, ignore_index, compute_ce=True, compute_metrics=compute_metrics
    )
    return _Call(spec, hidden, head, y, teacher, layout, chunk_bytes, resolved)


def _total(call: _Call, items: Tensor) -> tuple[Tensor, RowResults]:
    """The sum of all row losses over ``items``, differentiable, and the rows."""
    if call.impl == "torch":
        rows = _rows(call)
        return rows.loss.sum() / items, rows
    return mean_loss(
        call.spec,
        call.layout.rows(call.hidden),
        call.head,
        call.labels,
        call.teacher,
        call.layout,
        items,
        call.chunk_bytes,
    )


def _rows(call: _Call) -> RowResults:
    """The losses of all rows, each differentiable on its own."""
    if call.impl == "triton":
        return row_losses_from_hidden(
            call.spec,
            call.layout.rows(call.hidden),
            call.head,
            call.labels,
            call.teacher,
            call.layout,
            call.chunk_bytes,
        )
    student = head_input(call.hidden, call.head, call.layout)
    teacher = teacher_input(call.teacher, call.layout)
    spec = call.spec
    shape = _tile_shape(student, teacher, spec.objective, spec.vocab, call.chunk_bytes)
    return row_losses(spec, student, call.labels, teacher, shape=shape)


def _tile_shape(
    student: ModelInput,
    teacher: ModelInput | TopKInput | None,
    objective: Objective,
    vocab: int,
    chunk_bytes: int | None,
) -> TileShape:
    """The tiles of the torch path for which everything alive at a time fits ``chunk_bytes``."""
    N, D = student.x.shape
    slabs = 3  # the student's logits, scratch, and a product's previous partial sum
    per_column = 4 * D  # the weight's slice, oneDNN's copy, its gradient with a partial sum
    per_row = D  # a piece of the hidden states
    caps = [student.transform.softcap]
    if isinstance(teacher, ModelInput):
        slabs += 1
        if teacher.weight is not None:
            per_column += 2 * teacher.x.shape[1]
            caps.append(teacher.transform.softcap)
        slabs += term_tiles(objective.divergence)
    if any(cap is not None for cap in caps):
        slabs += 1  # the derivative
    itemsize = torch.promote_types(student.x.dtype, torch.float32).itemsize
    numbers = (DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // itemsize
    return head_tiles(
        N, vocab, slabs=slabs, per_column=per_column, per_row=per_row, numbers=numbers
    )
