"""The table of tiles: what each launch gets, a row for a new GPU, and rules in its place."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sad_kernels._triton import tile_sizes
from sad_kernels._triton.tile_sizes import BlockAndWarps, Tile, choose_tile, table_rule, tile_rule

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kernel", "pressure", "ids", "tile"),
    [
        ("statistics", 1, False, (2048, 16384, 4)),
        ("statistics", 2, False, (512, 16384, 1)),
        ("statistics", 4, True, (512, 32768, 1)),
        ("mixture", 2, False, (2048, 16384, 4)),
        ("gradient", 1, False, (2048, 32768, 8)),
        ("gradient", 2, False, (2048, 32768, 4)),
        ("gradient", 5, False, (1024, 32768, 4)),
    ],
)
def test_measured_tiles(kernel: str, pressure: int, ids: bool, tile: tuple[int, ...]) -> None:
    """Another tile sums in another order: results of released versions would move."""
    assert table_rule("sm_90", kernel, 128256, pressure, ids) == (*tile, 32)


def test_a_small_vocabulary_gets_a_small_tile() -> None:
    """Of a power of 2 from 128 on, whose warps have at least 16 bytes per thread to load."""
    assert table_rule("sm_90", "gradient", 1000, 1, False) == (1024, 32768, 4, 32)
    assert table_rule("sm_90", "gradient", 50, 1, False) == (128, 32768, 1, 32)


def test_warps_of_64_threads_are_fewer() -> None:
    assert table_rule("gfx942", "gradient", 128256, 1, False) == (2048, 32768, 4, 64)
    assert table_rule("gfx1100", "gradient", 128256, 1, False) == (2048, 32768, 8, 32)


def test_a_row_gives_a_gpu_tiles_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {("gradient", 1): BlockAndWarps(4096, 16), ("statistics", None): BlockAndWarps(1024, 2)}
    monkeypatch.setitem(tile_sizes.TILES, "sm_999", rows)
    assert table_rule("sm_999", "gradient", 128256, 1, False).block == 4096
    assert table_rule("sm_999", "statistics", 128256, 1, False).block == 1024
    assert table_rule("sm_999", "gradient", 128256, 2, False).block == 2048
    assert table_rule("sm_90", "gradient", 128256, 1, False).block == 2048


def test_a_kernel_without_a_row_is_named() -> None:
    with pytest.raises(KeyError, match="kernel must be one of the table of tiles, got 'toy'"):
        table_rule("sm_90", "toy", 128256, 1, False)


def test_a_rule_holds_in_all_threads_and_ends() -> None:
    """Backward runs in threads of autograd's."""
    before, seen = choose_tile(CPU, "gradient", 50, 1), []

    def rule(*how: object) -> Tile:
        seen.append(how)
        return Tile(64, 128, 1)

    with tile_rule(rule):
        thread = threading.Thread(target=lambda: choose_tile(CPU, "gradient", 50, 1, ids=True))
        thread.start()
        thread.join()
        with pytest.raises(ZeroDivisionError), tile_rule(table_rule):
            raise ZeroDivisionError
        assert choose_tile(CPU, "mixture", 50, 2) == (64, 128, 1, 32)
    assert seen == [("cpu", "gradient", 50, 1, True), ("cpu", "mixture", 50, 2, False)]
    assert choose_tile(CPU, "gradient", 50, 1) == before


@pytest.mark.parametrize(
    ("arch", "key", "tile"),
    [
        ("sm103", ("gradient", 1), (2048, 4)),
        ("sm_103", ("gradeint", 1), (2048, 4)),
        ("sm_103", "gradient", (2048, 4)),
        ("sm_103", ("gradient", "1"), (2048, 4)),
        ("sm_103", ("mixture", 1), (2048, 4)),
        ("sm_103", ("gradient", 1), (3000, 4)),
        ("sm_103", ("gradient", 1), (2048, 7)),
        ("sm_103", ("gradient", 1), (1 << 17, 4)),
    ],
)
def test_a_row_that_would_be_ignored_or_cannot_be_launched_is_refused(
    arch: str, key: Any, tile: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=r"got .* in |got 'sm103'|got it in"):
        tile_sizes.check_tiles({arch: {key: tile_sizes.BlockAndWarps(*tile)}})


def test_a_row_for_another_gpu_is_taken() -> None:
    tile_sizes.check_tiles({"sm_103": {("gradient", 1): tile_sizes.BlockAndWarps(4096, 8)}})
