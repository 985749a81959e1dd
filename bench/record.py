"""Benchmark records: the JSON format, and the machine, versions and commit of a run.

A record is one JSON file: ``schema`` 1; ``run`` (utc, commit, dirty, command; ``resumed``, the utc
of the runs that it continues); ``machine``, with
what changes as [start, end]; ``versions``; ``settings``; ``floors`` (the measured rooflines: kind
copy or gemm, shape, ms, rate, when); ``notes``; and ``rows``, one for every case and peer. A row
holds the case (case, shape, dtype, options, ignored, upstream), the peer (peer, call, settings,
package), the outcome (status ok, wrong, failed or skipped, and the reason), and what was measured:
``ms`` of full, forward, backward and no_grad as [p20, p50, p80], ``calls``, ``graph_ms``,
``host_us``, ``compile_s`` (the first call), ``gb_s`` or ``tflop_s`` at the least bytes or FLOP,
``ratio_copy`` or ``ratio_gemm`` (full over the roofline's time), ``ratio_graph`` (a CUDA graph's
replay over it), ``ratio_eager`` (over eager PyTorch, which for a moving average is
``torch._foreach``), ``peak_mib`` beyond the inputs with the ``gradient_mib`` that it returns,
``rss_mib``, and ``err``: of the loss in nats and relative, of each gradient
``|g - truth| / |truth|``. A figure that could not be measured is replaced by ``..._reason``.
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

from bench.peers import packages
from bench.problems.cases import Case
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
"""nvidia-smi's field for the reasons of clock throttling, in new and in old drivers."""


def run(command: str) -> dict[str, Any]:
    """The time, the commit (``dirty``: with uncommitted changes) and the command of a run."""
    copied = os.environ.get("COMMIT")  # set where this is a copy without the repository
    commit = copied or _output_of("git", "rev-parse", "HEAD")
    changes = "" if copied else _output_of("git", "status", "--porcelain")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"utc": now, "commit": commit, "dirty": bool(changes), "command": command}


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and software that do not change during a run."""
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
    """Current clocks, power and throttling reasons, from nvidia-smi; empty without a GPU."""
    if device.type != "cuda":
        return {}
    found = dict(zip(QUERY, _nvidia_smi(*QUERY.values()), strict=False))
    reasons = next(filter(None, map(_nvidia_smi, THROTTLED)), None)
    return found | ({"throttled_by": reasons[0]} if found and reasons else {})


def _nvidia_smi(*fields: str) -> list[str]:
    """The fields' values for the first GPU; empty if the driver does not know one of them."""
    query = f"--query-gpu={','.join(fields)}"
    lines = _output_of("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()
    return lines[0].split(", ") if lines else []


def states(start: dict[str, str], end: dict[str, str]) -> dict[str, Any]:
    """Merge the GPU's states: what may change as [start, end], what cannot as one value."""
    fixed = ("driver", "power_limit_w", "sm_mhz_max")
    return {name: start[name] if name in fixed else [start[name], end.get(name)] for name in start}


def versions() -> dict[str, str | None]:
    """The versions of Python and of every peer's package; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def same_case(row: dict[str, Any], case: Case) -> bool:
    """Whether a row of a record belongs to a case."""
    expected = json.loads(json.dumps(_json_value(case.record)))
    return all(row.get(name) == value for name, value in expected.items())


def path_for(record: dict[str, Any]) -> Path:
    """Default file of a record, such as ``2026-11-26-nvidia-h100-80gb-hbm3-1a2b3c4d.json``."""
    day, commit = record["run"]["utc"][:10], record["run"]["commit"][:8] or "nocommit"
    device = record["machine"]["gpu"] or f"cpu {record['machine']['cpu']}"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    command = record["run"]["command"]
    sets = ["quick"] if "--quick" in command.split() else []
    sets += [  # of one's own, not to replace a run of the sets
        found[1].replace(",", "-")
        for option in ("shape", "dtype")
        if (found := re.search(rf"--{option}[ =](\S+)", command))
    ]
    return RESULTS / ("-".join([day, slug, commit, *sets]) + ".json")


def earlier(path: Path, run: dict[str, Any], gpu: str | None) -> dict[str, Any] | None:
    """The record in a file, if the same commit and command have written it on the same card."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    same = all(found["run"][name] == run[name] for name in ("commit", "command"))
    return found if same and found["machine"]["gpu"] == gpu else None


def write(record: dict[str, Any], path: Path) -> None:
    """Write atomically: a run that is killed leaves the previous version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(_json_value(record), indent=1) + "\n")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _json_value(value: Any) -> Any:
    """Round floats to five digits; NaN and infinity, which JSON lacks, become strings."""
    match value:
        case dict():
            return {k: _json_value(v) for k, v in value.items()}
        case list() | tuple():
            return [_json_value(v) for v in value]
        case float():
            return float(f"{value:.5g}") if abs(value) < float("inf") else str(value)
        case _:
            return value


def _output_of(*command: str) -> str:
    """The command's standard output; empty if it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
