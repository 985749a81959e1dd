"""The project's performance targets beside what was measured: met, or missed and why.

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

from bench.table import is_ours

Json = dict[str, Any]

TILES = "2026-11-27-nvidia-h200-7b5919f1-tiles.json"
CEILINGS = "2026-11-27-nvidia-h200-7b5919f1-ceilings.json"
COUNTERS = "2026-11-27-nvidia-h200-7b5919f1-counters.json"
LINEAR = "2026-11-27-nvidia-h200-d4aee6fb-quick.json"
LOGITS = "2026-11-26-nvidia-h200-12c902ba-quick.json"  # losses of logits beside their peers
CPU = "2026-12-02-cpu-intel-r-xeon-r-processor-5cb1e7e6.json"
BATCHES = "2026-11-27-nvidia-h200-7b5919f1-batches.json"
END_TO_END_GPU = "2026-11-27-nvidia-h200-d4aee6fb-end-to-end.json"
END_TO_END_GKD = "2026-11-26-nvidia-h100-80gb-hbm3-cb757926-end-to-end.json"  # TRL's trainer too
STRUCTURE_GPU = "2026-11-26-nvidia-h100-80gb-hbm3-14fd661f-structure.json"
AVERAGES = {  # on a CPU, times eager PyTorch: limits for few large tensors and for many small ones
    "ema/update": (1.4, 1.0),
    "ema/swap": (6.0, 4.5),
}
FEW = 12  # tensors
PRODUCTS_ON_CPU = {"linear_kd/jsd": 2.4}  # times the bare products in bf16; others 2.1
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
    "linear_ce": "linear CE",
    "linear_kd/forward_kl": "linear forward KL",
    "linear_kd/reverse_kl": "linear reverse KL",
    "linear_kd/jsd": "linear JSD",
    "linear_kd/joint": "linear CE + KL",
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
WIDTH = 4096  # D_s
PRODUCTS = {  # both directions, times the bare products, at this width
    "linear_ce": 1.12,
    "linear_kd/forward_kl": 1.15,
    "linear_kd/joint": 1.15,
    "linear_kd/jsd": 1.15,
}
WHY = {
    "ids": "calls on a block's K ids are too small to be shared out: other threads wait for them",
    "averages": "every pair is checked before any is written to, and the calls for a tensor take "
    "longer than the work on a small one",
    "top_k": "{columns:.1f} instructions per column, where CE + KL takes {alone:.1f} a side, in "
    "{issue:.0f} % of the issue slots; `merge` takes {merge:.0f} % more",
    "linear": "fp32 logits go through memory three times beside the products, and fp32 sums of "
    "dweight once per chunk: with `chunk_bytes` of 2 GiB it takes {less:.0f} % less, in {mib:,.0f} "
    "MiB beyond inputs and gradients",
    "peers": "the host takes longer than the kernels, and shows: in a CUDA graph {graph:.2f}",
    "rows": "programs of few rows wait for memory one after the other, beside {others:.0f} "
    "microseconds of other kernels; an eager call waits for the host, {eager:.0f} times as long",
    "float32": "the bare products of a step alone take {products:.2f} of naive autograd's time on "
    "this processor",
    "bfloat16": "the bare products of a step alone take {products:.2f} of naive autograd's time on "
    "this processor, once in 16 bits; ours are made in two parts, and worked on in fp32",
    "on_cpu": "every logit is read and written some twenty times beside the products",
}


class Target(NamedTuple):
    """One target, which is met if ``measured`` is at most ``limit``."""

    what: str
    limit: float
    measured: float
    source: str  # of the number, in bench/results
    why: str = ""  # the reason, if it is missed

    @property
    def met(self) -> bool:
        return self.measured <= self.limit

    @property
    def verdict(self) -> str:
        if self.met:
            return "met"
        return f"**missed**: {self.why}" if self.why else "**missed**"


def targets(results: Path) -> Iterator[Target]:
    """All targets, with the measurements from the files in ``results``."""
    ceilings = _read(results / CEILINGS)
    yield from _rows(_read(results / TILES), _read(results / COUNTERS))
    yield from _few_rows_and_ema(ceilings)
    yield from _logits(_read(results / LOGITS))
    yield from _linear(_read(results / LINEAR), ceilings)
    yield from _torch_path(_read(results / "loss.json"), _read(results / "overhead.json"))
    yield from _outcomes(_read(results / "outcomes.json"))
    yield from _top_k_step(_read(results / "topk_step.json"))
    yield from _cache_reading(_read(results / "cache_reading.json"))
    cpu = _read(results / CPU)
    yield from _losses_on_cpu(cpu)
    yield from _averages_on_cpu(cpu)


def _read(path: Path) -> Json:
    return json.loads(path.read_text())


def _rows(record: Json, counters: Json) -> Iterator[Target]:
    """The row kernels by themselves, over a copy of the bytes that they must move.

    ``statistics`` is the forward pass, with a mixture's second kernel in it.
    """
    ratios = {
        (row["loss"], row["kernel"]): row["ratio_copy"]
        for row in record["rows"]
        if not row["tile"] and row["dtype"] == "bfloat16"
    }
    for loss, limits in ROWS.items():
        for kernel, name, limit in zip(
            ("statistics", "gradient"), ("forward", "backward"), limits, strict=True
        ):
            why = _why_top_k(counters) if loss == "top_k" else ""
            yield Target(f"{NAMES[loss]}, {name}", limit, ratios[loss, kernel], TILES, why)


def _why_top_k(counters: Json) -> str:
    seen = {(row["loss"], row["kernel"].removesuffix("_kernel")): row for row in counters["rows"]}
    top_k, merge = seen["top_k", "statistics"], seen["top_k", "merge"]
    return WHY["top_k"].format(
        columns=top_k["instructions_per_column"],
        alone=seen["joint T=2", "statistics"]["instructions_per_column"] / 2,
        issue=top_k["issue_percent"],
        merge=100 * merge["ms"] / top_k["ms"],
    )


def _few_rows_and_ema(record: Json) -> Iterator[Target]:
    """Losses of 256 rows in a CUDA graph, and the moving averages."""
    for row in record["few_rows"]:
        what = f"{NAMES[row['loss']]}, {row['rows']} rows, both directions in a CUDA graph"
        work = ("statistics_kernel", "gradient_kernel")
        why = WHY["rows"].format(
            others=sum(k["us"] for k in row["kernels"] if k["kernel"] not in work),
            eager=row["eager_ms"] / row["graph_ms"],
        )
        yield Target(what, 1.5, row["ratio"], CEILINGS, why)
    for row in record["ema"]:
        if row["block"] is None and row["hint"]:
            what = f"EMA {row['what']}, 10^9 bf16 parameters"
            yield Target(what, 1.10, row["ratio"], CEILINGS)


def _logits(record: Json) -> Iterator[Target]:
    """Losses of 8192 rows of logits, called eagerly, over the fastest peer."""
    for case, name in (("ce", "cross-entropy"), ("kd/forward_kl", "forward KL")):
        rows = {r["peer"]: r for r in record["rows"] if r["case"] == case and r["status"] == "ok"}
        ours = rows.pop("ours")
        fastest = _fastest(rows)
        ratio = ours["ms"]["full"][1] / rows[fastest]["ms"]["full"][1]
        graphs = ours.get("graph_ms"), rows[fastest].get("graph_ms")
        why = WHY["peers"].format(graph=graphs[0] / graphs[1]) if all(graphs) else ""
        yield Target(f"{name}, over the fastest peer ({fastest})", 1.0, ratio, LOGITS, why)


def _linear(record: Json, ceilings: Json) -> Iterator[Target]:
    """Losses from hidden states: over their bare products and in memory at the width that these
    targets are set for, and over the fastest peer at every shape."""
    for (case, D), of_case in _by_shape(record).items():
        name, limit = NAMES.get(case, case), PRODUCTS.get(case)
        ours = of_case.pop("ours")
        gradients = ours["gradient_mib"]
        if limit is not None and D == WIDTH:
            why = _why_linear(ceilings, "ce" if case == "linear_ce" else "joint", gradients)
            what = f"{name}, over its bare products"
            yield Target(what, limit, ours["ratio_gemm"], LINEAR, why)
            what = f"{name}, GiB beyond inputs and gradients"
            yield Target(what, 4.0, (ours["peak_mib"] - gradients) / 1024, LINEAR)
        if all(map(is_ours, of_case)):
            continue
        fastest = _fastest(of_case)
        ratio = ours["ms"]["full"][1] / of_case[fastest]["ms"]["full"][1]
        dweight = of_case[fastest]["err"]["dweight"] / ours["err"]["dweight"]
        why = f"{fastest} keeps 16-bit logits, and its dweight is {dweight:.1f} times as far off"
        what = f"{name}, D_s = {D}, over the fastest peer ({fastest})"
        yield Target(what, 1.0, ratio, LINEAR, why)


def _fastest(rows: Json) -> str:
    """The peer that takes the least time, ours in other settings left out."""
    return min(
        (peer for peer in rows if not is_ours(peer)),
        key=lambda peer: rows[peer]["ms"]["full"][1],
    )


def _by_shape(record: Json) -> dict[tuple[str, int], dict[str, Json]]:
    """Case and D_s -> peer -> its row, of those that gave a right result."""
    found: dict[tuple[str, int], dict[str, Json]] = {}
    for row in record["rows"]:
        if row["status"] == "ok" and "ms" in row and row["case"].startswith("linear"):
            found.setdefault((row["case"], row["shape"]["D_s"]), {})[row["peer"]] = row
    return found


def _why_linear(ceilings: Json, loss: str, gradients: float) -> str:
    of_bytes = {row["chunk_bytes"]: row for row in ceilings["chunks"] if row["loss"] == loss}
    default, twice = of_bytes[1 << 30], of_bytes[1 << 31]
    less = 100 * (1 - twice["ms"] / default["ms"])
    return WHY["linear"].format(less=less, mib=twice["peak_mib"] - gradients)


def _torch_path(loss: Json, overhead: Json) -> Iterator[Target]:
    """The torch path over naive autograd on a CPU, and the trainer over a bare step."""
    for row, limits in zip(loss["rows"], ((0.35, 1 / 8), (0.4, 1 / 6)), strict=True):
        what = f"CE + KL from hidden states on a CPU, {row['dtype']}, over naive autograd"
        why = WHY[row["dtype"]].format(products=row["products_ratio"])
        yield Target(f"{what}: time", limits[0], row["time_ratio"], "loss.json", why)
        yield Target(f"{what}: memory", limits[1], row["memory_ratio"], "loss.json")
    ratio = 1 + overhead["overhead"]
    yield Target("a step of the trainer, over the bare step", 1.05, ratio, "overhead.json")


def _outcomes(record: Json) -> Iterator[Target]:
    """The joint loss from hidden states, of two tokenizers' outcomes over that of columns."""
    for row in record["rows"]:
        tokens, dtype = row["shape"]["N"], row["dtype"]
        what = f"CE + KL of outcomes on a CPU, {tokens} tokens in {dtype}, {row['tables']}"
        yield Target(f"{what}, over that of columns", 1.3, row["ratio"], "outcomes.json")


