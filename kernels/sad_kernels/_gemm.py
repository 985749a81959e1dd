"""Matrix products with the inputs' dtype as result."""

from __future__ import annotations

import torch
from torch import Tensor

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


PIECE=256

def product(a: Tensor, b: Tensor) -> Tensor:  # [m, k], [n, k] -> [m, n]
    if not (HAS_ONEDNN and a.is_cpu and a.dtype == torch.float32):
        return a @ b.T
    linear = torch.ops.mkldnn._linear_pointwise
    total = linear(a[:, :PIECE], b[:, :PIECE], None, "none", [], "")
    for k in range(PIECE, a.shape[1], PIECE):
        total = linear(a[:, k : k + PIECE], total, b[:, k : k + PIECE], None, "add")
    return total
