"""The counter of bytes is itself counted after, on kernels whose accesses are plain to see."""

# pyright: reportArgumentType=false
# (tl.constexpr takes plain numbers)

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from support.traffic import counted_traffic, needs_interpreter

pytestmark = needs_interpreter


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, READS: tl.constexpr):
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + o_n, mask=o_n < n, other=0.0)
    for _ in range(READS - 1):
        b_x += 0 * tl.load(x_ptr + o_n, mask=o_n < n, other=0.0)
    tl.store(y_ptr + o_n, b_x, mask=o_n < n)


@triton.jit
def _scalar_kernel(x_ptr, y_ptr, stride):
    tl.store(y_ptr, tl.load(x_ptr) + tl.load(x_ptr + stride))


@triton.jit
def _gather_kernel(x_ptr, index_ptr, y_ptr, BLOCK: tl.constexpr):
    o_n = tl.arange(0, BLOCK)
    tl.store(y_ptr + o_n, tl.load(x_ptr + tl.load(index_ptr + o_n)))


@triton.jit
def _atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_active_lanes_count_and_masked_ones_do_not(dtype: torch.dtype, reads: int) -> None:
    n = 37  # of 3 * 16 lanes
    buffer = torch.randn(2 * n).to(dtype)
    x, neighbour, y = buffer[:n], buffer[n:], torch.empty(n, dtype=dtype)
    with counted_traffic() as traffic:
        _copy_kernel[(3,)](x, y, n, BLOCK=16, READS=reads)
    assert torch.equal(x, y)
    size = n * dtype.itemsize
    assert traffic.read_bytes == traffic.read_from(x) == reads * size
    assert traffic.written_bytes == traffic.written_to(y) == size
    assert traffic.read_from(neighbour) == traffic.read_from(y) == traffic.written_to(x) == 0


def test_scalar_accesses_and_views() -> None:
    x, y = torch.arange(8.0), torch.empty(())
    with counted_traffic() as traffic:
        _scalar_kernel[(1,)](x, y, 6)
    assert y == 6
    assert traffic.read_from(x) == 8 and traffic.written_to(y) == 4
    assert traffic.read_from(x[:6]) == traffic.read_from(x[5:]) == 4
    assert traffic.read_from(x[::2]) == 8  # a strided view spans its gaps
    assert traffic.read_from(x[:0]) == 0


def test_gathers_count_each_element() -> None:
    x, y = torch.arange(16.0), torch.empty(8)
    index = torch.tensor([3, 3, 4, 5, 0, 15, 14, 2])
    with counted_traffic() as traffic:
        _gather_kernel[(1,)](x, index, y, BLOCK=8)
    assert torch.equal(y, x[index])
    assert traffic.read_from(x) == 8 * 4 and traffic.read_from(x[3:6]) == 4 * 4
    assert traffic.read_from(index) == index.nbytes


def test_counting_ends_with_its_block() -> None:
    x, y = torch.ones(16), torch.empty(16)
    with counted_traffic() as outer:
        with counted_traffic() as inner:
            _copy_kernel[(1,)](x, y, 16, BLOCK=16, READS=1)
        _copy_kernel[(1,)](x, y, 16, BLOCK=16, READS=1)
    _copy_kernel[(1,)](x, y, 16, BLOCK=16, READS=1)
    assert inner.read_bytes == 64 and outer.read_bytes == 128


def test_atomics_are_not_passed_over() -> None:
    with counted_traffic(), pytest.raises(Exception, match="atomic accesses must be counted"):
        _atomic_kernel[(1,)](torch.zeros(1))
