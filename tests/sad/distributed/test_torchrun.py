"""Runs that a real ``torchrun`` starts, and what becomes of them when a process fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.rank_runs import Material

from sad.checkpoint.store import checkpoints_of, latest_checkpoint
from sad.config.schema import config_to_yaml
from sad.report.log import read_log

ROOT = Path(__file__).resolve().parents[3]

PROCESS = """
import os, signal, sys, time
from sad.report import page
from sad.training import run
from sad.training.trainer import Trainer

page._draw_plots = lambda run_dir: None
run.predicted_peak = lambda *_: None
window, rank, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
closing = Trainer._close_window


def close(self, *, empty):
    if self.counters.global_step == window and self.world.rank == rank:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "stop":
            os.kill(os.getpid(), signal.SIGUSR1)
        elif what == "hang":
            time.sleep(1000)
        elif what == "fail":
            raise ArithmeticError("a fault of one process")
    closing(self, empty=empty)
    if what == "slow":
        time.sleep(0.5)


Trainer._close_window = close
from sad.cli import main

sys.exit(main(["distill", *sys.argv[4:]]))
"""


def torchrun(tmp_path: Path, config: Path, *words: object, processes: int = 2) -> list[str]:
    """The command of a run to which something happens: window, rank and what."""
    entry = tmp_path / "entry.py"
    entry.write_text(PROCESS)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    place = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    window, rank, what, *keys = map(str, words)
    return [*launcher, *place, str(entry), window, rank, what, str(config), *keys]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)


@pytest.fixture
def config(material: Material, tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(config_to_yaml(material.config("kd", tmp_path / "run")))
    return file


def status(tmp_path: Path) -> dict[str, object]:
    return json.loads((tmp_path / "run" / "status.json").read_text())


@pytest.mark.slow
def test_a_process_is_killed_and_the_run_goes_on(config: Path, tmp_path: Path) -> None:
    ended = run(torchrun(tmp_path, config, 4, 1, "kill"))
    assert ended.returncode == 1  # torchrun's own
    assert status(tmp_path)["code"] == 76
    (line,) = (text for text in ended.stderr.splitlines() if "sad: error" in text)
    assert "a rank was lost" in line and "SIGKILL" in ended.stderr
    assert latest_checkpoint(tmp_path / "run") is not None
    again = run(torchrun(tmp_path, config, 0, 9, "-", "--resume_from_checkpoint", "auto"))
    assert again.returncode == 0, again.stderr
    assert status(tmp_path)["state"] == "finished"
    steps = [r["global_step"] for r in read_log(tmp_path / "run") if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


MISTAKEN = """
import os, sys, time
from sad.cli import main

if os.environ["RANK"] == "0":
    time.sleep(float(sys.argv[1]))
    sys.exit(main(["distill", *sys.argv[2].split()]))
sys.exit(main(["distill", "quickstart", "--learning_rat", "3"]))
"""


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("delay", "first"), [(1, "quickstart --learning_rat 3"), (1000, "quickstart")]
)
def test_a_mistake_is_said_once_by_one_process(tmp_path: Path, delay: int, first: str) -> None:
    """The first process is late to the mistake of all, or has made none."""
    entry = tmp_path / "mistaken.py"
    entry.write_text(MISTAKEN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3"]
    place = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    ended = run([*launcher, *place, str(entry), str(delay), first])
    assert ended.returncode == 1
    (line,) = (text for text in ended.stderr.splitlines() if "sad: error" in text)
    assert "unknown key 'learning_rat'" in line


@pytest.mark.slow
def test_a_fault_of_one_process_is_printed_by_it(config: Path, tmp_path: Path) -> None:
    ended = run(torchrun(tmp_path, config, 3, 1, "fail"))
    assert ended.returncode == 1
    assert "this is a bug in sad, got ArithmeticError: a fault of one process" in ended.stderr
    assert status(tmp_path)["code"] == 76


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up(config: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    ended = run(torchrun(tmp_path, config, 3, 1, "hang", "--ddp_timeout", "6"))
    assert ended.returncode == 1 and time.monotonic() - begin < 200
    assert status(tmp_path)["code"] == 76


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(config: Path, tmp_path: Path) -> None:
    ended = run(torchrun(tmp_path, config, 3, 1, "stop"))
    assert ended.returncode == 1
    assert (status(tmp_path)["state"], status(tmp_path)["code"]) == ("stopped", 75)
    assert f"{status(tmp_path)['checkpoint']}" == checkpoints_of(tmp_path / "run")[0].name


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_all(config: Path, tmp_path: Path) -> None:
    command = torchrun(tmp_path, config, 0, 9, "slow", "--max_steps", "200")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not checkpoints_of(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    assert (status(tmp_path)["state"], status(tmp_path)["code"]) == ("stopped", 75)
