r"""Cross-entropy from logits, with label smoothing, z-loss and softcap.

For a row ``s`` of V logits with label ``y``, in nats, ``lse = log sum_v exp(s_v)``,
``q = softmax(s)`` and ``eps`` the label smoothing:

    CE       = lse - (1 - eps) s_y - (eps / V) sum_v s_v
    loss     = CE + z_loss lse^2
    d/ds_v   = (1 + 2 z_loss lse) q_v - eps / V - (1 - eps) [v = y]

``eps`` is spread over all valid classes, the target included, as in torch. With a softcap c the
logits are ``c tanh(x / c)`` of what is passed, and the gradient is multiplied by ``1 - (s_v/c)^2``.

Algorithm. Forward reads the logits once into running maxima and sums relative to them. Backward
reads them again, forms the gradient from the saved maximum and sum with the true upstream, in fp32,
and rounds it once: right for any reduction and upstream, and the caller's logits stay as they are.
Saved: the logits, a few numbers per row. With N rows of V logits of e bytes, forward moves e N V
bytes and backward 2 e N V, the least possible. ``impl="triton"`` runs kernels over rows
(``_triton/``) and needs no memory beyond the gradient and some numbers per row; ``impl="torch"``
works in tiles of about 8 MB (``_torch/``).

Sources: Szegedy et al. 1512.00567 (smoothing), PaLM 2204.02311 (z-loss).
"""

from __future__ import annotations

from torch import Tensor

from sad_kernels import _check
from sad_kernels._dispatch import HAS_TRITON, resolve_impl
from sad_kernels._rows import LossSpec, RowLayout, count_valid, reduce_rows
from sad_kernels._tiles import logit_tiles
from sad_kernels._torch.autograd import ModelInput, row_losses
from sad_kernels._torch.sources import LogitTransform
from sad_kernels.objective import Objective

if HAS_TRITON:
    from sad_kernels._triton.logits import mean_loss_from_logits, row_losses_from_logits


def cross_entropy(
    logits: Tensor,  # [..., >= V]
    labels: Tensor,  # [...]
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy in nats, smoothed over the valid classes, plus ``z_loss * lse^2``.

    Per row ``lse - (1 - eps) s_y - (eps / V) sum_v s_v + z_loss lse^2``, with
    ``s = softcap tanh(logits / softcap)``, ``lse = logsumexp(s)`` and ``eps = label_smoothing``.
    Labels are not shifted: row i is compared with ``labels[i]``.

    Logits in fp32, bf16, fp16 or fp64, labels of any integer dtype. Columns at or past
    ``valid_vocab`` have probability 0 and gradient 0. Rows labelled ``ignore_index`` may hold
    anything, get a gradient of exactly 0, and do not count; ``mean`` divides by the number of the
    others, and is 0 with zero gradients when there are none. Any other label outside
    ``[0, V)`` makes its row's loss NaN and leaves the other rows alone.

    Returns a scalar, or with ``reduction="none"`` a loss of the labels' shape, in fp32 (fp64 for
    fp64 logits). The gradient has the dtype of the logits. Memory and sources: see the module.

    Raises ``TypeError`` and ``ValueError`` for arguments that do not fit, and for an ``impl`` that
    does not work on them. Backward cannot be differentiated again.

    >>> import torch
    >>> cross_entropy(torch.zeros(2, 8), torch.tensor([3, -100]))  # log 8
    tensor(2.0794)
    """
    _check.require_rows("logits", logits)
    _check.require_labels(labels, logits, "logits")
    _check.require_int("ignore_index", ignore_index)
    _check.require_softcap(softcap)
    _check.require_reduction(reduction)
    vocab = _check.common_vocab(logits.shape[-1], valid_vocab, None)
    objective = Objective(
        ce_weight=1.0, kd_weight=0.0, label_smoothing=label_smoothing, z_loss=z_loss
    )
    spec = LossSpec(objective, vocab, ignore_index, compute_ce=True, compute_metrics=False)
    layout = RowLayout(logits)
    y = layout.flat(labels)
    if resolve_impl(impl, logits, labels) == "triton":
        rows_of = spec, layout.rows(logits), softcap, y, None, layout
        if reduction == "mean":
            return mean_loss_from_logits(*rows_of).loss
        rows = row_losses_from_logits(*rows_of)
    else:
        student = ModelInput(layout.rows(logits), transform=LogitTransform(softcap=softcap))
        rows = row_losses(spec, student, y, None, shape=logit_tiles(vocab))
    return reduce_rows(rows.loss, count_valid(y, ignore_index, logits), reduction, layout)
