"""Matrix products of 16-bit factors with an fp32 result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bf16_factors(wanted: bool) -> Iterator[None]:
    """Inside, fp32 products on the CPU may round their factors to bf16; sums stay fp32."""
    if not wanted:
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
