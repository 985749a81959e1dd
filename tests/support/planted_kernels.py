"""Kernels with one planted fault each, and a sound one, to test the checks of compiled code."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sound(x_ptr, y_ptr, stride, V, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * stride
    scale = 2 * tl.full((), scale, tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + row + columns, scale * tl.load(x_ptr + row + columns).to(tl.float32))
    columns = whole + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + columns, mask=columns < V, other=0.0).to(tl.float32)
    tl.store(y_ptr + row + columns, scale * x, mask=columns < V)


@triton.jit
def masked_throughout(x_ptr, y_ptr, stride, V, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * stride
    scale = 2 * tl.full((), scale, tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + columns, mask=columns < V, other=0.0).to(tl.float32)
        tl.store(y_ptr + row + columns, scale * x, mask=columns < V)


@triton.jit
def narrow_rows(x_ptr, y_ptr, stride, V, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0) * stride
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + columns).to(tl.float32)
    tl.store(y_ptr + row + columns, tl.full((), scale, tl.float32) * x)


@triton.jit
def double_scalars(x_ptr, y_ptr, stride, V, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + columns).to(tl.float32)
    tl.store(y_ptr + row + columns, (2 * scale).to(tl.float32) * x)


@triton.jit
def too_large(x_ptr, y_ptr, stride, V, scale, BLOCK: tl.constexpr):
    """Spills: keeps a whole row in registers, 512 numbers per thread."""
    row = tl.program_id(0).to(tl.int64) * stride
    columns = tl.arange(0, 32 * BLOCK)
    x = tl.exp2(tl.load(x_ptr + row + columns).to(tl.float32))
    tl.store(y_ptr + row + columns, tl.full((), scale, tl.float32) * x / tl.sum(x, 0))


@triton.jit
def does_not_compile(x_ptr, y_ptr, stride, V, scale, BLOCK: tl.constexpr):
    """Load with ``other`` but no mask, which only the interpreter accepts."""
    columns = tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.load(x_ptr + columns, other=0.0))
