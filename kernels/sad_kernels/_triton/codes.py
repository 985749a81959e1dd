"""Logits as codes of 16 bits, relative to the largest of a group of columns.

A code is how far a logit ``z`` is below ``k``, the exact maximum of its row over ``GROUP`` columns
that lie next to each other: ``v = k - z + 1/4`` with 4 bits of exponent and 12 of mantissa, rounded
to nearest. There is no sign and there are no subnormal numbers, so that it has two bits more than
fp16. ``v`` lies between 1/4 and 8192:

* a maximum is exact, its code is 0, and no other logit is off by more than ``2^-13 v``;
* a finite logit further below its group's maximum than 8191 counts as that far below, and -inf
  stays -inf, code ``0xF000``;
* NaN is kept by the maximum of its group, which its codes are relative to, not by its own code.

In the bits of fp32, ``2^115 v`` has one of the last 16 exponents, of which the last is inf. So the
code is the lower part of the exponent and the upper part of the mantissa, and both ways take a few
instructions. What a code stands for is exact in fp32.

Columns that are not there must never be decoded: 0, which a masked load gives, is a maximum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels import _tiles
from sad_kernels._triton.tile import INTERPRETED, LOWEST

GROUP = tl.constexpr(_tiles.GROUP)

UP = tl.constexpr(2.0**115)
DOWN = tl.constexpr(2.0**-115)
QUARTER_UP = tl.constexpr(2.0**113)
FARTHEST = tl.constexpr(2.0**128 - 2.0**115)  # 8191 UP: the last code of a finite logit
INF_ONLY = tl.constexpr(2.0**-100)  # what it is times vanishes beside QUARTER_UP, unless it is inf
EXPONENTS = tl.constexpr(240 << 23)  # the bits that the exponents of 1/4 to 8192, times UP, share
DROPPED = tl.constexpr(11)  # bits of fp32's 23 of mantissa
KEPT = tl.constexpr(-(1 << 11))  # a mask of the others
HALF = tl.constexpr(1 << 10)  # of the last of the others: added to round to nearest
NO_MAXIMUM = tl.constexpr(-1)  # a code for columns that are not there, where maxima are looked for


@triton.jit
def decoded(code):
    """``z - k`` of codes in int16, in fp32."""
    bits = ((code.to(tl.int32) & 0xFFFF) << DROPPED) | EXPONENTS
    return 0.25 - bits.to(tl.float32, bitcast=True) * DOWN


@triton.jit
def encoded(x, k):
    """The codes of logits ``x`` at or below ``k``, in int16, and what they stand for, ``z - k``."""
    below = k - x
    v = below * UP + QUARTER_UP  # exact but for the difference and the sum
    v = tl.minimum(v, FARTHEST) + below * INF_ONLY
    bits = v.to(tl.int32, bitcast=True) + HALF
    y = 0.25 - (bits & KEPT).to(tl.float32, bitcast=True) * DOWN
    return (bits >> DROPPED).to(tl.int16), y


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def group_maxima(x):
    """The largest of each row of ``x``, NaN if there is one: tl.max would pass it over.

    LOWEST for a group of -inf alone, so that differences are numbers.
    """
    if INTERPRETED:  # a reduction by a function of ours would take it seconds
        has_nan = tl.max((x != x).to(tl.int32), 1) > 0
        k = tl.where(has_nan, float("nan"), tl.max(x, 1))
    else:
        k = tl.reduce(x, 1, _larger)
    return tl.where(k < LOWEST, LOWEST, k)


@triton.jit
def load_codes(row, shifts, start, V, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """The logits of one row, less their maximum, at BLOCK columns from ``start`` on.

    ``row`` is a LogitsRow whose ``ptr`` points to codes and which has no other step. ``shifts`` of
    the row's groups are their maxima less the row's. MASKED: some columns may lie past the
    vocabulary, where the logit is -inf.
    """
    columns = start + tl.arange(0, BLOCK)
    inside = columns < V
    if MASKED:
        read = inside if row.is_read is None else inside & (tl.zeros_like(columns) < row.is_read)
        y = decoded(tl.load(row.ptr + columns, mask=read, other=0))
    elif row.is_read is not None:
        read = tl.zeros_like(columns) < row.is_read  # one truth for all: loads stay wide
        y = decoded(tl.load(row.ptr + columns, mask=read, other=0))
    else:
        y = decoded(tl.load(row.ptr + columns))
    groups = start // GROUP + tl.arange(0, BLOCK // GROUP)
    shift = tl.load(shifts + groups, mask=groups * GROUP < V, other=0.0)
    shift = tl.zeros([BLOCK // GROUP, GROUP], tl.float32) + shift[:, None]
    x = y + tl.reshape(shift, [BLOCK])
    if MASKED:
        x = tl.where(inside, x, float("-inf"))
    return x
