"""Runs the kernel tests, which use CPU tensors, on a GPU: launches copy tensors there and back.

Without a GPU Triton's interpreter reads and writes the CPU's memory. With one, this module puts a
copy of every storage that a launch gets on the GPU, under views with the same sizes, strides and
offsets, launches the compiled kernel there, and copies all of it back. What surrounds a tensor goes
along, so that accesses out of bounds still show.

Streams, CUDA graphs and device memory are tested in ``test_gpu.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def take_cpu_tensors(patch: pytest.MonkeyPatch) -> None:
    """Make ``impl="triton"`` accept CPU tensors with compiled kernels, as with interpreted ones."""
    from sad_kernels import _dispatch

    if not _dispatch.HAS_TRITON:
        return
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        if self.module == "sad_kernels._triton.ema" and any(map(_is_on_cpu, args)):
            pytest.skip("tables of addresses need tensors on the GPU; see test_gpu.py")
        return launch_on(torch.device("cuda"), launch, self, *args, **options)

    patch.setattr(JITFunction, "run", run)
    patch.setattr(_dispatch, "INTERPRETED", True)


def launch_on(
    device: torch.device, launch: Callable[..., Any], kernel: Any, *args: Any, **options: Any
) -> Any:
    storages: dict[int, tuple[Tensor, Tensor]] = {}  # address -> bytes here, bytes there
    moved = [_moved(x, device, storages) for x in args]
    named = {name: _moved(x, device, storages) for name, x in options.items()}
    result = launch(kernel, *moved, **named)
    for here, there in storages.values():
        here.copy_(there)
    return result


def _is_on_cpu(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cpu"


def _moved(x: Any, device: torch.device, storages: dict[int, tuple[Tensor, Tensor]]) -> Any:
    if not _is_on_cpu(x):
        return x
    storage = x.untyped_storage()
    address = storage.data_ptr()
    if address not in storages:
        here = torch.empty(0, dtype=torch.uint8).set_(storage)
        storages[address] = here, here.to(device, copy=True)
    there = storages[address][1].untyped_storage()
    view = torch.empty(0, dtype=x.dtype, device=device)
    return view.set_(there, x.storage_offset(), x.shape, x.stride())
