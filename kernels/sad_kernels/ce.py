"""Cross-entropy of logits, with label smoothing, z-loss and softcap."""

from __future__ import annotations

from torch import Tensor

from sad_kernels import _check
from sad_kernels._dispatch import resolve_impl
from sad_kernels._reduce import Leading, count_valid, reduce_rows
from sad_kernels._sources import Finish
from sad_kernels._statistics import Task
from sad_kernels._tiles import logit_tiles
from sad_kernels._torch import Side, row_losses
from sad_kernels.objective import Objective


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    _check.require_rows("logits", logits)
    _check.require_labels(labels, logits, "logits")
    _check.require_int("ignore_index", ignore_index)
    _check.require_softcap(softcap)
    _check.require_reduction(reduction)
    vocab = _check.common_vocab(logits.shape[-1], valid_vocab, None)
    objective = Objective(
        ce_weight=1.0, kd_weight=0.0, label_smoothing=label_smoothing, z_loss=z_loss
    )
    resolve_impl(impl, logits, labels)

    leading = Leading(logits)
    y = leading.flat(labels)
    rows = row_losses(
        Task(objective, vocab, classes=True, diagnostics=False),
        Side(leading.rows(logits), how=Finish(softcap=softcap)),
        y,
        None,
        ignore_index=ignore_index,
        shape=logit_tiles(vocab),
    )
    return reduce_rows(rows.loss, count_valid(y, ignore_index, rows.loss), reduction, leading)
