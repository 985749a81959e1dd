"""Matrix products with the inputs' dtype as result."""

from __future__ import annotations

import torch
from torch import Tensor

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


PIECE = 512


def product(a: Tensor, b: Tensor) -> Tensor:  # [m, k], [n, k] -> [m, n]
    if not (HAS_ONEDNN and a.is_cpu and a.dtype == torch.float32):
        return a @ b.T
    linear = torch.ops.mkldnn._linear_pointwise
    total = None
    for k in range(0, a.shape[1], PIECE):
        x, w = a[:, k : k + PIECE].contiguous(), b[:, k : k + PIECE]
        if not w.T.is_contiguous():
            w = w.contiguous()
        total = linear(x, w, None, "none", [], "") if total is None else linear(x, total, w, None, "add")
    return total
