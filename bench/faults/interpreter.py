"""Triton's interpreter, so that what it shows is the kernels' doing and not its own."""

from __future__ import annotations

import numpy as np
import torch


def prepare() -> None:
    round_to_nearest()
    widen_tiles()


def round_to_nearest() -> None:
    """As every GPU does. The interpreter cuts fp32 off to bf16, which would blame the kernels."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding)  # pyright: ignore[reportArgumentType]
        nearest = torch.from_numpy(np.ascontiguousarray(x)).bfloat16()
        return nearest.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(x))

    interpreter._convert_float = rounded


def widen_tiles() -> None:
    """Our kernels in few tiles: interpreted, each costs the same whatever its width."""
    from sad_kernels._triton import launch

    def choose(kernel: str, vocab: int, pressure: int, *, ids: bool = False) -> launch.Tile:
        block = min(32768, launch.power_of_2(vocab))
        return launch.Tile(block, 1 << 17, block)  # with as many warps, not cut into pieces

    launch.choose_tile = choose
