"""Kernels: averaging (update) and swapping of a whole model's tensors in few launches.

There is one launch per device, pair of dtypes and alignment. A program works on one block of at
most ``BLOCK`` elements of one pair of shadow and parameter. A table on the device says where its
block lies, in one row of int64 per program: the address of the shadows, the address of the
parameters, the number of elements. Offsets are thus added once, on the host and in 64 bits, and a
table takes 24 bytes per ``BLOCK`` elements. The decay is read from device memory, so that new
values and new tensors never compile a kernel anew.

Triton knows nothing of the alignment of an address that was loaded, and would access one element at
a time. Where both tensors of a pair begin at a multiple of 16 bytes the kernels are told so, and
access 16 bytes at a time; the other pairs have a launch of their own.

The tables of the last ``PLANS`` sets of tensors are kept and found again by address, dtype and
size, so that replaced storage gets a new table and the same storage does not. A new table is copied
to the device without waiting for it, which a CUDA graph cannot capture: call once before capture.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from sad_kernels._triton.launch import on_device

if TYPE_CHECKING:
    from sad_kernels._extents import Extent

BLOCK = 4096  # elements per program; 16 per thread leave registers for five programs per SM, sm_90
NUM_WARPS = 8
PLANS = 8
ALIGNMENT = 16  # bytes, the widest access of one thread

INFINITY = tl.constexpr(0x7F80)  # bf16 magnitude; larger ones are NaNs

FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTEGERS = {torch.float32: tl.int32, torch.bfloat16: tl.int16, torch.float16: tl.int16}


# --- Kernels -------------------------------------------------------------------------------------


@triton.jit
def _update_kernel(
    table_ptr,  # [programs, 3] int64
    coefficients_ptr,  # [2] fp32: 1 - decay and decay
    PARAM: tl.constexpr,  # dtype of the parameters; shadows are fp32
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move one block of shadows towards its parameters."""
    w = tl.load(coefficients_ptr)
    keep = tl.load(coefficients_ptr + 1)
    if w == 0.0:  # a decay of 1 leaves the shadows' bits alone
        return
    s_ptr, p_ptr, n = _block(table_ptr, tl.float32, PARAM, ALIGNED)
    o_n = tl.arange(0, BLOCK)
    if n == BLOCK:
        b_s = tl.load(s_ptr + o_n)
        b_p = tl.load(p_ptr + o_n).to(tl.float32)
        tl.store(s_ptr + o_n, _moved(b_s, b_p, w, keep))
    else:
        m_n = o_n < n
        b_s = tl.load(s_ptr + o_n, mask=m_n, other=0.0)
        b_p = tl.load(p_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
        tl.store(s_ptr + o_n, _moved(b_s, b_p, w, keep), mask=m_n)


@triton.jit
def _moved(s, p, w, keep):
    """``keep s + w p``, computed from the nearer of the two so that both ends are exact.

    With ``keep`` 0 the result is ``p``, even where ``s`` is NaN.
    """
    step = p - s
    moved = tl.where(w < 0.5, s + w * step, p - keep * step)
    return tl.where(keep == 0.0, p, moved)


@triton.jit
def _swap_kernel(
    table_ptr,  # [programs, 3] int64
    SHADOW: tl.constexpr,  # integers of the tensors' sizes: moving NaNs as floats may change them
    PARAM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Exchange one block of shadows with its parameters."""
    s_ptr, p_ptr, n = _block(table_ptr, SHADOW, PARAM, ALIGNED)
    o_n = tl.arange(0, BLOCK)
    if n == BLOCK:
        new_s, new_p = _exchanged(tl.load(s_ptr + o_n), tl.load(p_ptr + o_n), SHADOW == PARAM)
        tl.store(s_ptr + o_n, new_s)
        tl.store(p_ptr + o_n, new_p)
    else:
        m_n = o_n < n
        b_s = tl.load(s_ptr + o_n, mask=m_n, other=0)
        b_p = tl.load(p_ptr + o_n, mask=m_n, other=0)
        new_s, new_p = _exchanged(b_s, b_p, SHADOW == PARAM)
        tl.store(s_ptr + o_n, new_s, mask=m_n)
        tl.store(p_ptr + o_n, new_p, mask=m_n)


@triton.jit
def _exchanged(s, p, PLAIN: tl.constexpr):
    """The new shadow and parameter; the formulas are at the top of ``sad_kernels/ema.py``."""
    if PLAIN:
        return p, s
    else:  # the compiler would read on past the return
        low = s & 0xFFFF
        up = low >> 15  # 1 from 0x8000 on
        rounded = _turned((s >> 16) & 0xFFFF, up)
        residue = _turned(p.to(tl.int32) & 0xFFFF, -up)
        return (residue << 16) | low, rounded.to(tl.int16)


@triton.jit
def _turned(bits, by):
    """Move bf16 patterns ``by`` -1, 0 or 1 along the circle of the magnitudes 1 to INFINITY."""
    magnitude = bits & 0x7FFF
    turned = magnitude + by
    turned = tl.where(turned > INFINITY, 1, tl.where(turned < 1, INFINITY, turned))
    on_circle = (magnitude >= 1) & (magnitude <= INFINITY)
    return (bits & 0x8000) | tl.where(on_circle, turned, magnitude)


@triton.jit
def _block(table_ptr, SHADOW: tl.constexpr, PARAM: tl.constexpr, ALIGNED: tl.constexpr):
    """Read this program's row of the table: pointers to shadows and parameters, their number."""
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 3
    s_ptr = tl.load(row_ptr).to(tl.pointer_type(SHADOW))
    p_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(PARAM))
    if ALIGNED:
        s_ptr = tl.multiple_of(s_ptr, 16)
        p_ptr = tl.multiple_of(p_ptr, 16)
    return s_ptr, p_ptr, tl.load(row_ptr + 2).to(tl.int32)


# --- Launches ------------------------------------------------------------------------------------


def update(extents: tuple[Extent, ...], decay: Tensor) -> None:
    """Launch the update of these pairs, whose tensors the caller keeps alive and has checked."""
    for launch in _plan_of(extents):
        with on_device(launch.device):
            _update_kernel[(len(launch.table),)](
                launch.table,
                _coefficients(decay, launch.device),
                PARAM=FLOATS[launch.param_dtype],
                ALIGNED=launch.aligned,
                BLOCK=launch.block,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )


def swap(extents: tuple[Extent, ...]) -> None:
    """Launch the swap of these pairs, whose tensors the caller keeps alive and has checked."""
    for launch in _plan_of(extents):
        with on_device(launch.device):
            _swap_kernel[(len(launch.table),)](
                launch.table,
                SHADOW=INTEGERS[launch.shadow_dtype],
                PARAM=INTEGERS[launch.param_dtype],
                ALIGNED=launch.aligned,
                BLOCK=launch.block,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )


def _coefficients(decay: Tensor, device: torch.device) -> Tensor:  # [2] fp32
    """``1 - decay`` and ``decay``, formed in float64: in fp32, 1 - 0.9999 is off by 1.7e-4."""
    keep = decay.to(device, torch.float64, non_blocking=True)
    return torch.stack((1.0 - keep, keep)).float()


# --- Plans ---------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """The arguments of one launch, without the decay."""

    device: torch.device
    shadow_dtype: torch.dtype
    param_dtype: torch.dtype
    aligned: bool
    block: int
    table: Tensor  # [programs, 3] int64


_captured: dict[tuple[Extent, ...], tuple[Launch, ...]] = {}
"""Plans used under capture, never evicted: a CUDA graph replays with the tables' addresses."""


def _plan_of(extents: tuple[Extent, ...]) -> tuple[Launch, ...]:
    """The launches of these pairs, kept for as long as a CUDA graph may replay them."""
    launches = _plan(extents, BLOCK)
    if any(_is_capturing(launch.device) for launch in launches):
        _captured[extents] = launches
    return launches


@lru_cache(maxsize=PLANS)
def _plan(extents: tuple[Extent, ...], block: int) -> tuple[Launch, ...]:
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype, bool], list[Extent]] = {}
    for extent in extents:
        kind = (extent.device, extent.shadow_dtype, extent.param_dtype, _is_aligned(extent))
        groups.setdefault(kind, []).append(extent)
    return tuple(Launch(*kind, block, _table(group, block)) for kind, group in groups.items())


