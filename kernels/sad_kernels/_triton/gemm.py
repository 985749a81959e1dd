"""Matrix products of factors in any dtype, accumulated and returned in fp32 (library calls)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def times(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:  # [m, k], [k, n] -> [m, n]
    """The product ``a b`` in fp32, never rounded to 16 bits."""
    # torch.mm has no out_dtype on a CPU, where interpreted kernels run: cast the factors.
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_times_(total: Tensor, a: Tensor, b: Tensor) -> None:  # [m, n] fp32, [m, k], [k, n]
    """Add the product ``a b`` to ``total``, without a temporary of its size."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@dataclass(frozen=True)
class HiddenWithHead:
    """One model: its final hidden states, and the head that turns them into logits."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [>= V, D], in the dtype of the hidden states
    bias: Tensor | None  # [>= V]
    scale: float
    softcap: float | None

    def products(self, rows: slice, columns: slice, slab: Tensor) -> Tensor:
        """Write the products of some rows to the slab, without bias, scale and softcap."""
        out = slab[: rows.stop - rows.start, : columns.stop - columns.start]
        times(self.hidden[rows], self.weight[columns].T, out=out)
        return out
