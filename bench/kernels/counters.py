"""Hardware counters of the row kernels, by Nsight Compute: what each of them waits for.

``ncu`` runs this module once more, with the calls below, and reads for every launch: time, bytes to
and from memory against those that must move, hits in the L2, how busy the exponential units (XU)
and the issue slots are, instructions per column, and how many warps are resident. It needs a GPU
whose counters may be read. Clocks are left as they are.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from typing import Any

import torch

from bench.kernels import tiles
from bench.kernels.tiles import LOSSES, N, V

Json = dict[str, Any]

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "lts__t_sectors_op_read.sum": "l2_reads",
    "lts__t_sectors_op_read_lookup_hit.sum": "l2_hits",
    "smsp__inst_executed.sum": "instructions",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "xu_percent",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
    "launch__registers_per_thread": "registers",
}
KERNELS = "statistics_kernel|mixture_kernel|merge_kernel|gradient_kernel"
WARP = 32


def measure() -> Json:
    """One line for each launch of each loss of ``bench.kernels.tiles``, in bf16, table's tiles."""
    ncu = shutil.which("ncu")
    if ncu is None or not torch.cuda.is_available():
        raise SystemExit("error: the case counters must find a GPU and ncu on the path, got none")
    words = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    words += ["--metrics", ",".join(METRICS), "-k", f"regex:{KERNELS}"]
    run = [*words, sys.executable, "-m", "bench.kernels.counters"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: ncu must read the counters, got {done.stdout[-800:]}")
    labels = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ours ")]
    rows = parsed(done.stdout)
    named = [
        {"loss": " ".join(words)} | row
        for words, part in zip(labels, _by_loss(rows, len(labels)), strict=True)
        for row in part
    ]
    return {"case": "counters", "shape": {"N": N, "V": V}, "rows": named}


def table(result: Json) -> list[str]:
    """Markdown: a line for each launch that takes time."""
    lines = [
        "| | kernel | ms | GB read | hits in the L2 | instructions per column | issue slots used "
        "| exponential units | warps resident | registers |",
        "|-|-|-|-|-|-|-|-|-|-|",
    ]
    loss = ""
    for row in result["rows"]:
        if row["kernel"] == "merge_kernel":
            continue
        first, loss = row["loss"] != loss, row["loss"]
        cells = [
            loss if first else "",
            row["kernel"].removesuffix("_kernel"),
            f"{row['ms']:.2f}",
            f"{row['read_gb']:.2f}",
            f"{row['l2_hit_percent']:.1f} %",
            f"{row['instructions_per_column']:.1f}",
            *(f"{row[f'{name}_percent']:.0f} %" for name in ("issue", "xu", "warps")),
            f"{row['registers']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def parsed(text: str) -> list[Json]:
    """The launches in ``ncu``'s table, whose second line holds units; other lines are the run's."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.DictReader(io.StringIO("\n".join(lines))))[1:]
    return [_row(line) for line in table]


def _row(line: dict[str, str]) -> Json:
    n = {name: float(line[metric].replace(",", "")) for metric, name in METRICS.items()}
    return {
        "kernel": line["Kernel Name"],
        "ms": n["ns"] / 1e6,
        "read_gb": n["read"] / 1e9,
        "written_gb": n["written"] / 1e9,
        "l2_hit_percent": 100 * n["l2_hits"] / max(n["l2_reads"], 1),
        "instructions_per_column": n["instructions"] * WARP / (N * V),
        **{name: n[name] for name in n if name.endswith("_percent") or name == "registers"},
    }


def _by_loss(rows: list[Json], losses: int) -> list[list[Json]]:
    """Each loss starts with ``statistics`` and ends with ``gradient``."""
    parts: list[list[Json]] = []
    for row in rows:
        if row["kernel"] == "statistics_kernel":
            parts.append([])
        parts[-1].append(row)
    if len(parts) != losses:
        raise SystemExit(f"error: ncu must show {losses} losses, got {len(parts)}")
    return parts


def _call_once() -> None:
    """Each loss forward and backward, without autograd; a line for each names it."""
    calls = tiles.calls(torch.device("cuda"), torch.bfloat16)
    for loss in LOSSES:
        print("ours", loss.name, flush=True)
        forward, gradient = calls(loss)
        gradient(forward())
    torch.cuda.synchronize()


if __name__ == "__main__":
    _call_once()
