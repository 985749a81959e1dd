"""Sources of logit tiles: a model's logits, or its hidden states and head, and their gradients.

A source gives the logits of a model in tiles of rows x columns, in the dtype of the arithmetic,
after bias, scale and softcap. After ``want_gradients`` it takes the gradient of each tile of logits
in turn, and accumulates the gradients of the logits, or of hidden states, weight and bias.

Only the rows whose loss counts exist here (``kept`` has their indices; None: all rows). The others
are never read, so they may hold anything, and their gradients are exact zeros.

Protocol: ``open(columns)``, then ``tile(rows)``, each followed by ``add_gradient(rows, g)`` if
there are gradients, then ``close()``; for every slice of columns; then ``gradients()``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._torch.gemm import product

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class LogitTransform(NamedTuple):
    """What turns products into logits: ``softcap(logit_scale * x)``."""

    logit_scale: float = 1.0
    softcap: float | None = None


class LogitSource:
    """Materialised logits [N, >= V], of any floating-point dtype and row stride."""

    def __init__(
        self, logits: Tensor, transform: LogitTransform, kept: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.logits, self.kept, self.dtype = logits, kept, dtype
        self.softcap = _Softcap(transform.softcap)
        self.dlogits: Tensor | None = None

    def open(self, columns: slice) -> None:
        """Start a slice of the vocabulary, to which the tiles that follow belong."""
        self.columns = columns

    def tile(self, rows: slice) -> Tensor:  # [rows, columns], the receiver's to overwrite
        logits = self.logits[self._rows(rows), self.columns]
        return self.softcap.apply_(logits.to(self.dtype, copy=True))

    def want_gradients(self, logits: bool, *_: bool) -> None:
        self.dlogits = torch.zeros_like(self.logits) if logits else None
        self.softcap.differentiable = True

    def add_gradient(self, rows: slice, g: Tensor) -> None:
        """Store the gradient ``g`` of the logits that ``tile`` gave last; ``g`` is overwritten."""
        if self.dlogits is not None:
            g = self.softcap.backward_(g).to(self.dlogits.dtype)
            self.dlogits[self._rows(rows), self.columns] = g

    def close(self) -> None:
        """End the slice of the vocabulary."""

    def gradients(self) -> Gradients:
        return self.dlogits, None, None

    def _rows(self, rows: slice) -> slice | Tensor:
        return rows if self.kept is None else self.kept[rows]


class HeadSource:
    """Hidden states and a head, whose logits are computed tile by tile: never N x V of them.

    The factors of every product have the precision of the hidden states: a weight of another dtype
    is rounded to it, one slice at a time. The products and their sums over slices are in ``dtype``;
    the gradient of the logits is never rounded, those of the leaves once, at the end.
    """

    def __init__(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [>= V, D]
        bias: Tensor | None,  # [>= V]
        transform: LogitTransform,
        kept: Tensor | None,  # [n]
        dtype: torch.dtype,
        vocab: int,
    ) -> None:
        self.hidden, self.weight, self.bias, self.kept = hidden, weight, bias, kept
        self.logit_scale, self.softcap = transform.logit_scale, _Softcap(transform.softcap)
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
            self.dweight[self.vocab :] = 0  # padding; the slices before it are written by close
        if bias and self.bias is not None:
            self.dbias = torch.zeros_like(self.bias, dtype=self.dtype)
        self.softcap.differentiable = True

    def add_gradient(self, rows: slice, g: Tensor) -> None:
        g = self.softcap.backward_(g)
        # From the logits' gradient to that of the products h W^T + b.
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
    """``cap tanh(x / cap)``, with the derivative ``1 - tanh^2`` of the last tile kept."""

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
