"""Measurements of many pieces, each in a process of its own, that an interruption does not lose.

A piece is a named tuple of strings and numbers that its module can measure when run as
``python -m MODULE '[...]'``, with one thread each: what is compared is quality, not speed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

Json = dict[str, Any]
P = TypeVar("P", bound=tuple[Any, ...])


def measure_pieces(
    pieces: Sequence[P],
    run: Callable[[P], Json],
    folder: Path,
    *,
    wanted: Callable[[P], bool] = lambda _: True,
    keep: Callable[[dict[P, Json]], None] = lambda _: None,
) -> dict[P, Json]:
    """The records of ``pieces``: those that lie in ``folder``, and those ``wanted`` that do not.

    ``run`` measures a piece; ``keep`` receives all that is known after each. A piece that fails
    does not stop the others; its error is raised at the end.
    """
    folder.mkdir(exist_ok=True)
    kept = {piece: piece_file(folder, piece) for piece in pieces}
    found = {piece: json.loads(path.read_text()) for piece, path in kept.items() if path.exists()}
    missing = [piece for piece in pieces if piece not in found and wanted(piece)]
    failures = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        started = {pool.submit(run, piece): piece for piece in missing}
        for done in as_completed(started):
            piece = started[done]
            name = " ".join(map(str, piece))
            if error := done.exception():
                failures.append(error)
                print(name, error, flush=True)
                continue
            found[piece] = done.result()
            kept[piece].write_text(json.dumps(found[piece]))
            print(name, json.dumps(found[piece])[:200], flush=True)
            keep(found)
    if failures:
        raise failures[0]
    return found


def in_subprocess(module: str, piece: Sequence[Any], threads: int = 1) -> Json:
    """One piece in a process of its own."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    command = [sys.executable, "-m", module, json.dumps(piece)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"a run must finish, got {done.stderr[-2000:]} for {piece}")
    return json.loads(done.stdout.splitlines()[-1])


def piece_file(folder: Path, piece: Sequence[Any]) -> Path:
    return folder / (re.sub(r"\W+", "-", " ".join(map(str, piece))) + ".json")


def commit_folder(case: str) -> Path:
    """Where the pieces of a case lie that this commit has measured."""
    from bench import record

    commit = record.run("")["commit"][:8] or "nocommit"
    return Path(tempfile.gettempdir()) / f"sad-{case}-{commit}"
