"""The tables of all READMEs, written from the committed JSON under bench/results alone.

``python -m bench --readme`` rewrites what stands between ``<!-- name:begin -->`` and
``<!-- name:end -->``, and draws the plots. A test compares what stands there with the JSON: a
number that was edited by hand, or left behind by a new measurement, fails it.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import faults, table
from bench.kernels import ceilings, counters
from bench.record import RESULTS
from bench.report import overview, targets
from bench.training import (
    ablation,
    batches,
    cache_reading,
    cross_tokenizer,
    end_to_end,
    on_policy,
    teachers,
)
from bench.training import structural_cost as structure

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
DOCUMENTS = tuple(
    ROOT / name for name in ("README.md", "kernels/README.md", "sad/README.md", "bench/README.md")
)
"""Files with generated blocks. A block may stand in several of them."""
BLOCK = re.compile(r"(<!-- (?P<name>\w+):begin -->\n).*?(<!-- (?P=name):end -->)", re.DOTALL)
PLOTS = RESULTS / "plots"
PLOT_NAMES = {
    "memory_tokens": "memory against tokens",
    "memory_vocab": "memory against the vocabulary",
    "time_rows": "time against tokens",
    "error_chunks": "error against the number of chunks",
    "largest_batch": "largest batch that fits a memory limit",
}
KERNELS = {
    "gpu": targets.LINEAR,
    "gpu logits": targets.LOGITS,
    "cpu": targets.CPU,
}
"""Which records of the kernel benchmark the documents show."""


def rewrite() -> list[Path]:
    """Draw the plots, and bring every document up to date; return what was written."""
    from bench.report import plots

    changed = plots.draw(read(RESULTS, "curves.json"), None, PLOTS)
    changed += plots.draw(None, read(RESULTS, KERNELS["gpu"]), PLOTS / "gpu")
    changed += overview.draw(read(RESULTS, KERNELS["gpu"]), targets.WIDTH, PLOTS)
    for path in DOCUMENTS:
        before = path.read_text()
        after = rendered(before)
        if after != before:
            path.write_text(after)
            changed.append(path)
    return changed


def rendered(text: str, results: Path = RESULTS) -> str:
    """``text`` with every block written anew from the JSON; ``KeyError`` for an unknown block."""

    def block(found: re.Match[str]) -> str:
        lines = SECTIONS[found["name"]](results)
        return "\n".join([found[1].rstrip("\n"), *lines, found[3]])

    return BLOCK.sub(block, text)


def read(results: Path, name: str) -> Json:
    return json.loads((results / name).read_text())


TABLES: dict[str, Callable[[Json], list[str]]] = {
    "ablation": ablation.table,
    "batches": batches.table,
    "cache_reading": cache_reading.table,
    "ceilings": ceilings.table,
    "counters": counters.table,
    "cross_tokenizer": cross_tokenizer.table,
    "end_to_end": end_to_end.table,
    "faults": faults.table,
    "on_policy": on_policy.table,
    "structure": structure.table,
    "teachers": teachers.table,
}


def text_of(source: str, file: str | None = None) -> Callable[[Path], list[str]]:
    """A block written by the measurement's own module, from its JSON (``source.json``)."""
    name = file or f"{source}.json"

    def block(results: Path) -> list[str]:
        result = read(results, name)
        about = _measured(result, name, result["run"]["command"])
        return [about, "", *TABLES[source](result), ""]

    return block


# --- Blocks ---------------------------------------------------------------------------------------


def comparison(results: Path) -> list[str]:
    """The table that the READMEs open with."""
    record = read(results, KERNELS["gpu"])
    about = _measured(record, KERNELS["gpu"], record["run"]["command"])
    return [*overview.table(record, targets.WIDTH), "", about, ""]


