"""The choice between the Triton kernels and the torch path."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
"""Triton decides at its import, so the variable is read at ours: later changes have no effect."""

TRITON_DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda


def resolve_impl(impl: str, *tensors: Tensor) -> Literal["triton", "torch"]:
    """Return the implementation that ``impl`` asks for on these tensors, which share one device.

    An explicit request is met or refused, never replaced. ``auto`` takes Triton for tensors on a
    GPU that it can compute with, and the torch path elsewhere.

    Raises ``TypeError`` and ``ValueError`` for an ``impl`` that does not exist or does not work on
    these tensors, ``ModuleNotFoundError`` for ``impl="triton"`` where that package is missing.
    """
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    device = tensors[0].device.type if tensors else None
    return choose_impl(impl, device, double)


def choose_impl(impl: str, device: str | None, double: bool) -> Literal["triton", "torch"]:
    """``resolve_impl`` for a type of device, None for any, and float64 or narrower numbers."""
    if not isinstance(impl, str):
        raise TypeError(f"impl must be a string, got {impl!r}; pass 'auto', 'triton' or 'torch'")
    if impl not in get_args(Impl):
        raise ValueError(
            f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}; choose one of these"
        )
    if impl == "auto":
        compiled = HAS_TRITON and not INTERPRETED and device in TRITON_DEVICES
        return "triton" if compiled and not double else "torch"
    if impl == "triton":
        _require_triton(device, double)
        return "triton"
    return "torch"


def _require_triton(device: str | None, double: bool) -> None:
    if not HAS_TRITON:
        raise ModuleNotFoundError(
            "impl='triton' must find the package triton, got none; install it or pass impl='torch'"
        )
    works_on = (*TRITON_DEVICES, "cpu") if INTERPRETED else TRITON_DEVICES
    if device is not None and device not in works_on:
        raise ValueError(
            f"impl='triton' must get tensors on a GPU, got {device}; pass impl='torch', or set "
            "TRITON_INTERPRET=1 before the first import to interpret the kernels on a CPU"
        )
    if double:
        raise TypeError(
            "impl='triton' must get float32, bfloat16 or float16, got torch.float64; "
            "pass impl='torch' for float64"
        )
