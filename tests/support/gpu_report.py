"""Summary of a ``scripts/gpu_check.sh`` run as one JSON file: machine, versions, steps, tests.

    python tests/support/gpu_report.py OUTDIR

reads the ``*.step`` and JUnit files in the folder, writes ``gpu_check.json`` beside them, and exits
with 1 if a step did not exit with 0.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


def main(out: Path) -> None:
    report = {
        "gpu": output_of(
            "nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv"
        ),
        "commit": os.environ.get("COMMIT") or output_of("git", "rev-parse", "HEAD"),
        "versions": versions(),
        "steps": [step(path) for path in sorted(out.glob("*.step"))],
        "tests": {path.stem: tests(path) for path in sorted(out.glob("*.xml"))},
    }
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(any(step["exit_status"] for step in report["steps"]))


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def step(path: Path) -> dict[str, Any]:
    name, status, seconds, limit = path.read_text().split()
    return {
        "name": name,
        "exit_status": int(status),
        "timed_out": status in ("124", "137"),
        "seconds": int(seconds),
        "limit_seconds": int(limit),
    }


def tests(path: Path) -> dict[str, Any]:
    """Counts, failures, skip reasons and recorded properties of a JUnit file."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failures = {
        name(case): problem.get("message", "")[:2000]
        for case in cases
        for problem in (*case.findall("failure"), *case.findall("error"))
    }
    skipped = Counter(
        reason.get("message", "") for case in cases for reason in case.findall("skipped")
    )
    measured = {
        name(case): {p.get("name"): p.get("value") for p in case.iter("property")}
        for case in cases
        if case.find("properties") is not None
    }
    return {
        "number": len(cases),
        "seconds": sum(float(case.get("time", 0)) for case in cases),
        "failures": failures,
        "skipped": skipped,
        "measured": measured,
    }


def name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