def quickstart(results: Path) -> list[str]:
    result = read(results, "quickstart.json")
    minutes, gib = max(result["seconds"]) / 60, result["peak_rss_mib"] / 1024
    return [
        *_gain("held-out text", result),
        "",
        "`python -m bench quickstart` measures this (`bench/results/quickstart.json`): both",
        "students start from the same weights and see the same batches for 400 steps. A run took",
        f"at most {minutes:.1f} minutes and {gib:.1f} GiB on {result['machine']['threads']} cores.",
    ]


def quickstart_instruct(results: Path) -> list[str]:
    """The gain of distillation on completions."""
    name = "quickstart_instruct.json"
    result = read(results, name)
    about = _measured(result, name, result["run"]["command"])
    return [about, "", *_gain("bodies of held-out functions", result), ""]


def campaign(results: Path) -> list[str]:
    """What was inflicted on whole runs, and what was lost."""
    return [*campaign_table(read(results, "campaign.json").values()), ""]


def campaign_table(parts: Iterable[Json]) -> list[str]:
    lines = ["| promise | inflicted | survived | lost or wrong |", "|-|-|-|-|"]
    for part in parts:
        counts = (f"{part[key]:,}" for key in ("inflicted", "survived", "lost"))
        lines.append(_line([part["text"], *counts]))
    return lines


def _gain(what: str, result: Json) -> list[str]:
    lines = [
        f"| {what}, mean of three seeds (lowest to highest) | parameters | perplexity "
        "| KL to the teacher | same top token as the teacher |",
        "|-|-|-|-|-|",
    ]
    for row in result["table"]:
        cells = [row["name"], f"{row['parameters'] / 1e6:.1f} M"]
        cells.append(_mean(row["perplexity"], "{:.1f}"))
        cells.append(_mean(row.get("kl"), "{:.2f}"))
        cells.append(_mean(row.get("agreement"), "{:.1f}", 100, " %"))
        lines.append(_line(cells))
    return lines


def loss(results: Path) -> list[str]:
    result = read(results, "loss.json")
    rounds = result["rounds"]
    lines = [
        "| | eager | linear_distill_loss | ratio of times, median (range) of "
        f"{rounds} rounds | memory beyond inputs, eager | linear_distill_loss |",
        "|-|-|-|-|-|-|",
    ]
    for row in result["rows"]:
        naive, ours = (statistics.median(row["seconds"][way]) for way in ("naive", "ours"))
        low, high = row["time_ratio_range"]
        ratio = f"{row['time_ratio']:.2f} ({low:.2f} to {high:.2f})"
        memory = [f"{row['extra_bytes'][way] / 2**20:,.0f} MiB" for way in ("naive", "ours")]
        lines.append(_line([row["dtype"], f"{naive:.2f} s", f"{ours:.2f} s", ratio, *memory]))
    return [
        *lines,
        "",
        "`python -m bench loss` measures this (`bench/results/loss.json`), both in turn in one",
        "process. In bf16 the naive loss rounds its logits to 8 bits; this one keeps 16, by a",
        "second product of what the first has rounded off.",
    ]


def of_kernels(which: str, cases: Callable[[Json], bool]) -> Callable[[Path], list[str]]:
    """A block with a table for each case that ``cases`` accepts, from the kernel benchmark."""

    def block(results: Path) -> list[str]:
        record = read(results, KERNELS[which])
        rows, others = table.measured(row for row in record["rows"] if cases(row))
        about = _measured(record, KERNELS[which], record["run"]["command"])
        lines = [f"{about} Forward and backward."]
        for title, of_case in groupby(rows, key=table.title_of):
            lines += ["", f"**{title}**", "", *kernel_table(list(of_case))]
        if others:
            lines += ["", f"No time was left for {'; '.join(others)}."]
        return [*lines, ""]

    return block


