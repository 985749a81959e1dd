"""The hardware-limit benchmark at toy sizes on a CPU: every configuration gets its line."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sad_kernels._triton import ema

from bench.kernels import ceilings
from bench.kernels.timing import Cpu


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("launches CPU tensors, which only the interpreter takes")
    sizes = {"N": 8, "ROWS": (4, 8), "PARAMETERS": 4096, "TENSORS": 2, "BLOCKS": ((512, 4),)}
    for name, value in sizes.items():
        monkeypatch.setattr(ceilings, name, value)


@pytest.mark.usefixtures("one_thread")
def test_products_are_cut_into_rows() -> None:
    rows = list(ceilings._products(Cpu(), D=16, V=32, calls=1))
    assert {(row["product"], row["rows"]) for row in rows} == {
        (product, n) for product in ("h w^T", "g w", "g^T h") for n in (4, 8)
    }
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)


@pytest.mark.usefixtures("one_thread")
def test_linear_losses_are_measured_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SHAPES", ((16, 32),))
    monkeypatch.setattr(ceilings, "CHUNKS", (4000, 8000))
    for kind in ("ce", "joint"):
        rows = list(ceilings._chunks(Cpu(), kind, calls=1))
        assert [row["chunk_bytes"] for row in rows] == [4000, 8000]
        assert all(row["ratio"] > 0 and row["peak_mib"] > 0 for row in rows)


def test_averages_are_swept_and_the_block_is_put_back() -> None:
    before = ema.BLOCK, ema.NUM_WARPS, ema._is_aligned
    rows = list(ceilings._ema(Cpu(), rate=1e9, calls=1))
    assert (ema.BLOCK, ema.NUM_WARPS, ema._is_aligned) == before
    assert {(row["what"], row["block"], row["hint"]) for row in rows} == {
        (what, block, hint)
        for what in ("update", "swap")
        for block, hint in ((None, True), ((512, 4), True), (None, False))
    }
