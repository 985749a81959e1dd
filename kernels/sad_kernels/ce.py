r"""Cross-entropy from logits, with label smoothing, class weights, z-loss and softcap.

For a row ``s`` of V logits with label ``y``, in nats, ``lse = log sum_v exp(s_v)``,
``q = softmax(s)``, ``eps`` the label smoothing and ``w`` the class weights (1 without any):

    a_v      = w_v ((1 - eps) [v = y] + eps / V)        the weight of class v in this row
    CE       = sum_v a_v (lse - s_v)                    lse - s_y without eps and w
    loss     = CE + z_loss lse^2
    d/ds_v   = (sum_u a_u + 2 z_loss lse) q_v - a_v

``eps`` is spread over all valid classes, the target included, as in torch. For labels that are
probabilities ``l``, ``l_v`` takes the place of ``[v = y]``. With logit scale and softcap the logits
are ``c tanh(scale x / c)`` of what is passed, and the gradient is multiplied by the derivative,
``scale (1 - (s_v/c)^2)``.

Algorithm. Forward reads the logits once into running maxima and sums relative to them. Backward
reads them again, forms the gradient from the saved maximum and sum with the true upstream, in fp32,
and rounds it once: right for any reduction and upstream, and the caller's logits stay as they are.
Saved: the logits, a few numbers per row. With N rows of V logits of e bytes, forward moves e N V
bytes and backward 2 e N V, the least possible. ``impl="triton"`` runs kernels over rows
(``_triton/``) and needs no memory beyond the gradient and some numbers per row; ``impl="torch"``
works in blocks of 2 MB (``_torch/``).

Sources: Szegedy et al. 1512.00567 (smoothing), PaLM 2204.02311 (z-loss).
"""

from __future__ import annotations

from torch import Tensor

from sad_kernels import _check
from sad_kernels._dispatch import resolve_impl
from sad_kernels._rows import (
    LogitTransform,
    LossSpec,
    RowLayout,
    RowTargets,
    mean_divisor,
    reduce_rows,
)
from sad_kernels.objective import Objective, require_transform
from sad_kernels.vocab import VocabShard


def cross_entropy(
    logits: Tensor,  # [..., >= V]
    labels: Tensor,  # [...] classes, or [..., >= V] their probabilities
    *,
    weight: Tensor | None = None,  # [V]
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    impl: str = "auto",
    vocab_shard: VocabShard | None = None,
) -> Tensor:
    """Cross-entropy in nats, smoothed over the valid classes, plus ``z_loss * lse^2``.

    Per row ``lse - (1 - eps) s_y - (eps / V) sum_v s_v + z_loss lse^2``, with
    ``s = softcap tanh(logit_scale logits / softcap)``, ``lse = logsumexp(s)`` and
    ``eps = label_smoothing``. Labels are not shifted: row i is compared with ``labels[i]``.

    Logits in fp32, bf16, fp16 or fp64, labels of any integer dtype. Columns at or past
    ``valid_vocab`` have probability 0 and gradient 0. Rows labelled ``ignore_index`` may hold
    anything, get a gradient of exactly 0, and do not count. Any other label outside ``[0, V)``
    makes its row's loss NaN and leaves the other rows alone. Labels of a floating dtype and the
    logits' shape are probabilities of the classes; then every row counts.

    ``weight`` multiplies the terms of each class, as in torch (see the module). ``mean`` divides by
    the number of rows that count, or by the sum of their labels' weights if there is a ``weight``
    and labels are classes; ``num_items``, an int or 0-d tensor, takes the divisor's place. Over no
    rows the mean is 0 with zero gradients, where torch has NaN.

    With a ``vocab_shard`` the logits, and labels that are probabilities, are those of its columns;
    classes, ``weight`` and ``valid_vocab`` are those of the whole vocabulary. All ranks of its
    group call with the same rows, and get the same loss.

    Returns a scalar, or with ``reduction="none"`` a loss per row in their shape, in fp32 (fp64 for
    fp64 logits). The gradient has the dtype of the logits. Memory and sources: see the module.

    Raises ``TypeError`` and ``ValueError`` for arguments that do not fit, and for an ``impl`` that
    does not work on them. Backward cannot be differentiated again.

    >>> import torch
    >>> cross_entropy(torch.zeros(2, 8), torch.tensor([3, -100]))  # log 8
    tensor(2.0794)
    """
    _check.require_rows("logits", logits, may_be_empty=vocab_shard is not None)
    _check.require_int("ignore_index", ignore_index)
    require_transform(logit_scale, softcap)
    _check.require_reduction(reduction)
    _check.require_divisor(num_items, reduction, logits, "logits")
    shard = _check.shard_of_columns("vocab_shard", vocab_shard, logits.shape[-1], None)
    columns = logits.shape[-1] if vocab_shard is None else vocab_shard.vocab_size
    vocab = _check.common_vocab(columns, valid_vocab, None, shard)
    objective = Objective(
        ce_weight=1.0, kd_weight=0.0, label_smoothing=label_smoothing, z_loss=z_loss
    )
    spec = LossSpec(objective, vocab, ignore_index, True, compute_metrics=False, shard=shard)
    layout = RowLayout(logits)
    if isinstance(labels, Tensor) and labels.dtype.is_floating_point:
        targets = RowTargets(soft=_check.soft_labels(labels, logits, layout))
    else:
        labels = _check.require_labels(labels, logits, "logits")
        targets = _check.row_targets(logits, "logits", layout, objective, labels=labels)
    by_class = _check.class_weight(weight, logits, "logits", vocab, width=columns)
    targets = targets._replace(class_weight=by_class)
    transform = LogitTransform(logit_scale, softcap)
    impl = resolve_impl(impl, logits, labels)
    rows_of = spec, layout.rows(logits), transform, targets, None, layout
    if impl == "triton":
        from sad_kernels._triton.logits import mean_loss_from_logits, row_losses_from_logits
    else:
        from sad_kernels._torch.logits import mean_loss_from_logits, row_losses_from_logits
    weighted = weight is not None and targets.soft is None and num_items is None
    if reduction == "mean" and not weighted:
        return mean_loss_from_logits(*rows_of, num_items).loss
    rows = row_losses_from_logits(*rows_of)
    divisor = mean_divisor(spec, targets, logits, None) if reduction == "mean" else None
    return reduce_rows(rows.loss, divisor, reduction, layout)
