"""The optimizer's part of a step: AdamW, one global norm, and an update that can be skipped.

A step whose gradient is not finite must change nothing: no parameter, no moment, no counter. The
verdict ``ok`` is a tensor on the device, and a fused optimizer reads it there, so that nothing
waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Adam, AdamW, Optimizer

from sad.config.schema import DistillConfig


def build_adamw(
    config: DistillConfig,
    parameters: Mapping[str, Tensor],
    projectors: Mapping[str, Tensor] | None = None,
) -> AdamW:
    """Fused AdamW over named parameters; matrices decay, vectors (norms, biases) do not.

    ``projectors`` are trained beside them at ``projector_lr_ratio`` times their learning rate.
    """
    own = config.learning_rate * config.projector_lr_ratio
    groups = _groups(config, parameters, config.learning_rate)
    groups += _groups(config, projectors or {}, own)
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def _groups(
    config: DistillConfig, parameters: Mapping[str, Tensor], lr: float
) -> list[dict[str, Any]]:
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    return [
        {"params": members, "weight_decay": decay, "lr": lr}
        for members, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if members
    ]


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most ``max_norm``; return it unscaled.

    The norm is computed in fp32 at least and stays on the device. 0 clips nothing, but the norm is
    still needed: it tells whether every gradient is finite. Without gradients it is 0.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in with_gradient if p.grad is not None]
    if not grads:
        return torch.zeros(())
    dtype = torch.float32
    for grad in grads:
        dtype = torch.promote_types(dtype, grad.dtype)
    norms = torch._foreach_norm(grads, 2, dtype=dtype)  # pyright: ignore[reportPrivateImportUsage]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


def guarded_step(optimizer: Optimizer, ok: Tensor) -> None:
    """``optimizer.step()`` where the 0-d bool ``ok`` holds; else nothing changes, to the bit.

    Fused Adam and AdamW get the verdict as ``found_inf``, the way GradScaler tells it, and skip
    parameters, moments and step counts on the device. Others cost one wait for the device; so does
    fused SGD, which leaves its momentum uninitialised if the very first step is skipped (torch
    2.13). Hooks on ``step`` are no sign of an update: with a fused optimizer they run in any case.
    """
    if not (isinstance(optimizer, Adam) and optimizer.defaults["fused"]):
        if bool(ok):
            optimizer.step()
        return
    told: dict[str, Tensor | None] = {"found_inf": (~ok).float(), "grad_scale": None}
    vars(optimizer).update(told)
    try:
        optimizer.step()
    finally:
        for name in told:
            delattr(optimizer, name)
