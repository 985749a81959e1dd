"""``scripts/gpu_check.sh`` runs, though what it is for needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"


def run(out: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable} | more
    return subprocess.run(
        ["bash", SCRIPT, out], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs triton")
@pytest.mark.parametrize(
    "where",
    ["tests/sad_kernels/test_linear.py", pytest.param("tests/sad_kernels", marks=pytest.mark.slow)],
)
def test_every_step_runs_and_is_reported(tmp_path: Path, where: str) -> None:
    done = run(tmp_path, FAKE="1", BENCH_SECONDS="60", KERNEL_TESTS=where)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {step["name"]: step["exit_status"] for step in report["steps"]} == {
        "bench": 0,
        "gpu": 0,
        "kernels": 0,
    }
    assert report["tests"]["kernels"]["number"] > 0
    assert not report["tests"]["kernels"]["failures"]
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    ours = [row["status"] for row in rows if row["peer"] == "ours"]
    assert ours and set(ours) == {"ok"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "must run where torch sees a GPU" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs triton")
@pytest.mark.parametrize(
    "tools", ["memcheck", pytest.param("memcheck racecheck initcheck", marks=pytest.mark.slow)]
)
def test_what_the_sanitizer_runs_launches_every_kernel(tmp_path: Path, tools: str) -> None:
    """By a stand-in for compute-sanitizer, which runs its command without looking."""
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text('#!/usr/bin/env bash\nwhile [[ "$1" == --* ]]; do\n    case "$1" in\n'
                        '    --tool | --target-processes | --error-exitcode) '
                        'shift 2 ;;\n    *) exit 3 ;;\n    esac\ndone\nexec "$@"\n')  # fmt: skip
    stand_in.chmod(0o755)
    script, out = SCRIPT.with_name("gpu_sanitize.sh"), tmp_path / "out"
    words = {"PYTHON": sys.executable, "TOOLS": tools, "FAKE": "1"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", script, out], env=os.environ | words | path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for log in ("compile", *tools.split()):
        assert "losses with their gradients" in (out / f"sanitize-{log}.log").read_text()
