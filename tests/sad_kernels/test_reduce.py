"""Rows to the loss, the count and the sums: one launch, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sad_kernels._triton.reduce import BLOCK, reduced

IGNORED = -100


def rows(N: int, P: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    loss, parts = torch.randn(N) + 3, torch.randn(P, N)
    labels = torch.randint(-1, 50, (N,))
    return loss, parts, labels.where(labels >= 0, IGNORED)


@pytest.mark.parametrize("N", [0, 1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 77])
@pytest.mark.parametrize("P", [0, 6])
@pytest.mark.parametrize("items", [None, 0.0, 7.0])
def test_triton_sums_of_rows(N: int, P: int, items: float | None) -> None:
    loss, parts, labels = rows(N, P)
    given = None if items is None else torch.tensor(items)
    count = int((labels != IGNORED).sum())
    divisor = max(count if items is None else items, 1)
    mean, by, sums = reduced(loss, parts, labels, IGNORED, given)
    assert by == divisor and sums[0] == count and len(sums) == 1 + P
    # Lanes of N / BLOCK numbers and a tree over them: far below torch's N roundings of the worst.
    close = {"rtol": 2e-6, "atol": 2e-6 * max(N, 1) ** 0.5}
    torch.testing.assert_close(mean.double(), loss.double().sum() / divisor, **close)
    torch.testing.assert_close(sums[1:].double(), parts.double().sum(1), **close)


def test_triton_sums_without_labels_count_every_row() -> None:
    loss, parts, _ = rows(BLOCK + 5)
    _, by, sums = reduced(loss, parts, None, IGNORED)
    assert by == len(loss) and sums[0] == len(loss)


def test_triton_items_of_any_dtype_divide() -> None:
    loss, parts, labels = rows(9)
    for dtype in (torch.int64, torch.int32, torch.float32, torch.bfloat16):
        items = torch.tensor(12, dtype=dtype)
        assert reduced(loss, parts, labels, IGNORED, items)[1] == 12


def test_triton_not_a_number_stays_one() -> None:
    loss, parts, labels = rows(BLOCK + 3)
    loss[-1] = torch.nan
    mean, _, sums = reduced(loss, parts, labels, IGNORED)
    assert mean.isnan() and not sums.isnan().any()


def test_triton_strided_rows_are_read_as_they_are() -> None:
    loss, parts, labels = rows(50)
    mean, _, sums = reduced(loss, parts, labels, IGNORED)
    apart = loss.repeat_interleave(2)[::2], parts.T.contiguous().T, labels.repeat_interleave(2)[::2]
    other, _, same = reduced(*apart, IGNORED)
    assert torch.equal(mean, other) and torch.equal(sums, same)