def _is_aligned(extent: Extent) -> bool:
    return extent.shadow % ALIGNMENT == 0 and extent.param % ALIGNMENT == 0


def _table(extents: list[Extent], block: int) -> Tensor:
    """[programs, 3] int64 on the extents' device."""
    device = extents[0].device
    if knobs.runtime.interpret and device.type != "cpu":
        raise ValueError(
            f"tensors must be on the CPU while TRITON_INTERPRET is set, got {device}; "
            "unset it, or pass impl='torch'"
        )
    if _is_capturing(device):
        raise RuntimeError(
            "these tensors must have been averaged or swapped before a CUDA graph captures it, got "
            "a first call under capture; make the same call once before"
        )
    table = torch.cat([_rows(extent, block) for extent in extents])
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _rows(extent: Extent, block: int) -> Tensor:  # [programs, 3] int64
    start = torch.arange(0, extent.numel, block)
    shadow = _signed(extent.shadow) + start * extent.shadow_dtype.itemsize
    param = _signed(extent.param) + start * extent.param_dtype.itemsize
    return torch.stack((shadow, param, (extent.numel - start).clamp(max=block)), dim=1)


def _signed(address: int) -> int:
    """The int64 of the same bits: some devices use the upper half of the address space."""
    return address - (1 << 64) if address >> 63 else address


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
