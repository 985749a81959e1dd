"""Peak resident memory of one call, in a fresh process: it includes what torch does not allocate.

A tiny call warms up libraries and threads. Then the kernel's high-water mark of the process is
reset, which only ``/proc/self/clear_refs`` can do, and read again after the call.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.kernels.timing import Unmeasurable, one_line
from bench.problems.cases import LossCase
from bench.problems.inputs import Parameters, draw


def extra_mib(case: LossCase, peer: str) -> float:
    """MiB by which a call raises resident memory; ``Unmeasurable`` if its process fails."""
    words = [sys.executable, "-m", "bench.kernels.rss", json.dumps(asdict(case)), peer]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unmeasurable(one_line(error)) from error
    return float(done.stdout.split()[-1])


def main(case: LossCase, peer_name: str) -> None:
    from bench.kernels.check import step_of
    from bench.peers import for_case

    torch.set_num_threads(2)
    peer = next(p for p in for_case(case) if p.name == peer_name)
    steps = []
    for each in (case.small(), case):
        problem = draw(each, torch.device("cpu"))
        assert not isinstance(problem, Parameters)
        steps.append(step_of(peer, problem))
    warm_up, step = steps
    warm_up.prepare()
    warm_up()
    step.prepare()
    Path("/proc/self/clear_refs").write_text("5")
    before = _kib("VmRSS")
    step()
    print((_kib("VmHWM") - before) / 1024)


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main(LossCase(**json.loads(sys.argv[1])), sys.argv[2])
