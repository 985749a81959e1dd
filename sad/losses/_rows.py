"""Helpers of the structural losses: upcasting, checks on teachers, unit vectors, KL by rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sad.losses.layout import Layout

Rows = Callable[[slice], Tensor]
"""Query rows -> their log-probabilities over all keys, [B, H, rows, L]."""


def upcast(tensor: Tensor) -> Tensor:
    """Cast a tensor to fp32; float64 stays as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Context without autocast: matrix products of fp32 tensors stay fp32."""
    return torch.autocast(tensor.device.type, enabled=False)


def require_no_grad(*teacher: Tensor) -> None:
    """Check that no teacher tensor requires a gradient: the loss would train the teacher.

    Raises ``ValueError``.
    """
    if any(tensor.requires_grad for tensor in teacher):
        raise ValueError(
            "the teacher's tensors must not require a gradient, got requires_grad=True; compute "
            "them under torch.no_grad()"
        )


def normalize(vectors: Tensor) -> Tensor:
    """Divide each vector [..., D] by its 2-norm, also where squares overflow or vanish.

    The largest element is divided out first, as a constant: the direction does not depend on it,
    nor does the gradient. A vector of zeros stays one.
    """
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    scaled = vectors / torch.where(largest == 0, 1.0, largest)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)  # in [1, sqrt(D)], or 0
    return scaled / norm.clamp_min(0.5)


def row_kl(
    p: Tensor,  # [..., n]
    log_p: Tensor,  # [..., n]
    log_q: Tensor,  # [..., n]
) -> Tensor:
    """KL divergence of each row, ``sum p (log p - log q)`` in nats, [...]; a term with p = 0 is 0.

    The logs are replaced, not the product: its gradient would be ``0 * inf``.
    """
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)


def sum_of_row_kl(
    student: Rows,
    teacher: Callable[[slice], tuple[Tensor, Tensor]],
    layout: Layout,
    block: int,
) -> Tensor:
    """Sum over the queries that count of the mean over heads of ``KL(teacher||student)``, [].

    ``teacher`` yields probabilities and their logarithms. ``block`` rows at a time, computed again
    in backward: what is held at once is a few tensors [B, H, block, L].
    """

    def block_sum(rows: slice) -> Tensor:
        per_row = row_kl(*teacher(rows), student(rows)).mean(1)  # [B, rows]
        return torch.where(layout.tokens[:, rows], per_row, 0.0).sum()

    length = layout.tokens.shape[1]
    blocks = [slice(start, min(start + block, length)) for start in range(0, length, block)]
    sums = [
        checkpoint(block_sum, rows, use_reentrant=False, preserve_rng_state=False)
        for rows in blocks
    ]
    return torch.stack(sums).sum()
