"""``sad distill``'s loop against other trainers: tokens per second, peak memory, final quality.

All contenders train the same student from the same weights against the same teacher, on the same
batches in the same order, for equally many steps, with the same objective (cross-entropy and
forward KL at temperature 1), fused AdamW, schedule and clipping:

* sad's loop with its fused loss, as ``sad distill`` runs it;
* sad's loop with a naive loss, which holds both models' logits: the gain of the fused loss;
* ``transformers.Trainer`` with the ``compute_loss`` of the usual recipe;
* TRL's trainers, as far as they can be given these batches.

EMA, evaluation, checkpoints and preflight checks are off for all. What a loop does at each step
stays on: sad's counts targets, checks gradients for non-finite values and sums up loss and accuracy
(with the naive loss: the loss). All log every tenth step. Rows hold one document each, because not
every trainer isolates packed documents.

On a CPU the vocabulary is Qwen's and the models are small. The teacher is the quickstart's, which
was trained on the same kind of text; its head is widened to the large vocabulary by rows for unused
ids, fitted to almost no probability. Quality is the KL to the teacher and the NLL on held-out text,
computed from whole fp32 logits by the same code for all. The training is short: quality shows
whether all reach the same, not how good a student gets. A round's seed draws the
student's weights and the order of the rows: contenders differ within a round by rounding, and by
noise from round to round. On a GPU the shapes are those of Qwen3 0.6B and 4B, weights are random,
and only time and memory count.

Each run is a subprocess; every second round takes the contenders in reverse. The peak is the
process's maximum from its first step on: resident memory on a CPU, with libraries, and what torch
has allocated on a GPU. ``start_mib`` is the value just before. Tokens are all that
the student reads, whether they have a target or not.

The result of an interrupted measurement has the same fields: medians and lists cover the finished
rounds, and contenders that were not reached have no row.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from typing import Any

import torch

from bench.training.task import CPU, GPU, Setup, distill_config
from bench.training.trainers import CONTENDERS, NAIVE, Run, named

__all__ = ["measure", "table"]

SETTINGS = (
    "learning_rate lr_scheduler_type warmup_steps min_lr_ratio weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm packing use_ema logging_steps"
).split()


def measure(
    setup: Setup | None = None,
    run: Callable[[Setup, str, int], Run] | None = None,
    *,
    rounds: int | None = None,
    only: Sequence[str] = (),
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """All rounds of all contenders, or of those that ``only`` selects by command-line words.

    ``run`` makes one run, by default in a subprocess; ``keep`` receives the record so far after
    each.
    """
    setup, run = setup or (GPU if torch.cuda.is_available() else CPU), run or run_in_subprocess
    setup = setup if rounds is None else replace(setup, rounds=rounds)
    if setup.rounds < 1:
        raise SystemExit(f"error: --rounds must be at least 1, got {setup.rounds}; ask for more")
    names = named(only)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for round_ in range(setup.rounds):
        for name in reversed(names) if round_ % 2 else names:
            skipped = runs[name] and runs[name][-1]["status"] == "skipped"  # would be skipped again
            runs[name].append(runs[name][-1] if skipped else run(setup, name, round_))
            keep(_result(setup, runs))
    return _result(setup, runs)


def _result(setup: Setup, runs: dict[str, list[Run]]) -> dict[str, Any]:
    config = distill_config(setup, seed=0)
    about = {
        "settings": {key: getattr(config, key) for key in SETTINGS} | vars(config.objective()),
        "packages": {name: _version(name) for name in ("transformers", "accelerate", "trl")},
    }
    return {
        "case": "end to end",
        "setup": asdict(setup) | about,
        "contenders": list(runs),
        "rows": [_row(name, runs) for name in runs if runs[name]],
    }


def table(result: dict[str, Any]) -> list[str]:
    """Markdown table of the result, with notes on noise, missing rounds and failures."""
    rows = {row["contender"]: row for row in result["rows"]}
    naive = rows[NAIVE]["tokens_per_s"] if NAIVE in rows else None
    lines = [
        "| trainer | tokens/s (naive loss = 1) | peak MiB (before the first step) "
        "| held-out KL, NLL |",
        "|---|---:|---:|---:|",
    ]
    for name, row in rows.items():
        if row["tokens_per_s"] is None:
            lines.append(f"| {name} | {row['status']} | - | - |")
            continue
        ratio = f" ({row['tokens_per_s'] / naive:.2f})" if naive else ""
        memory = f"{row['peak_mib']:,.0f} ({row['start_mib']:,.0f})"
        kl, nll = row["quality"]["kl"], row["quality"]["nll"]
        scores = "-" if kl is None else f"{kl:.4f}, {nll:.4f}"
        lines.append(f"| {name} | {row['tokens_per_s']:,.0f}{ratio} | {memory} | {scores} |")
    missing = [f"{n}: {row['reason']}." for n, row in rows.items() if row["status"] != "ok"]
    notes = [*_noise(list(rows.values())), *_incomplete(result), *missing]
    return [*lines, "", *notes] if notes else lines


def _noise(rows: list[Run]) -> list[str]:
    scored = [row["quality"] for row in rows if row["quality"].get("kl") is not None]
    if len(scored) < 2:
        return []
    first, apart = rows[0]["contender"], max(quality["kl_apart"] for quality in scored)
    text = f"In one round the held-out KL of each trainer is that of {first} to {apart:.1e}"
    noise = max(max(quality["kl_rounds"]) - min(quality["kl_rounds"]) for quality in scored)
    several = any(len(quality["kl_rounds"]) > 1 for quality in scored)
    return [text + (f"; with other seeds, in other rounds, to {noise:.1e}." if several else ".")]


def _incomplete(result: dict[str, Any]) -> list[str]:
    """A note on the number of finished rounds per contender, unless all are finished."""
    rows, asked = {row["contender"]: row for row in result["rows"]}, result["setup"]["rounds"]
    done = {
        name: len(rows[name].get("tokens_per_s_rounds", ())) if name in rows else 0
        for name in result.get("contenders", rows)
        if name not in rows or rows[name]["status"] != "skipped"
    }
    if set(done.values()) <= {asked}:
        return []
    counts = "; ".join(f"{name}: {count}" for name, count in done.items())
    return [f"Of {asked} rounds there are: {counts}."]


def _row(name: str, runs: dict[str, list[Run]]) -> Run:
    """The row of a contender: medians, every round's numbers, and the reason of a failure.

    Quality is compared with the first contender's, usually ours, in the same round.
    """
    first = next(iter(runs))
    rounds, ours = runs[name], runs[first][: len(runs[name])]
    row = {"contender": name, "what": CONTENDERS[name].what, "status": "ok", "reason": None}
    numbers = ("tokens_per_s", "peak_mib", "start_mib")
    row |= {key: None for key in numbers} | {"quality": {"kl": None, "nll": None}}
    bad = next((run for run in rounds if run["status"] != "ok"), None)
    if bad is not None:
        row |= {"status": bad["status"], "reason": bad["reason"]}
    both = zip_longest(rounds, ours, fillvalue={})
    pairs = [(run, our) for run, our in both if run["status"] == "ok"]
    if not pairs:
        return row
    # Times and quality are comparable only if all read the same tokens in the same order.
    if any(run["witness"] != our.get("witness", run["witness"]) for run, our in pairs):
        return row | {"status": "failed", "reason": f"read other tokens than {first}"}
    for key in numbers:
        values = [run[key] for run, _ in pairs]
        row |= {key: statistics.median(values), f"{key}_rounds": values}
    quality: Run = {
        "loss_first": statistics.median(run["losses"][0] for run, _ in pairs),
        "loss_last": statistics.median(run["losses"][-1] for run, _ in pairs),
        "losses_rounds": [run["losses"] for run, _ in pairs],
        "kl": None,
        "nll": None,
    }
    for key in ("kl", "nll", "teacher_nll"):
        values = [run[key] for run, _ in pairs if key in run]
        if values:
            quality |= {key: statistics.median(values), f"{key}_rounds": values}
            quality[f"{key}_apart"] = max(abs(a[key] - b.get(key, a[key])) for a, b in pairs)
    return row | {"quality": quality}


def run_in_subprocess(setup: Setup, name: str, seed: int) -> Run:
    """``trainers.attempt`` in a subprocess with the setup's threads and one GPU."""
    words = [
        sys.executable,
        "-m",
        "bench.training.one_run",
        json.dumps(asdict(setup)),
        name,
        str(seed),
    ]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[
        0
    ]  # transformers would use all of them
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=1800, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"status": "failed", "reason": f"{type(error).__name__} of its process"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = "".join(done.stderr.splitlines()[-1:])
    return {"status": "failed", "reason": f"its process ended with {done.returncode}: {last[:200]}"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
