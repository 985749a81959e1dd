"""Where the logits of one model come from, and where the gradient of each goes.

A source gives the logits of a model in blocks of rows x columns, in the dtype of the arithmetic,
after bias, scale and softcap, and takes their gradients in the same blocks. Between the two stands
a *slab*: the products of some rows and columns, made at once, because a matrix product wants many
rows, and everything else wants few numbers that stay in a cache.

Only the rows whose loss counts exist here (``kept`` has their indices; None: all rows). The others
are never read, so they may hold anything, and their gradients are exact zeros.

Protocol: ``load(rows, columns)``, then for each block of these rows ``block(rows)``, followed by
``store(rows, g)`` if there are gradients, then ``flush()``; for all rows and columns; then
``gradients()``. A block may be overwritten, unless the source ``lends``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sad_kernels._rows import LogitTransform
from sad_kernels._tiles import CONVERTED_NUMBERS, cut
from sad_kernels._torch import gemm
from sad_kernels._torch.gemm import multiply_, product_less_, split_product_
from sad_kernels._torch.scratch import Scratch

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class LogitSource:
    """Materialised logits [N, >= V], of any floating-point dtype and row stride."""

    def __init__(
        self,
        logits: Tensor,
        transform: LogitTransform,
        kept: Tensor | None,
        scratch: Scratch,
        name: str,  # of its buffers
        vocab: int,  # columns that count
    ) -> None:
        self.logits, self.kept, self.scratch, self.name = logits, kept, scratch, name
        self.vocab = vocab
        self.transform = _Transform(transform, scratch, name)
        self.dlogits: Tensor | None = None
        self.lends = False

    def lend(self) -> None:
        """Give blocks of the logits themselves from now on, where nothing is to be done to them:
        the receiver must not overwrite those."""
        is_plain = self.transform.scale == 1 and self.transform.cap is None
        self.lends = is_plain and self.logits.dtype == self.scratch.dtype

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for the largest ``load`` that follows."""

    def load(self, rows: slice, columns: slice) -> None:
        """Turn to these rows and columns, of which the blocks that follow are parts."""
        self.columns = columns

    def block(self, rows: slice) -> Tensor:  # [rows, columns], the receiver's unless lent
        logits = self.logits[self._rows(rows), self.columns]
        if self.lends:
            return logits
        return self.transform.apply_(self.scratch.like(self.name, logits.shape).copy_(logits))

    def want_gradients(self, wanted: tuple[bool, bool, bool], by_columns: bool = False) -> None:
        logits, *_ = wanted
        if logits and self.kept is None:  # every row is stored, in the columns that count
            self.dlogits = torch.empty_like(self.logits)
            self.dlogits[:, self.vocab :] = 0
        elif logits:
            self.dlogits = torch.zeros_like(self.logits)
        self.transform.differentiable = True

    def store(self, rows: slice, g: Tensor) -> None:
        """Take the gradient ``g`` of the logits that ``block`` gave last; ``g`` is overwritten."""
        if self.dlogits is not None:
            self.dlogits[self._rows(rows), self.columns] = self.transform.backward_(g).to(
                self.dlogits.dtype
            )

    def flush(self) -> None:
        """End the rows and columns of ``load``: all their gradients are stored."""

    def gradients(self) -> Gradients:
        return self.dlogits, None, None

    def _rows(self, rows: slice) -> slice | Tensor:
        return rows if self.kept is None else self.kept[rows]


