"""The targets that the project set itself, each beside what was measured: met, or missed and why.

A limit is a ratio to what the same machine measured in the same run: the copy of the bytes that
must be moved, the bare matrix products, naive autograd, the bare training step. They were set for
an H200, on which all but the last of the GPU's are measured; an H100 has the same arithmetic and
3.0 TB/s for 4.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Json = dict[str, Any]

TILES = "2026-11-26-nvidia-h200-12c902ba-tiles.json"
CEILINGS = "2026-11-26-nvidia-h200-12c902ba-ceilings.json"
COUNTERS = "2026-11-26-nvidia-h200-12c902ba-counters.json"
LINEAR = "2026-11-26-nvidia-h200-12c902ba-quick.json"
LINEAR_BEFORE = "2026-11-26-nvidia-h100-80gb-hbm3-84afa542-quick.json"  # of what is not in it
END_TO_END_GPU = "2026-11-26-nvidia-h100-80gb-hbm3-cb757926-end-to-end.json"
STRUCTURE_GPU = "2026-11-26-nvidia-h100-80gb-hbm3-14fd661f-structure.json"
NAMES = {
    "ce": "cross-entropy",
    "kl": "forward KL",
    "joint T=1": "CE + KL, T = 1",
    "joint T=2": "CE + KL, T = 2",
    "joint T=2.7": "CE + KL, T = 2.7",
    "mixed T=2": "CE + KL to a mixture of both, T = 2",
    "jsd": "JSD",
    "skew_forward_kl": "forward skew",
    "skew_reverse_kl": "reverse skew",
    "top_k": "top-k teacher, K = 64",
}
ROWS = {  # forward and backward limits, times the bytes that must be moved
    "ce": (1.10, 1.12),
    "kl": (1.15, 1.15),
    "joint T=1": (1.15, 1.15),
    "joint T=2": (1.15, 1.15),
    "joint T=2.7": (1.15, 1.15),
    "mixed T=2": (1.15, 1.15),
    "jsd": (1.20, 1.15),
    "skew_forward_kl": (1.20, 1.15),
    "skew_reverse_kl": (1.20, 1.15),
    "top_k": (1.25, 1.25),
}
PRODUCTS = {  # both directions, times the bare products
    "linear_ce": ("linear CE", 1.12),
    "linear_kd/forward_kl": ("linear forward KL", 1.15),
    "linear_kd/joint": ("linear CE + KL", 1.15),
}
WHY = {
    "top_k": "75 registers leave 23 warps per multiprocessor, which fill three quarters of the "
    "issue slots; 0.04 ms more are `merge`, which reads the K logits one by one",
    "linear": "fp32 logits go through memory three times beside the products, and fp32 sums of "
    "dweight once per chunk: with `chunk_bytes` of 2 GiB it takes {less:.0f} % less",
    "rows": "six small kernels count the labels and take the mean, beside three that do the work; "
    "an eager call waits for the host, 20 times as long",
    "bf16": "a CPU has no bf16 product with an fp32 result, and bf16 logits are refused",
}


class Target(NamedTuple):
    """``measured`` should be at most ``limit``."""

    what: str
    limit: float
    measured: float
    source: str  # of the number, in bench/results
    why: str = ""  # it is missed

    @property
    def met(self) -> bool:
        return self.measured <= self.limit

    @property
    def verdict(self) -> str:
        if self.met:
            return "met"
        return f"**missed**: {self.why}" if self.why else "**missed**"


def targets(results: Path) -> Iterator[Target]:
    """All of them, from the files in ``results``."""
    ceilings = _read(results / CEILINGS)
    yield from _rows(_read(results / TILES))
    yield from _few_rows_and_ema(ceilings)
    yield from _linear(_read(results / LINEAR), LINEAR, ceilings)
    before = _read(results / LINEAR_BEFORE)
    yield from _linear(before, LINEAR_BEFORE, ceilings, ("linear_kd/joint",))
    yield from _torch_path(_read(results / "loss.json"), _read(results / "overhead.json"))


def _read(path: Path) -> Json:
    return json.loads(path.read_text())


def _rows(record: Json) -> Iterator[Target]:
    """Launchers alone: ``statistics`` is the forward pass, with ``terms`` in it for a mixture."""
    ratios = {
        (row["loss"], row["kernel"]): row["ratio_copy"]
        for row in record["rows"]
        if not row["tile"] and row["dtype"] == "bfloat16"
    }
    for loss, limits in ROWS.items():
        for kernel, name, limit in zip(
            ("statistics", "gradient"), ("forward", "backward"), limits, strict=True
        ):
            why = WHY.get(loss, "")
            yield Target(f"{NAMES[loss]}, {name}", limit, ratios[loss, kernel], TILES, why)


def _few_rows_and_ema(record: Json) -> Iterator[Target]:
    for row in record["few_rows"]:
        what = f"{NAMES[row['loss']]}, {row['rows']} rows, both directions in a CUDA graph"
        yield Target(what, 1.5, row["ratio"], CEILINGS, WHY["rows"])
    for row in record["ema"]:
        if row["block"] is None and row["hint"]:
            what = f"EMA {row['what']}, 10^9 bf16 parameters"
            yield Target(what, 1.10, row["ratio"], CEILINGS)


def _linear(
    record: Json,
    source: str,
    ceilings: Json,
    cases: tuple[str, ...] = ("linear_ce", "linear_kd/forward_kl"),
) -> Iterator[Target]:
    rows = [r for r in record["rows"] if r["status"] == "ok" and "ms" in r]
    ms = {(row["loss"], row["chunk_bytes"]): row["ms"] for row in ceilings["chunks"]}
    for case in cases:
        name, limit = PRODUCTS[case]
        of_case = {r["peer"]: r for r in rows if r["case"] == case}
        ours = of_case.pop("ours")
        loss = "ce" if case == "linear_ce" else "joint"
        why = WHY["linear"].format(less=100 * (1 - ms[loss, 1 << 31] / ms[loss, 1 << 30]))
        yield Target(f"{name}, over its bare products", limit, ours["ratio_gemm"], source, why)
        fastest = min(of_case, key=lambda peer: of_case[peer]["ms"]["full"][1])
        ratio = ours["ms"]["full"][1] / of_case[fastest]["ms"]["full"][1]
        dweight = of_case[fastest]["err"]["dweight"] / ours["err"]["dweight"]
        why = f"{fastest} keeps 16-bit logits, and its dweight is {dweight:.1f} times as far off"
        yield Target(f"{name}, over the fastest peer ({fastest})", 1.0, ratio, source, why)
        shape = ours["shape"]
        allowed = 1024 + 4 * shape["V"] * shape["D_s"] / 2**20  # chunk_bytes, fp32 sums of dweight
        extra = ours["peak_mib"] - ours["gradient_mib"]
        what = f"{name}, memory over chunk_bytes and fp32 sums of dweight"
        yield Target(what, 1.0, extra / allowed, source)


def _torch_path(loss: Json, overhead: Json) -> Iterator[Target]:
    for row, limit in zip(loss["rows"], (0.6, 0.4), strict=True):
        what = f"CE + KL from hidden states on a CPU, {row['dtype']}, over naive autograd"
        yield Target(f"{what}: time", limit, row["time_ratio"], "loss.json", WHY["bf16"])
        yield Target(f"{what}: memory", 1 / 8, row["memory_ratio"], "loss.json")
    ratio = 1 + overhead["overhead"]
    yield Target("a step of the trainer, over the bare step", 1.05, ratio, "overhead.json")


def table(results: Path) -> list[str]:
    """Markdown, one line for each."""
    lines = ["| what | on | target | measured | |", "|-|-|-|-|-|"]
    for t in targets(results):
        card = _read(results / t.source)["machine"]["gpu"] or "CPU"
        card = next((name for name in ("H200", "H100") if name in card), card)
        lines.append(f"| {t.what} | {card} | {t.limit:.3g} | {t.measured:.3g} | {t.verdict} |")
    return lines
