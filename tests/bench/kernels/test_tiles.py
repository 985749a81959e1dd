"""The sweep of tiles, interpreted: that every kernel gets every candidate, not how fast it is."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sad_kernels._triton import tile_sizes

from bench.kernels import tiles
from bench.kernels.timing import Cpu


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("launches CPU tensors, which only the interpreter takes")
    for name, value in {"N": 4, "V": 96, "K": 3, "SEGMENTS": (64,)}.items():
        monkeypatch.setattr(tiles, name, value)
    for name in ("STATISTICS", "GRADIENT", "MIXTURE"):
        monkeypatch.setattr(tiles, name, ((32, 1),))


@pytest.mark.slow
def test_every_kernel_is_swept_and_the_table_is_put_back() -> None:
    table = tile_sizes.current_rule()
    rows = list(tiles._rows(Cpu(), torch.float32, rounds=1))
    assert tile_sizes.current_rule() is table
    swept = {(row["loss"], row["kernel"]) for row in rows}
    mixtures = {"jsd", "skew_forward_kl", "skew_reverse_kl"}
    assert swept == {
        (loss.name, kernel)
        for loss in tiles.LOSSES
        for kernel in ("statistics", "gradient", *(["mixture"] if loss.name in mixtures else []))
    }
    assert {str(row["tile"]) for row in rows} == {"None", "[32, 64, 1]"}
    assert all(row["bytes"] > 0 and row["ms"] > 0 for row in rows)


def test_of_a_loss_that_is_not_swept_only_the_table_is_measured() -> None:
    rows = list(tiles._rows(Cpu(), torch.float32, rounds=1, swept={"kl"}))
    assert {row["loss"] for row in rows if row["tile"]} == {"kl"}
    assert {row["loss"] for row in rows} == {loss.name for loss in tiles.LOSSES}
