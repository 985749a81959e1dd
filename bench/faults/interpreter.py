"""Corrections to Triton's interpreter, so that its results are those of the kernels."""

from __future__ import annotations

import numpy as np
import torch


def prepare() -> None:
    """Apply all corrections; to be called before any kernel runs."""
    round_to_nearest()
    widen_tiles()


def round_to_nearest() -> None:
    """Round fp32 to the nearest bf16, as GPUs do: the interpreter truncates."""
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
    """Use few, wide tiles in our kernels: interpreted, a tile costs the same at any width."""
    from sad_kernels._triton import launch

    def choose(kernel: str, vocab: int, pressure: int, *, ids: bool = False) -> launch.Tile:
        block = min(32768, launch.power_of_2(vocab))
        return launch.Tile(block, 1 << 17, block)  # so many warps that it stays in one piece

    launch.choose_tile = choose
