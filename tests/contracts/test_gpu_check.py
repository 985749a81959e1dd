"""The scripts for a GPU run, though what they are for needs one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
LINEAR = SCRIPT.with_name("gpu_linear.sh")


def run(out: Path, script: Path = SCRIPT, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable} | more
    return subprocess.run(
        ["bash", script, out], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs triton")
@pytest.mark.parametrize(
    ("where", "cases"),
    [
        ("tests/sad_kernels/test_linear.py", "linear_ce ema"),
        pytest.param("tests/sad_kernels", "", marks=pytest.mark.slow),
    ],
    ids=["one file, some cases", "all"],
)
def test_every_step_runs_and_is_reported(tmp_path: Path, where: str, cases: str) -> None:
    done = run(tmp_path, FAKE="1", BENCH_SECONDS="60", KERNEL_TESTS=where, BENCH_CASES=cases)
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
    assert not cases or {row["case"] for row in rows} == {"linear_ce", "ema/update", "ema/swap"}


@pytest.mark.few(1)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", [SCRIPT, LINEAR], ids=lambda script: script.name)
def test_without_a_gpu_it_says_so(tmp_path: Path, script: Path) -> None:
    done = run(tmp_path, script)
    assert done.returncode == 1
    assert f"error: {script.name} must run where torch sees a GPU" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs triton")
@pytest.mark.parametrize(
    "steps",
    [
        "compact peers",
        pytest.param("compact tests peers logits shapes", marks=pytest.mark.slow),
    ],
)
def test_linear_losses_are_measured_and_measured_on(tmp_path: Path, steps: str) -> None:
    words = {"FAKE": "1", "PEERS": "ours,ours compact", "STEPS": steps}
    words |= {"KERNEL_TESTS": "tests/sad_kernels/test_linear.py"}
    done = run(tmp_path, LINEAR, **words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "finished before" not in done.stdout
    assert json.loads((tmp_path / "compact.json").read_text())["limits"]
    names = {path.stem for path in tmp_path.glob("*.json")} - {"compact"}
    assert "peers" in names and len(names) == (4 if "shapes" in steps else 1)
    for name in names - {"compact"}:
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        ours = [row["status"] for row in rows if row["peer"] == "ours"]
        assert ours and set(ours) == {"ok"}, name
    # As if one case of the peers had found no time: that alone is measured.
    path = tmp_path / "peers.json"
    record = json.loads(path.read_text())
    first = next(row for row in record["rows"] if row["peer"] == "ours")
    first |= {"status": "skipped", "reason": "no time was left"}
    path.write_text(json.dumps(record))
    again = run(tmp_path, LINEAR, **words)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    left_out = {line.split(":")[0] for line in again.stdout.splitlines() if "finished" in line}
    assert len(left_out) == len(names) + ("tests" in steps) and "== peers" not in left_out
    log = (tmp_path / "peers.log").read_text()
    assert log.count(": kept\n") == len({(r["case"], str(r["shape"])) for r in record["rows"]}) - 1
    rows = json.loads(path.read_text())["rows"]
    assert {row["status"] for row in rows if row["peer"] == "ours"} == {"ok"}


def test_an_unknown_step_is_an_error_of_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, LINEAR, FAKE="1", STEPS="compct")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "STEPS must be among compact tests peers" in done.stderr and "got compct" in done.stderr


@pytest.mark.slow
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
