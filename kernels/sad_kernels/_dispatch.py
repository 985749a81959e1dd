"""Which implementation of an operation runs, and whether its request can be met."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Impl = Literal["auto", "triton", "torch"]


def resolve_impl(impl: str, *tensors: Tensor) -> Literal["torch"]:
    """Return the implementation that ``impl`` asks for on these tensors, which share one device.

    An explicit request is met or refused, never replaced. ``auto`` takes what is fastest on the
    device; so far that is the torch path everywhere.

    Raises ``TypeError`` and ``ValueError`` for an ``impl`` that does not exist and
    ``NotImplementedError`` for one that is not built yet.
    """
    if not isinstance(impl, str):
        raise TypeError(f"impl must be a string, got {impl!r}; pass 'auto' or 'torch'")
    if impl not in get_args(Impl):
        raise ValueError(
            f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}; choose one of these"
        )
    if impl == "triton":
        device = tensors[0].device if tensors else "this device"
        raise NotImplementedError(
            f"impl must be 'auto' or 'torch' on {device}, got 'triton'; "
            "the Triton kernels are not built yet"
        )
    return "torch"
