"""What a result needs beside its numbers: who measured, with what, on which machine, when.

A record is one JSON file: ``schema`` 1; ``run`` (utc, commit, dirty, command); ``machine``, with
what changes as [start, end]; ``versions``; ``settings``; ``floors`` (kind copy or gemm, shape, ms,
rate, when); ``notes``; and ``rows``, one for every case and peer. A row says what was asked (case,
shape, dtype, options, ignored, upstream), of whom (peer, call, settings, package), how it went
(status ok, wrong, failed or skipped, and the reason), and, as far as that went: ``ms`` of full,
forward, backward and no_grad as [p20, p50, p80], ``calls``, ``graph_ms``, ``host_us``,
``compile_s`` (the first call), ``gb_s`` or ``tflop_s`` at the least bytes or FLOP, ``ratio_copy``
or ``ratio_gemm`` (full over the floor), ``ratio_graph`` (a replay over it), ``ratio_eager``,
``peak_mib`` beyond the inputs with the ``gradient_mib`` that it returns, ``rss_mib``, and ``err``:
of the loss in nats and relative, of each gradient ``|g - truth| / |truth|``. For a figure that
could not be had there is ``..._reason``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.peers import PACKAGES
from sad.checkpoint.atomic_files import write_atomic

RESULTS = Path(__file__).parent / "results"
QUERY = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "sm_mhz": "clocks.sm",
    "sm_mhz_max": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
}
THROTTLED = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""What holds the clocks back, by its name in new and in old drivers."""


def run(command: str) -> dict[str, Any]:
    copied = os.environ.get("COMMIT")  # of a copy whose git, if it has one, knows no better
    commit = copied or _said("git", "rev-parse", "HEAD")
    changes = "" if copied else _said("git", "status", "--porcelain")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"utc": now, "commit": commit, "dirty": bool(changes), "command": command}


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gpu": None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "cuda": torch.version.cuda or torch.version.hip,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
        }
    return found


def gpu_state(device: torch.device) -> dict[str, str]:
    """Clocks, power and what holds them back, as nvidia-smi reads them now."""
    if device.type != "cuda":
        return {}
    found = dict(zip(QUERY, _nvidia_smi(*QUERY.values()), strict=False))
    reasons = next(filter(None, map(_nvidia_smi, THROTTLED)), None)
    return found | ({"throttled_by": reasons[0]} if found and reasons else {})


def _nvidia_smi(*fields: str) -> list[str]:
    """Values of the first GPU; none if one of the fields is unknown."""
    query = f"--query-gpu={','.join(fields)}"
    lines = _said("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()
    return lines[0].split(", ") if lines else []


def states(start: dict[str, str], end: dict[str, str]) -> dict[str, Any]:
    """What may change as a pair, the rest once."""
    fixed = ("driver", "power_limit_w", "sm_mhz_max")
    return {name: start[name] if name in fixed else [start[name], end.get(name)] for name in start}


def versions() -> dict[str, str | None]:
    """Of Python and every package that takes part; null for one that is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def path_for(record: dict[str, Any]) -> Path:
    """``2026-11-26-nvidia-h100-80gb-hbm3-1a2b3c4d.json``, or ``...-quick.json``"""
    day, commit = record["run"]["utc"][:10], record["run"]["commit"][:8] or "nocommit"
    device = record["machine"]["gpu"] or f"cpu {record['machine']['cpu']}"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    words = record["run"]["command"].split()
    sets = ["quick"] if "--quick" in words else []
    return RESULTS / ("-".join([day, slug, commit, *sets]) + ".json")


def write(record: dict[str, Any], path: Path) -> None:
    """Whole or not at all: a run that is killed leaves what it had before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(_plain(record), indent=1) + "\n")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON does not have, and with few digits."""
    match value:
        case dict():
            return {k: _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
        case float():
            return float(f"{value:.5g}") if abs(value) < float("inf") else str(value)
        case _:
            return value


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
