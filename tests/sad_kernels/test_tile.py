"""The functions that kernels call on numbers of a tile, each against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from sad_kernels._triton.tile import fast_log2, log2_1p, tanh, to_dtype

BLOCK = 4096
EPSILON = 2.0**-23


@triton.jit
def evaluate_tanh(x_ptr, value_ptr, slope_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value, slope = tanh(tl.load(x_ptr + at))  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(value_ptr + at, value)
    tl.store(slope_ptr + at, slope)


@triton.jit
def evaluate_log2(x_ptr, value_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(value_ptr + at, fast_log2(tl.load(x_ptr + at)))


@triton.jit
def evaluate_log2_1p(x_ptr, value_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(value_ptr + at, log2_1p(tl.load(x_ptr + at)))


@triton.jit
def evaluate_to_dtype(x_ptr, value_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(value_ptr + at, to_dtype(tl.load(x_ptr + at), value_ptr.dtype.element_ty))


def ulps(x: Tensor, expected: Tensor) -> Tensor:
    spacing = torch.from_numpy(np.spacing(expected.float().abs().numpy())).double()
    return (x.double() - expected).abs() / spacing


def test_tanh_and_what_is_left_of_its_slope() -> None:
    """``1 - tanh^2`` of a rounded tanh keeps three digits where the softcap's slope is 1e-4."""
    size = torch.logspace(-6, 1, BLOCK // 2)
    x = torch.cat((size, -size))
    value, slope = torch.empty(BLOCK), torch.empty(BLOCK)
    kernel: Any = evaluate_tanh
    kernel[(1,)](x, value, slope, BLOCK=BLOCK)
    x = x.double()
    assert ulps(value, x.tanh()).max() <= 2
    expected = x.cosh() ** -2
    assert ((slope.double() / expected - 1).abs() <= EPSILON * (4 + 3 * x.abs())).all()


def test_log2_near_one_and_far_from_it() -> None:
    near = 1 + torch.linspace(-0.5, 1, BLOCK // 2)
    x = torch.cat((near, torch.logspace(-18, 18, BLOCK // 2)))
    x[:2] = torch.tensor([1 - EPSILON / 2, 1 + EPSILON])
    value = torch.empty(BLOCK)
    kernel: Any = evaluate_log2
    kernel[(1,)](x, value, BLOCK=BLOCK)
    assert ulps(value, x.double().log2()).max() <= 3


def test_log2_of_one_and_little_more() -> None:
    size = torch.logspace(-30, -0.31, BLOCK // 2)
    x = torch.cat((size, -size))
    value = torch.empty(BLOCK)
    kernel: Any = evaluate_log2_1p
    kernel[(1,)](x, value, BLOCK=BLOCK)
    assert ulps(value, x.double().log1p() / math.log(2)).max() <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stores_round_to_nearest(dtype: torch.dtype) -> None:
    """As torch does, ties to even: Triton's interpreter truncates to bf16 of itself."""
    bits = torch.randint(-(2**31), 2**31 - 1, (BLOCK,), dtype=torch.int32)
    x = bits.view(torch.float32)
    ties = torch.arange(1, 513).bfloat16().view(torch.int16).int() * 2**16 + 2**15
    x[:512] = ties.view(torch.float32)
    x[512:518] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38])
    x[518] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # truncates to inf
    value = torch.empty(BLOCK, dtype=dtype)
    kernel: Any = evaluate_to_dtype
    with np.errstate(over="ignore"):  # past fp16
        kernel[(1,)](x, value, BLOCK=BLOCK)
    torch.testing.assert_close(value, x.to(dtype), rtol=0, atol=0, equal_nan=True)
