"""What the profiler prints becomes numbers; the counters themselves need a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from bench.kernels import counters


def line(kernel: str, ns: str, instructions: str) -> list[str]:
    values = [ns, "2,000,000", "0", "100", "25", instructions, "50", "90", "37.5", "80"]
    return [kernel, *values]


def printed(*lines: list[str]) -> str:
    head = ["Kernel Name", *counters.METRICS]
    units = ["", "ns", "byte", "byte", "sector", "sector", "inst", "%", "%", "%", "register/thread"]
    table = [",".join(f'"{cell}"' for cell in row) for row in (head, units, *lines)]
    return "\n".join(["==PROF== Connected", "ours kl", *table, "==PROF== Disconnected"])


def test_launches_are_parsed() -> None:
    columns = counters.N * counters.V
    text = printed(line("statistics_kernel", "1,500,000", str(columns)))
    (row,) = counters.parsed(text)
    assert row["kernel"] == "statistics_kernel" and row["ms"] == 1.5
    assert row["read_gb"] == 0.002 and row["l2_hit_percent"] == 25
    assert row["instructions_per_column"] == counters.WARP and row["registers"] == 80


def test_launches_belong_to_the_loss_that_they_begin() -> None:
    kernels = ("statistics_kernel", "merge_kernel", "gradient_kernel", "statistics_kernel")
    rows = counters.parsed(printed(*(line(kernel, "1", "1") for kernel in kernels)))
    assert [len(part) for part in counters._by_loss(rows, 2)] == [3, 1]
    with pytest.raises(SystemExit, match="3 losses, got 2"):
        counters._by_loss(rows, 3)
