"""Memory traffic of interpreted Triton kernels: bytes read and written, counted per access.

The interpreter performs every load and store through one object, which is wrapped here:

    with counted_traffic() as traffic:
        cross_entropy(logits, labels, impl="triton")
    assert traffic.read_from(logits) == logits.nbytes

Masked lanes do not count; an element that is read twice counts twice. The traffic of torch's own
operations is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from torch import Tensor

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="compiled kernels do not report their loads"
)
"""Mark of every test that counts traffic."""


class Traffic:
    """The accesses so far, in order, each as runs of contiguous bytes."""

    def __init__(self) -> None:
        self._read: list[np.ndarray] = []  # each [runs, 2] int64: first byte, one past the last
        self._written: list[np.ndarray] = []

    @property
    def read_bytes(self) -> int:
        return sum(_overlap(runs, 0, 2**63 - 1) for runs in self._read)

    @property
    def written_bytes(self) -> int:
        return sum(_overlap(runs, 0, 2**63 - 1) for runs in self._written)

    def read_from(self, tensor: Tensor) -> int:
        """Bytes read between the tensor's first and last element, gaps of its strides included.

        The tensor must have lived throughout: memory that was freed may serve another one.
        """
        return sum(_overlap(runs, *_span(tensor)) for runs in self._read)

    def written_to(self, tensor: Tensor) -> int:
        """Bytes written between the tensor's first and last element, as in ``read_from``."""
        return sum(_overlap(runs, *_span(tensor)) for runs in self._written)


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count the accesses of every kernel that runs in this block.

    Atomics raise ``NotImplementedError``, because they are not counted.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    traffic = Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store  # unmasked ones call them

    def counting_load(ptrs, mask, *args, **kwargs):
        traffic._read.append(_runs(ptrs, mask))
        return load(ptrs, mask, *args, **kwargs)

    def counting_store(ptrs, value, mask, *args, **kwargs):
        traffic._written.append(_runs(ptrs, mask))
        return store(ptrs, value, mask, *args, **kwargs)

    def refuse(*args, **kwargs):
        raise NotImplementedError("atomic accesses must be counted, but are not yet")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counting_load)
        patch.setattr(builder, "create_masked_store", counting_store)
        patch.setattr(builder, "create_atomic_rmw", refuse)
        patch.setattr(builder, "create_atomic_cas", refuse)
        yield traffic


def _runs(ptrs, mask) -> np.ndarray:
    """[runs, 2]: begin and end of each contiguous run of bytes in the active lanes of an access."""
    itemsize = max(8, ptrs.get_element_ty().primitive_bitwidth) // 8
    active = np.broadcast_to(mask.data, ptrs.data.shape)
    addresses = ptrs.data[active].astype(np.int64)
    first = np.diff(addresses, prepend=-1) != itemsize
    last = np.diff(addresses, append=-1) != itemsize
    return np.stack((addresses[first], addresses[last] + itemsize), axis=1)


def _overlap(runs: np.ndarray, start: int, end: int) -> int:
    inside = np.minimum(runs[:, 1], end) - np.maximum(runs[:, 0], start)
    return int(inside.clip(min=0).sum())


def _span(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