def kernel_table(rows: list[Json]) -> list[str]:
    """One case: ours, then the others by time; wrong results struck out; absent peers below."""
    of_products = any(row.get("ratio_gemm") for row in rows)
    unit = "bare products" if of_products else "copy of the bytes"
    lines = [f"| | ms | over the {unit} | MiB beyond the inputs | errors |", "|-|-|-|-|-|"]
    timed = [row for row in rows if row.get("ms")]
    for row in sorted(timed, key=lambda r: (r["peer"] != "ours", r["ms"]["full"][1])):
        ms, ratio = table.number(row["ms"]["full"][1], 3), _ratio(row)
        if row["status"] == "wrong":
            ms, ratio = f"~~{ms}~~ wrong", f"~~{ratio}~~"
        peer = f"**{row['peer']}**" if row["peer"] == "ours" else row["peer"]
        memory = table.number(row.get("peak_mib"), 4)
        lines.append(_line([peer, ms, ratio, memory, table.errors(row)]))
    absent: dict[str, list[str]] = {}
    for row in rows:
        if not row.get("ms"):
            absent.setdefault(_reason(row), []).append(row["peer"])
    return [*lines, *(_absent(absent) if absent else [])]


def _absent(reasons: dict[str, list[str]]) -> list[str]:
    return ["", "Not here: " + "; ".join(f"{', '.join(p)} ({why})" for why, p in reasons.items())]


def _reason(row: Json) -> str:
    failed = "fails: " if row["status"] == "failed" else ""
    return failed + (row["reason"] or "no time").rstrip(".")


def _ratio(row: Json) -> str:
    return table.number(row.get("ratio_gemm") or row.get("ratio_copy"), 3) + "x"


def curves(results: Path) -> list[str]:
    """The plots of ``curves.json``, each with an alternative text."""
    result = read(results, "curves.json")
    lines = [_measured(result, "curves.json", "python -m bench curves"), ""]
    for name in dict.fromkeys(curve["name"] for curve in result["curves"]):
        lines += [f"![{PLOT_NAMES[name]}](results/plots/{name}.png)", ""]
    return lines


def _measured(record: Json, file: str, command: str) -> str:
    machine, run, versions = record["machine"], record["run"], record["versions"]
    gpu = machine["gpu"]
    where = gpu or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{where}, torch {versions['torch']}"
        + (f", triton {versions['triton']}" if gpu else "")
        + f", {run['utc'][:10]}, commit {run['commit'][:8]}: `{command}` (`bench/results/{file}`)."
    )


def _mean(values: Json | None, form: str, factor: float = 1.0, unit: str = "") -> str:
    """The mean, and the range of the seeds if they differ."""
    if values is None:
        return "-"
    mean, low, high = (
        form.format(factor * x)
        for x in (values["mean"], min(values["seeds"]), max(values["seeds"]))
    )
    return f"{mean}{unit}" if low == high else f"{mean}{unit} ({low} to {high})"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _is_linear(row: Json) -> bool:
    return row["case"].startswith("linear")


SECTIONS: dict[str, Callable[[Path], list[str]]] = {
    "comparison": comparison,
    "quickstart": quickstart,
    "quickstart_instruct": quickstart_instruct,
    "campaign": campaign,
    "loss": loss,
    "targets": targets.table,
    "faults": text_of("faults"),
    "end_to_end": text_of("end_to_end"),
    "end_to_end_gpu": text_of("end_to_end", targets.END_TO_END_GPU),
    "end_to_end_gkd": text_of("end_to_end", targets.END_TO_END_GKD),
    "batches": text_of("batches", targets.BATCHES),
    "ablation": text_of("ablation"),
    "teachers": text_of("teachers"),
    "cross_tokenizer": text_of("cross_tokenizer"),
    "on_policy": text_of("on_policy"),
    "cache_reading": text_of("cache_reading"),
    "structure_gpu": text_of("structure", targets.STRUCTURE_GPU),
    "counters": text_of("counters", targets.COUNTERS),
    "ceilings": text_of("ceilings", targets.CEILINGS),
    "curves": curves,
    "gpu": of_kernels("gpu", _is_linear),
    "gpu_logits": of_kernels("gpu logits", lambda row: not _is_linear(row)),
    "cpu": of_kernels("cpu", lambda row: True),
}
