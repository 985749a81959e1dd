"""Where tiles of logits come from, and where tiles of their gradient go.

A source gives the logits of a model in tiles of rows x columns, in the dtype of the arithmetic,
after bias, scale and softcap. A source that was asked for gradients takes tiles of the gradient
with respect to these logits and turns them into gradients of what the logits were made of.

Only the rows whose loss counts exist here (``kept``; None: all of them). The others are never
read, so they may hold anything, and their gradients are exact zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._torch.gemm import product

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class LogitTransform(NamedTuple):
    """What follows the matrix product: ``softcap(logit_scale * x)``."""

    logit_scale: float = 1.0
    softcap: float | None = None


class LogitSource:
    """Logits that are there: [N, >= V] in any floating-point dtype and with any row stride."""

    def __init__(
        self, logits: Tensor, finish: LogitTransform, kept: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.logits, self.kept, self.dtype = logits, kept, dtype
        self.softcap = _Softcap(finish.softcap)
        self.dlogits: Tensor | None = None

    def open(self, columns: slice) -> None:
        """Turn to a slice of the vocabulary; the tiles that follow belong to it."""
        self.columns = columns

    def tile(self, rows: slice) -> Tensor:  # [rows, columns], the receiver's to overwrite
        logits = self.logits[self._rows(rows), self.columns]
        return self.softcap.apply_(logits.to(self.dtype, copy=True))

    def want_gradients(self, logits: bool, *_: bool) -> None:
        self.dlogits = torch.zeros_like(self.logits) if logits else None
        self.softcap.differentiable = True

    def add_gradient(self, rows: slice, g: Tensor) -> None:
        """Take the gradient of the logits that ``tile`` gave last; overwrites it."""
        if self.dlogits is not None:
            g = self.softcap.backward_(g).to(self.dlogits.dtype)
            self.dlogits[self._rows(rows), self.columns] = g

    def close(self) -> None:
        """The slice of the vocabulary is complete: nothing more will be added to it."""

    def gradients(self) -> Gradients:
        return self.dlogits, None, None

    def _rows(self, rows: slice) -> slice | Tensor:
        return rows if self.kept is None else self.kept[rows]


class HeadSource:
    """Logits made slice by slice from hidden states and a head: never N x V of them.

    The factors of every product have the hidden states' precision, a weight of another dtype is
    rounded to it one slice at a time. The products are computed in ``dtype``, the gradient is not
    rounded before them, and what they sum over many slices is kept in ``dtype`` to the end.
    """

    def __init__(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [>= V, D]
        bias: Tensor | None,  # [>= V]
        finish: LogitTransform,
        kept: Tensor | None,  # [n]
        dtype: torch.dtype,
        vocab: int,
    ) -> None:
        self.hidden, self.weight, self.bias, self.kept = hidden, weight, bias, kept
        self.logit_scale, self.softcap = finish.logit_scale, _Softcap(finish.softcap)
        self.dtype, self.vocab = dtype, vocab
        self.x = (hidden if kept is None else hidden[kept]).to(dtype)  # [n, D]
        self.dx: Tensor | None = None  # [n, D]
        self.dweight: Tensor | None = None  # [>= V, D]
        self.dbias: Tensor | None = None  # [>= V]
        self.dw: Tensor | None = None  # [D, columns] of the open slice

    def open(self, columns: slice) -> None:
        self.columns = columns
        self.w = self.weight[columns].to(self.hidden.dtype).to(self.dtype)  # [columns, D]
        self.b = None if self.bias is None else self.bias[columns].to(self.dtype)

    def tile(self, rows: slice) -> Tensor:  # [rows, columns]
        logits = product(self.x[rows], self.w)
        if self.b is not None:
            logits.add_(self.b)
        if self.logit_scale != 1:
            logits.mul_(self.logit_scale)
        return self.softcap.apply_(logits)

    def want_gradients(self, hidden: bool, weight: bool, bias: bool) -> None:
        if hidden:
            self.dx = torch.zeros_like(self.x)
        if weight:
            self.dweight = torch.empty_like(self.weight)
            self.dweight[self.vocab :] = 0
        if bias and self.bias is not None:
            self.dbias = torch.zeros_like(self.bias, dtype=self.dtype)
        self.softcap.differentiable = True

    def add_gradient(self, rows: slice, g: Tensor) -> None:
        g = self.softcap.backward_(g)
        if self.logit_scale != 1:
            g.mul_(self.logit_scale)
        if self.dx is not None:
            self.dx[rows] += product(g, self.w.T)
        if self.dweight is not None:
            dw = product(self.x[rows].T, g.T)
            self.dw = dw if self.dw is None else self.dw.add_(dw)
        if self.dbias is not None:
            self.dbias[self.columns] += g.sum(0)

    def close(self) -> None:
        if self.dweight is not None:
            self.dweight[self.columns] = 0 if self.dw is None else self.dw.T
            self.dw = None

    def gradients(self) -> Gradients:
        dhidden = None if self.dx is None else self.dx.to(self.hidden.dtype)
        if dhidden is not None and self.kept is not None:
            dhidden = torch.zeros_like(self.hidden).index_copy_(0, self.kept, dhidden)
        dbias = self.dbias
        if dbias is not None and self.bias is not None:
            dbias = dbias.to(self.bias.dtype)
        return dhidden, self.dweight, dbias


Source = LogitSource | HeadSource


class _Softcap:
    """``cap tanh(x / cap)``, and its derivative ``1 - tanh^2`` for the tile that was made last."""

    def __init__(self, cap: float | None) -> None:
        self.cap, self.differentiable = cap, False
        self.slope: Tensor | None = None

    def apply_(self, x: Tensor) -> Tensor:
        if self.cap is None:
            return x
        x.div_(self.cap).tanh_()
        if self.differentiable:
            self.slope = torch.mul(x, x).neg_().add_(1)
        return x.mul_(self.cap)

    def backward_(self, g: Tensor) -> Tensor:
        return g if self.slope is None else g.mul_(self.slope)
