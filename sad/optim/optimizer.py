"""AdamW, clipping by the global gradient norm, and optimizer steps that can be skipped.

A step whose gradient is not finite must change nothing: no parameter, no moment, no step count.
Whether it is finite, ``ok``, is a tensor on the device; a fused optimizer reads it there, without a
sync. A finite gradient can still give an update that is not, with a learning rate of 1e38; that is
bounded beforehand, on the host (``sad.config.updates``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, assert_never

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Adam, AdamW, Optimizer

from sad.config.schema import DistillConfig
from sad.config.updates import update_is_finite
from sad.distributed.tensors import whole
from sad.environment import import_extra, quiet_quantizers


def build_adamw(
    config: DistillConfig,
    parameters: Mapping[str, Tensor],
    projectors: Mapping[str, Tensor] | None = None,
) -> Optimizer:
    """The AdamW of ``config.optim`` over named parameters, with weight decay for matrices alone.

    Vectors (norms, biases) do not decay. ``projectors``, the parameters of structural losses, are
    groups of their own at ``projector_lr_ratio`` times the learning rate. Raises ``UsageError``
    without bitsandbytes where it is asked for.
    """
    groups = _groups(config, parameters, config.learning_rate)
    groups += _groups(config, projectors or {}, config.learning_rate * config.projector_lr_ratio)
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    match config.optim:
        case "adamw_torch_fused":
            return AdamW(groups, **options, fused=True)
        case "adamw_8bit":
            quiet_quantizers()
            bitsandbytes = import_extra("bitsandbytes", "8bit", "for optim: adamw_8bit")
            return bitsandbytes.optim.AdamW8bit(groups, **options)
        case _:
            assert_never(config.optim)


def _groups(
    config: DistillConfig, parameters: Mapping[str, Tensor], lr: float
) -> list[dict[str, Any]]:
    """Parameter groups: matrices with weight decay, vectors without; empty groups are left out."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    return [
        {"params": members, "weight_decay": decay, "lr": lr}
        for members, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if members
    ]


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip the gradients to a global 2-norm of ``max_norm``; return the norm before clipping.

    The norm, [], is computed in fp32 at least and stays on the device. ``max_norm`` 0 clips
    nothing; the norm still tells whether every gradient is finite. Without gradients it is 0.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in with_gradient if p.grad is not None]
    if not grads:
        return torch.zeros(())
    dtype = torch.float32
    for grad in grads:
        dtype = torch.promote_types(dtype, grad.dtype)
    # Few launches for many tensors, and in ``dtype``: squares of 16-bit gradients would overflow.
    norms = torch._foreach_norm(grads, 2, dtype=dtype)  # pyright: ignore[reportPrivateImportUsage]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        clip_grads_with_norm_(with_gradient, max_norm, norm)
    return whole(norm)  # of gradients that are split over ranks: the same on all of them


def can_update(optimizer: Optimizer, norm: Tensor, max_norm: float) -> Tensor:
    """Whether a step of AdamW is finite, [] bool on the device: ``norm`` is, and learning rate and
    weight decay of every group keep the update so. Does not wait for the device.

    ``norm`` is that of the gradient before it was clipped to ``max_norm``.
    """
    fits = all(
        update_is_finite(
            float(group["lr"]),
            group["betas"],
            group["eps"],
            group["weight_decay"],
            max_grad_norm=max_norm,
        )
        for group in optimizer.param_groups
    )
    return norm.isfinite() if fits else torch.zeros_like(norm, dtype=torch.bool)


def guarded_step(optimizer: Optimizer, ok: Tensor) -> None:
    """Run ``optimizer.step()`` if the 0-d bool ``ok`` is true; else nothing changes, to the bit.

    Fused Adam and AdamW take it as ``found_inf``, as GradScaler passes it, and skip parameters,
    moments and step counts on the device. Others cost a sync; so does fused SGD, which leaves its
    momentum uninitialised if the very first step is skipped (torch 2.13). A hook on ``step`` is no
    sign of an update: with a fused optimizer it runs in any case.
    """
    if not (isinstance(optimizer, Adam) and optimizer.defaults["fused"]):
        if bool(ok):  # waits for the device
            optimizer.step()
        return
    # GradScaler's protocol: attributes of the optimizer for the duration of the step.
    flags: dict[str, Tensor | None] = {"found_inf": (~ok).float(), "grad_scale": None}
    vars(optimizer).update(flags)
    try:
        optimizer.step()
    finally:
        for name in flags:
            delattr(optimizer, name)
