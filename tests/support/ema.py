"""Helpers for tests of the moving average: numbers from bits, and a watch over torch's calls."""

from __future__ import annotations

from collections import Counter

import torch
from sad_kernels._torch.ema import INTEGER_OF_SIZE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [  # (shadow, parameter)
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]
DECAYS = [  # both forms of the formula, their border at 1/2, and the decays people use
    0.1,
    0.3,
    0.49999,
    0.5,
    0.50001,
    0.75,
    0.999,
    0.9999,
    0.99999,
]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view(INTEGER_OF_SIZE[tensor.element_size()])


def floats(patterns: Tensor, dtype: torch.dtype) -> Tensor:
    """Unsigned bit patterns, held in int64, as floating-point numbers."""
    width = 8 * dtype.itemsize
    signed = torch.where(patterns >= 1 << (width - 1), patterns - (1 << width), patterns)
    return signed.to(INTEGER_OF_SIZE[dtype.itemsize]).view(dtype)


def random_patterns(n: int) -> tuple[Tensor, Tensor]:
    return (
        floats(torch.randint(0, 1 << 32, (n,)), torch.float32),
        floats(torch.randint(0, 1 << 16, (n,)), torch.bfloat16),
    )


class Watch(TorchDispatchMode):
    """Notes calls, those that read a value on the host, and the bytes of the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.host_reads: list[str] = []
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        self.calls[func.overloadpacket.__name__] += 1
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.host_reads.append(str(func))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in before:
            self.largest = max(self.largest, result.nbytes)
        return result