class HeadSource:
    """Hidden states and a head, whose logits are computed slab by slab: never N x V of them.

    The factors of every product have the precision of the hidden states: a weight of another dtype
    is rounded to it, a piece at a time. Products and sums are in the dtype of the arithmetic; the
    gradient of the logits is never rounded, those of the leaves once, at the end.
    """

    lends = False

    def __init__(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [>= V, D]
        bias: Tensor | None,  # [>= V]
        transform: LogitTransform,
        kept: Tensor | None,  # [n]
        scratch: Scratch,
        name: str,
        vocab: int,  # columns that count
        is_shard: bool = False,  # other columns are elsewhere: blocks are read again
    ) -> None:
        self.hidden, self.weight, self.bias, self.kept = hidden, weight, bias, kept
        self.scratch, self.name, self.vocab, self.is_shard = scratch, name, vocab, is_shard
        self.transform = _Transform(transform, scratch, name)
        self.x = self._factor(hidden if kept is None else hidden[kept])  # [n, D]
        self.converted: tuple[slice, Tensor] | None = None
        self.dx: Tensor | None = None  # [n, D]
        self.dweight: Tensor | None = None  # [>= V, D]
        self.dweight_sum: Tensor | None = None  # [V, D], the same before it is rounded
        self.dbias: Tensor | None = None  # [>= V]

    def _factor(self, hidden: Tensor) -> Tensor:
        """Hidden states as the products take them."""
        return hidden.to(self.scratch.dtype)

    def reserve(self, rows: int, columns: int) -> None:
        self.scratch.like(f"{self.name} slab", (rows, columns))

    def load(self, rows: slice, columns: slice) -> None:
        self.rows, self.columns = rows, columns
        shape = rows.stop - rows.start, columns.stop - columns.start
        self.slab = self.scratch.like(f"{self.name} slab", shape)
        for piece, w in self._pieces():
            multiply_(self.slab[:, self._inside(piece)], self.x[rows], w.T)

    def block(self, rows: slice) -> Tensor:  # [rows, columns]
        logits = self.slab[self._rows_inside(rows)]
        if self.is_shard:
            logits = self.scratch.like(self.name, logits.shape).copy_(logits)
        if self.bias is not None:
            logits.add_(self.bias[self.columns])
        return self.transform.apply_(logits)

    def want_gradients(self, wanted: tuple[bool, bool, bool], by_columns: bool) -> None:
        """Prepare the gradients of hidden states, weight and bias. ``by_columns`` says that all
        rows of some columns come before any row of the next."""
        hidden, weight, bias = wanted
        self.by_columns = by_columns
        if hidden:
            self.dx = torch.zeros_like(self.x)
        if weight:
            self.dweight = torch.empty_like(self.weight)
            self.dweight[self.vocab :] = 0
            if len(self.x) == 0:
                self.dweight.zero_()
        if bias and self.bias is not None:
            self.dbias = torch.zeros_like(self.bias, dtype=self.scratch.dtype)
        self.transform.differentiable = True

    def store(self, rows: slice, g: Tensor) -> None:
        """Take the gradient of the logits; it takes their place in the slab until ``flush``."""
        g = self.transform.backward_(g)
        slab = self.slab[self._rows_inside(rows)]
        if g.data_ptr() != slab.data_ptr():
            slab.copy_(g)

    def flush(self) -> None:
        """Multiply the gradient of the slab's logits into those of hidden states and weight."""
        x = self.x[self.rows]
        for piece, w in self._pieces():
            g = self.slab[:, self._inside(piece)]
            if self.dx is not None:
                multiply_(self.dx[self.rows], g, w, add=True)
            if self.dweight is not None:
                self._add_to_dweight(piece, g, x)
            if self.dbias is not None:
                self.dbias[piece] += g.sum(0)

    def _add_to_dweight(self, piece: slice, g: Tensor, x: Tensor) -> None:
        """``dweight += g^T x``: for all rows at once it needs no sum of its own."""
        assert self.dweight is not None
        first, last = self.rows.start == 0, self.rows.stop == len(self.x)
        if self.dweight.dtype == self.scratch.dtype:
            multiply_(self.dweight[piece], g.T, x, add=not first)
        elif first and last:
            shape = piece.stop - piece.start, x.shape[1]
            self.dweight[piece] = multiply_(self.scratch.like("dweight", shape), g.T, x)
        else:
            total = multiply_(self._unrounded(piece), g.T, x, add=not first)
            if last:
                self.dweight[piece] = total

    def _unrounded(self, piece: slice) -> Tensor:
        """Where the sum of these rows of dweight stands until all tokens are in it."""
        if self.by_columns:
            shape = self.columns.stop - self.columns.start, self.x.shape[1]
            return self.scratch.like("dweight", shape)[self._inside(piece)]
        if self.dweight_sum is None:
            shape = self.vocab, self.x.shape[1]
            self.dweight_sum = self.x.new_empty(shape, dtype=self.scratch.dtype)
        return self.dweight_sum[piece]

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The slab's columns of the weight in the dtype of the products, as few as can be at once:
        all of them, or pieces that are converted."""
        hidden, dtype = self.hidden.dtype, self.scratch.dtype
        if self.weight.dtype == hidden == dtype:
            yield self.columns, self.weight[self.columns]
            return
        width = self.columns.stop - self.columns.start
        at_a_time = max(1, CONVERTED_NUMBERS // self.weight.shape[1])
        for inside in cut(width, at_a_time):
            start = self.columns.start
            piece = slice(start + inside.start, start + inside.stop)
            if self.converted is None or self.converted[0] != piece:
                shape = piece.stop - piece.start, self.weight.shape[1]
                w = self.scratch.like(f"{self.name} weight", shape)
                self.converted = piece, w.copy_(self.weight[piece].to(hidden))
            yield self.converted

    def _inside(self, piece: slice) -> slice:
        return slice(piece.start - self.columns.start, piece.stop - self.columns.start)

    def _rows_inside(self, rows: slice) -> slice:
        return slice(rows.start - self.rows.start, rows.stop - self.rows.start)

    def gradients(self) -> Gradients:
        dhidden = None if self.dx is None else self.dx.to(self.hidden.dtype)
        if dhidden is not None and self.kept is not None:
            dhidden = torch.zeros_like(self.hidden).index_copy_(0, self.kept, dhidden)
        dbias = self.dbias
        if dbias is not None and self.bias is not None:
            dbias = dbias.to(self.bias.dtype)
        return dhidden, self.dweight, dbias


class SplitHeadSource(HeadSource):
    """The same in bf16, with products of bf16 factors: logits to 16 bits, ``g`` rounded to bf16.

    The student's logits are two slabs, which add up. The teacher's are what they differ by from the
    student's: one product, rounded to 8 bits of the *difference*, which is all that is learnt from,
    and small where it has to be known well. Only in a row whose logits dwarf the teacher's would
    that be less than the teacher's own 8 bits; such a row has its teacher's logits made in fp32.
    """

    SHARE = 4.0  # by how much a row's difference may exceed the teacher's logits

    base: SplitHeadSource | None = None  # the student, beside which this is the teacher

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.slabs = self.scratch.of(self.hidden.dtype)

    def _factor(self, hidden: Tensor) -> Tensor:
        return hidden

    def reserve(self, rows: int, columns: int) -> None:
        for part in ("high", "low") if self.base is None else ("low",):
            self.slabs.like(f"{self.name} {part}", (rows, columns))

    def load(self, rows: slice, columns: slice) -> None:
        self.rows, self.columns = rows, columns
        shape = rows.stop - rows.start, columns.stop - columns.start
        self.low = self.slabs.like(f"{self.name} low", shape)
        x, w = self.x[rows], self.weight[columns].T
        if self.base is not None:
            self.high = self.base.high
            product_less_(self.low, x, w, self.high)
        else:
            self.high = self.slabs.like(f"{self.name} high", shape)
            split_product_(self.high, self.low, x, w)
        self.slab = self.high

    def block(self, rows: slice) -> Tensor:  # [rows, columns]
        inside = self._rows_inside(rows)
        high, low = self.high[inside], self.low[inside]
        logits = self.scratch.like(self.name, low.shape).copy_(high)
        low = self._add(logits, low)
        if self.base is not None:
            largest = logits.amax(1).abs_()  # or more: of the lowest too, if that decides
            apart = torch.maximum(low.amax(1), -low.amin(1))
            for row in (~(apart <= self.SHARE * largest)).nonzero().flatten().tolist():
                if not apart[row] <= self.SHARE * logits[row].abs().amax():
                    logits[row : row + 1] = self._exact(rows.start + row)
        if self.bias is not None:
            logits.add_(self.bias[self.columns])
        return self.transform.apply_(logits)

    def _exact(self, row: int) -> Tensor:  # [1, columns]
        """A row of products in fp32."""
        x = self.x[row : row + 1].to(self.scratch.dtype)
        out = x.new_empty(1, self.columns.stop - self.columns.start)
        for piece, w in self._pieces():
            multiply_(out[:, self._inside(piece)], x, w.T)
        return out

    def want_gradients(self, wanted: tuple[bool, bool, bool], by_columns: bool) -> None:
        super().want_gradients(wanted, by_columns)
        # bf16 partial sums would be rounded again and again
        if self.dx is not None and (by_columns or self.is_shard):
            self.dx = self.dx.to(self.scratch.dtype)

    def store(self, rows: slice, g: Tensor) -> None:
        """Round the gradient of the logits, in the place of their upper half."""
        self.slab[self._rows_inside(rows)].copy_(self.transform.backward_(g))

    def flush(self) -> None:
        x, w, g = self.x[self.rows], self.weight[self.columns], self.slab
        if self.dx is not None:
            if self.by_columns or self.is_shard:
                # Partial sums: each rounded to 8 bits would err more than their sum.
                high, low = (self.slabs.like(f"dx {part}", x.shape) for part in ("high", "low"))
                split_product_(high, low, g, w)
                self._add(self.dx[self.rows], high)
                self._add(self.dx[self.rows], low)
            else:
                multiply_(self.dx[self.rows], g, w)
        if self.dweight is not None:
            self._add_to_dweight(self.columns, g, x)
        if self.dbias is not None:
            self.dbias[self.columns] += g.sum(0, dtype=self.dbias.dtype)

    def _add_to_dweight(self, piece: slice, g: Tensor, x: Tensor) -> None:
        assert self.dweight is not None
        first, last = self.rows.start == 0, self.rows.stop == len(self.x)
        if first and last:
            multiply_(self.dweight[piece], g.T, x)
            return
        for inside in cut(g.shape[1], max(1, CONVERTED_NUMBERS // x.shape[1])):
            rows = slice(piece.start + inside.start, piece.start + inside.stop)
            shape = inside.stop - inside.start, x.shape[1]
            part = multiply_(self.slabs.like("dweight part", shape), g[:, inside].T, x)
            total = self._unrounded(rows)
            total.copy_(part) if first else self._add(total, part)
            if last:
                self.dweight[rows] = total

    def _add(self, total: Tensor, part: Tensor) -> Tensor:
        """``total += part`` of 16 bits, which is returned in those of total; torch's own sum of two
        dtypes would convert to a new tensor."""
        converted = self.scratch.like("converted", part.shape).copy_(part)
        total.add_(converted)
        return converted


def splits_products(hidden: Tensor, weight: Tensor) -> bool:
    """Whether logits of these are made of bf16 products."""
    both = hidden.dtype == weight.dtype == torch.bfloat16
    return both and hidden.device.type == "cpu" and gemm.HAS_BF16_PRODUCTS


Source = LogitSource | HeadSource


class _Transform:
    """``cap tanh(scale x / cap)``, with the derivative ``1 - tanh^2`` of the last block kept."""

    def __init__(self, transform: LogitTransform, scratch: Scratch, name: str) -> None:
        self.scale, self.cap = transform
        self.scratch, self.name = scratch, f"{name} softcap"
        self.differentiable = False
        self.slope: Tensor | None = None

    def apply_(self, x: Tensor) -> Tensor:
        if self.scale != 1:
            x.mul_(self.scale)
        if self.cap is None:
            return x
        x.div_(self.cap).tanh_()
        if self.differentiable:
            slope = self.scratch.like(self.name, x.shape)
            self.slope = torch.mul(x, x, out=slope).neg_().add_(1)
        return x.mul_(self.cap)

    def backward_(self, g: Tensor) -> Tensor:
        if self.slope is not None:
            g.mul_(self.slope)
        return g if self.scale == 1 else g.mul_(self.scale)
