r"""Losses from hidden states and a head, piece by piece: never N x V logits.

With ``z = softcap(logit_scale * (h W^T + b))`` the losses are those of ``ce.py`` and ``kd.py``, and
for a gradient ``g`` of the logits, taken before softcap and scale,

    dhidden = g W        dweight = g^T h        dbias = sum over rows of g

``impl="triton"`` cuts the rows into chunks and computes the gradients in forward, while the logits
of a chunk are there (``_triton/chunks.py``, ``_triton/linear.py``): ``N V (6 D_s + 2 D_t)`` FLOP in
library products with fp32 results, and row kernels that read every logit twice (three times for the
mixtures) and write ``g`` once, in the dtype of the hidden states. Backward multiplies by the
upstream. With ``reduction="none"`` backward makes the logits again. Memory beyond inputs and
gradients: ``chunk_bytes``, the fp32 sum of ``dweight``, and copies of the hidden states of a chunk.

``impl="torch"`` cuts the vocabulary into slices and the rows into blocks, so that what is alive at
a time fits ``chunk_bytes``. Forward makes the student's and the teacher's logits of a slice and
adds them to row statistics, a few numbers per row; a mixture (JSD, the skews) needs a second round.
Backward makes them again, forms ``g`` with the true upstream gradient, adds ``g W`` to ``dhidden``
and writes the slice of ``dweight`` once. Work: ``N V (8 D_s + 4 D_t)`` FLOP (``+ 2 D_s + 2 D_t``
for the mixtures), of which the logits made twice are ``N V (2 D_s + 2 D_t)``: the price for any
reduction, any upstream gradient, ``retain_graph`` and checkpointing with the same code. A frozen
leaf costs nothing, and without gradients the statistics are all there is.

Memory of it beyond the inputs, in bytes, with ``i`` the item size of the arithmetic (4, or 8 for
fp64) and ``n <= N`` the rows that count:

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

    Mathematics, masking, reductions and result as for ``cross_entropy``; gradients for ``hidden``,
    ``weight`` and ``bias``, each in its own dtype. ``chunk_bytes`` bounds the memory (see the
    module's docstring) and moves results by rounding only.

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
    spec, y, layout, impl = _prepare(
        hidden, head, labels, None, objective, False, ignore_index, chunk_bytes, impl
    )
    if reduction == "none":
        rows = _rows(spec, hidden, head, y, None, layout, chunk_bytes, impl)
        return layout.restore(rows.loss)
    num_tokens = count_valid(y, ignore_index, hidden)
    items = divisor(num_tokens, None if reduction == "mean" else 1)
    return _total(spec, hidden, head, y, None, layout, items, chunk_bytes, impl)[0]


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
    """``distill_loss`` of the logits ``head(hidden)``, which are never whole.

    Mathematics, masking and result as for ``distill_loss``; any kind of teacher, and with
    ``TeacherHidden`` its logits are never whole either. Gradients for ``hidden`` and for the head's
    ``weight`` and ``bias``, each in its own dtype. ``chunk_bytes`` bounds the memory (see the
    module's docstring) and moves results by rounding only. ``hidden`` in 16 bits may meet a weight
    in fp32, as under autocast.

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
    spec, y, layout, impl = _prepare(
        hidden, head, labels, teacher, objective, True, ignore_index, chunk_bytes, impl
    )
    num_tokens = count_valid(y, ignore_index, hidden)
    items = divisor(num_tokens, num_items)
    loss, rows = _total(spec, hidden, head, y, teacher, layout, items, chunk_bytes, impl)
    return distill_output(loss, rows, num_tokens)


def _prepare(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    objective: Objective,
    compute_metrics: bool,
    ignore_index: int,
    chunk_bytes: int | None,
    impl: str,
) -> tuple[LossSpec, Tensor, RowLayout, str]:
    """Check the arguments; return the task, flat labels, the order of rows, and who does it."""
    _check.require_rows("hidden", hidden)
    _check.require_head(head, hidden)
    _check.require_labels(labels, hidden, "hidden")
    _check.require_teacher(teacher, hidden, "hidden")
    _check.require_objective(objective, teacher)
    _check.require_int("ignore_index", ignore_index)
    _check.require_chunk_bytes(chunk_bytes)
    vocab = _check.common_vocab(head.weight.shape[0], head.valid_vocab, teacher)
    impl = resolve_impl(impl, hidden, head.weight, labels, *dense_tensors(teacher))
    layout = RowLayout(hidden)
    y = layout.flat(labels)
    assert y is not None
    return LossSpec(objective, vocab, ignore_index, True, compute_metrics), y, layout, impl


def _total(
    spec: LossSpec,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    layout: RowLayout,
    items: Tensor,
    chunk_bytes: int | None,
    impl: str,
) -> tuple[Tensor, RowResults]:
    """The sum of all row losses over ``items``, and the rows."""
    if impl == "triton":
        rows = layout.rows(hidden)
        return mean_loss(spec, rows, head, labels, teacher, layout, items, chunk_bytes)
    rows = _rows(spec, hidden, head, labels, teacher, layout, chunk_bytes, impl)
    return rows.loss.sum() / items, rows


def _rows(
    spec: LossSpec,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    layout: RowLayout,
    chunk_bytes: int | None,
    impl: str,
) -> RowResults:
    """The losses of all rows, each differentiable on its own."""
    if impl == "triton":
        rows = layout.rows(hidden)
        return row_losses_from_hidden(spec, rows, head, labels, teacher, layout, chunk_bytes)
    student, other = head_input(hidden, head, layout), teacher_input(teacher, layout)
    shape = _tile_shape(student, other, spec.objective, spec.vocab, chunk_bytes)
    return row_losses(spec, student, labels, other, shape=shape)


def _tile_shape(
    student: ModelInput,
    teacher: ModelInput | TopKInput | None,
    objective: Objective,
    vocab: int,
    chunk_bytes: int | None,
) -> TileShape:
    """Tiles for which all that is alive at a time fits ``chunk_bytes``."""
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
