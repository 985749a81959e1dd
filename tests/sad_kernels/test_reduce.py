"""Rows to the mean, the count and the sums: one launch, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sad_kernels._triton.reduce import BLOCK, reduced
from sad_kernels._triton.rows import PARTS

IGNORED = -100


def rows(N: int) -> tuple[Tensor, Tensor, Tensor]:
    loss, parts = torch.randn(N) + 3, torch.randn(PARTS, N)
    labels = torch.randint(-1, 50, (N,))
    return loss, parts, labels.where(labels >= 0, IGNORED)


@pytest.mark.parametrize("N", [0, 1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 77])
@pytest.mark.parametrize("items", [None, 0.0, 7.0])
def test_triton_sums_of_rows(N: int, items: float | None) -> None:
    loss, parts, labels = rows(N)
    given = None if items is None else torch.tensor(items)
    count = int((labels != IGNORED).sum())
    divisor = max(count if items is None else items, 1)
    mean, by, num_tokens, *sums, lse = reduced(loss, parts, labels, IGNORED, given)
    assert by == divisor and num_tokens == count
    # Lanes of N / BLOCK numbers and a tree over them: far below torch's N roundings of the worst.
    close = {"rtol": 2e-6, "atol": 2e-6 * max(N, 1) ** 0.5}
    torch.testing.assert_close(mean.double(), loss.double().sum() / divisor, **close)
    torch.testing.assert_close(torch.stack(sums).double(), parts[:-1].double().sum(1), **close)
    assert torch.equal(lse, parts[-1])


def test_triton_sums_without_labels_count_every_row() -> None:
    loss, parts, _ = rows(BLOCK + 5)
    result = reduced(loss, parts, None, IGNORED)
    assert result.divisor == len(loss) and result.num_tokens == len(loss)


def test_triton_items_of_any_dtype_divide() -> None:
    for dtype in (torch.int64, torch.int32, torch.float32, torch.bfloat16):
        assert reduced(*rows(9), IGNORED, torch.tensor(12, dtype=dtype)).divisor == 12


def test_triton_not_a_number_stays_one() -> None:
    loss, parts, labels = rows(BLOCK + 3)
    loss[-1] = torch.nan
    mean, _, *sums, _ = reduced(loss, parts, labels, IGNORED)
    assert mean.isnan() and not torch.stack(sums).isnan().any()


def test_triton_strided_rows_are_read_as_they_are() -> None:
    loss, parts, labels = rows(50)
    apart = loss.repeat_interleave(2)[::2], parts.T.contiguous().T, labels.repeat_interleave(2)[::2]
    pairs = zip(reduced(loss, parts, labels, IGNORED), reduced(*apart, IGNORED), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
