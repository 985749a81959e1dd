"""Triton's interpreter, so that what it shows is the kernels' doing and not its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch


@contextmanager
def prepared() -> Iterator[None]:
    """Round as a GPU does, from now on, and take wide tiles until the context ends."""
    round_to_nearest()
    with wide_tiles():
        yield


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


def wide_tiles() -> AbstractContextManager[object]:
    """Our kernels in few tiles: interpreted, each costs the same whatever its width."""
    from sad_kernels._triton import tile_sizes

    def wide(arch: str, kernel: str, vocab: int, pressure: int, ids: bool) -> tile_sizes.Tile:
        block = min(32768, tile_sizes.power_of_2(vocab))
        return tile_sizes.Tile(block, 1 << 17, block)  # with as many warps, not cut into pieces

    return tile_sizes.tile_rule(wide)