def _top_k_step(record: Json) -> Iterator[Target]:
    """A training step towards K ids per token, over one without a teacher."""
    names = {"top_k": "a top-k teacher in memory", "cached": "a sampled cache on disk"}
    for row in record["rows"]:
        if row["what"] == "step":
            threads = "one thread" if row["threads"] == 1 else f"{row['threads']} threads"
            for arm, ratio in row["ratio"].items():
                what = f"a step towards {names[arm]}, K = {record['K']}, over CE alone, {threads}"
                yield Target(what, 1.15, ratio, "topk_step.json", WHY["ids"])


def _cache_reading(record: Json) -> Iterator[Target]:
    """Reading a teacher's cache faster than a step on two cores takes it."""
    for row in record["rows"]:
        if row["cache"] == "cold" and row["what"].startswith("sampled"):
            seconds = 50_000 / row["tokens_per_second"]
            what = f"seconds to read 50,000 tokens of a cold cache: {row['what']}"
            yield Target(what, 1.0, seconds, "cache_reading.json")


def _losses_on_cpu(record: Json) -> Iterator[Target]:
    """The torch path over its bare products, over eager PyTorch and over torch's own linear CE."""
    found: dict[tuple[str, str, int], dict[str, Json]] = {}
    for row in record["rows"]:
        if row["status"] == "ok" and "ms" in row and "N" in row["shape"]:
            case = row["case"], row["dtype"], row["shape"]["N"]
            found.setdefault(case, {})[row["peer"]] = row
    over_eager = {}
    for (case, dtype, N), peers in found.items():
        ours, name = peers["ours"], NAMES.get(case, case)
        what = f"{name} on a CPU, {N} tokens in {dtype}"
        if "eager" in peers:
            over_eager[what] = ours["ms"]["full"][1] / peers["eager"]["ms"]["full"][1]
        if case.startswith("linear") and dtype == "bfloat16" and N == 256:
            limit = PRODUCTS_ON_CPU.get(case, 2.1)
            what_ratio = f"{what}, over its bare products"
            yield Target(what_ratio, limit, ours["ratio_gemm"], CPU, WHY["on_cpu"])
        for peer in ("torch chunked", "torch chunked 2048"):
            if peer in peers:
                ratio = ours["ms"]["full"][1] / peers[peer]["ms"]["full"][1]
                over = f"{what}, over F.linear_cross_entropy ({peer})"
                yield Target(over, 1.0, ratio, CPU, WHY["on_cpu"])
    worst = max(over_eager, key=over_eager.__getitem__)
    what = f"every loss on a CPU over eager PyTorch, the slowest: {worst}"
    yield Target(what, 1.0, over_eager[worst], CPU, WHY["on_cpu"])


def _averages_on_cpu(record: Json) -> Iterator[Target]:
    """Moving averages over ``torch._foreach``, where a record has compared the two in each round.

    A swap there copies the parameters first, which takes their memory once more.
    """
    for row in record["rows"]:
        if row["case"] in AVERAGES and row["peer"] == "ours" and row.get("ratio_eager"):
            tensors, name = row["shape"]["tensors"], row["case"].removeprefix("ema/")
            limit = AVERAGES[row["case"]][tensors > FEW]
            what = f"EMA {name} of {tensors} tensors on a CPU, over torch._foreach"
            yield Target(what, limit, row["ratio_eager"], CPU, WHY["averages"])


def table(results: Path) -> list[str]:
    """Markdown: how many are met, and a line for each."""
    found = list(targets(results))
    met = sum(t.met for t in found)
    lines = [f"{met} of {len(found)} are met.", ""]
    lines += ["| what | on | target | measured | |", "|-|-|-|-|-|"]
    for t in found:
        card = _read(results / t.source)["machine"]["gpu"] or "CPU"
        card = next((name for name in ("H200", "H100") if name in card), card)
        lines.append(f"| {t.what} | {card} | {t.limit:.3g} | {t.measured:.3g} | {t.verdict} |")
    return lines
