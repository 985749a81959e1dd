"""Averaging and swapping with torch operations, one pair of tensors after the other, in blocks.

The formulas are at the top of ``sad_kernels/ema.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 18  # elements per step: the few temporaries stay in a core's cache
INFINITY = 0x7F80  # bits of the bf16 magnitude of infinity; larger ones are NaNs

Pairs = list[tuple[Tensor, Tensor]]

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def update(pairs: Pairs, decay: Tensor) -> None:
    """Move every shadow towards its parameter."""
    coefficients = {}  # once per device and dtype of shadows
    for shadow, param in pairs:
        key = (shadow.device, shadow.dtype)
        if key not in coefficients:
            coefficients[key] = _coefficients(decay, shadow)
        from_param, step, exact = coefficients[key]
        for s, p in _blocks(shadow, param):
            p = p.to(s.dtype)
            base = torch.where(from_param, p, s)
            moved = torch.addcmul(base, step, p - s)
            # A decay of 0 or 1 copies: arithmetic would turn 0 * NaN into NaN and -0.0 into 0.0.
            torch.where(exact, base, moved, out=s)


def _coefficients(decay: Tensor, shadow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """0-d tensors of an update ``base + step (p - s)``, without a host sync: whether ``base`` is
    the parameter (else the shadow), ``step``, and whether ``base`` is the result already."""
    keep = on_device(decay, shadow.device)
    w = 1.0 - keep
    from_param = w >= 0.5
    step = torch.where(from_param, -keep, w).to(shadow.dtype)
    return from_param, step, (w == 0.0) | (w == 1.0)


def swap(pairs: Pairs) -> None:
    """Exchange shadows and parameters in place."""
    for shadow, param in pairs:
        for s, p in _blocks(shadow, param):
            if s.dtype == p.dtype:
                _exchange(s, p)
            else:
                _exchange_rounded(s, p)


def _exchange(s: Tensor, p: Tensor) -> None:
    """Swap two blocks as integers: copying NaNs as floats may change their bits."""
    integer = INTEGER_OF_SIZE[s.element_size()]
    s, p = s.view(integer), p.view(integer)
    kept = s.clone()
    s.copy_(p)
    p.copy_(kept)


def _exchange_rounded(s: Tensor, p: Tensor) -> None:
    """Swap an fp32 with a bf16 block; the formulas are at the top of ``sad_kernels/ema.py``."""
    s, p = s.view(torch.int32), p.view(torch.int16)
    # Both results before either is written: pi of the upper half, pi^-1 of the parameter.
    low = s & 0xFFFF
    up = (low >= 0x8000).to(torch.int32)
    rounded = _turn((s >> 16) & 0xFFFF, up)
    residue = _turn(p.to(torch.int32) & 0xFFFF, -up)
    p.copy_(rounded.to(torch.int16))
    s.copy_((residue << 16) | low)


def _turn(bits: Tensor, by: Tensor) -> Tensor:
    """``pi`` (by = 1), its inverse (-1) or the identity (0) of bf16 bits held in int32.

    Steps along the circle of the magnitudes 1 to ``INFINITY``; zeros and NaNs are not on it.
    """
    magnitude = bits & 0x7FFF
    turned = torch.remainder(magnitude - 1 + by, INFINITY) + 1
    on_circle = (magnitude >= 1) & (magnitude <= INFINITY)
    return (bits & 0x8000) | torch.where(on_circle, turned, magnitude)


def _blocks(shadow: Tensor, param: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching one-dimensional views of both tensors, in the order of their memory."""
    s, p = (t.detach().as_strided((t.numel(),), (1,)) for t in (shadow, param))
    for start in range(0, s.numel(), BLOCK):
        yield s[start : start + BLOCK], p[start : start + BLOCK]


def on_device(decay: float | Tensor, device: torch.device) -> Tensor:  # [] float64
    """``decay`` as a tensor on the device, without waiting for it."""
    if isinstance(decay, Tensor):
        return decay.to(device, torch.float64, non_blocking=True)
    return torch.full((), decay, dtype=torch.float64, device=device)
