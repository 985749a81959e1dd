"""CPU time before any work begins: imports, help texts, a plan.

Each is a process of its own, on one thread. What counts is the processor's time, user and system,
which depends less on what else the machine does than time on the clock. ``import torch`` and
``import transformers`` stand beside ours for what no command that needs them can save.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from typing import Any

COMMANDS = (
    ("-c", "import sad"),
    ("-c", "import sad_kernels"),
    ("-c", "from sad_kernels import *"),
    ("-c", "import torch"),
    ("-c", "from transformers import PreTrainedModel"),
    ("-m", "sad", "--help"),
    ("-m", "sad", "--version"),
    ("-m", "sad", "distill", "--help"),
    ("-m", "sad", "plan", "--help"),
    ("-m", "sad", "plan", "quickstart"),
)


def measure(rounds: int = 3) -> dict[str, Any]:
    """Seconds of CPU time of every command, in each round; one more before warms the disk's cache.

    Raises ``CalledProcessError`` for a command that fails.
    """
    times: dict[str, list[float]] = {_name(command): [] for command in COMMANDS}
    for _ in range(rounds + 1):
        for command in COMMANDS:
            times[_name(command)].append(_cpu_seconds(command))
    rows = [
        {"command": name, "cpu_seconds": min(values[1:]), "rounds": values[1:]}
        for name, values in times.items()
    ]
    return {"case": "startup", "rows": rows}


def _name(command: tuple[str, ...]) -> str:
    return " ".join(command[1:])


def _cpu_seconds(command: tuple[str, ...]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
