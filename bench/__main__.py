"""``python -m bench CASE``: measure, print, and keep the numbers under ``bench/results/``.

loss         time and memory of linear_distill_loss against naive autograd
overhead     what the trainer adds to a step
quickstart   what distillation gains in the quickstart, over three seeds (about ten minutes)
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from sad.versions import library_versions

CASES = ("loss", "overhead", "quickstart")
RESULTS = Path(__file__).parent / "results"


def main(case: str) -> None:
    result = importlib.import_module(f"bench.{case}").measure()
    record = {"schema": 1, "run": _run(case), "machine": _machine(), "versions": library_versions()}
    record |= result
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{case}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"-> {path}")


def _run(case: str) -> dict[str, object]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    command = f"python -m bench {case}"
    return {"utc": now, "commit": commit, "dirty": bool(changes), "command": command}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


if __name__ == "__main__":
    if sys.argv[1:2] not in [[case] for case in CASES]:
        sys.exit(__doc__)
    main(sys.argv[1])
