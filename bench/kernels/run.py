"""The kernel benchmark: measure all cases, and write the record after each of them.

A run that is stopped, or whose GPU fails, so leaves the results of the cases before.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import record, table
from bench.kernels import measure, roofline
from bench.kernels.entry import NO_TIME, Effort
from bench.kernels.timing import Cpu, Device, DeviceLost, Gpu, one_line
from bench.problems.cases import Case, EmaCase

Record = dict[str, Any]
LOST = "was lost"


def run(
    chosen: Sequence[Case],
    device: Device,
    effort: Effort,
    command: str,
    path: Path | None,
    resume: bool = False,
) -> tuple[Record, Path]:
    """Measure the cases and write the record; a lost GPU ends the run with a note.

    With ``resume`` the cases stay that the same command has finished in an earlier run.
    """
    settings = {
        "rounds": effort.rounds,
        "calls": effort.calls,
        "liger": os.environ.get("LIGER_KERNEL_BACKEND"),
    }
    result: Record = {
        "schema": 1,
        "run": record.run(command),
        "machine": record.machine(device.device),
        "versions": record.versions(),
        "settings": settings,
        "floors": [],
        "rows": [],
        "notes": [],
    }
    path = path or record.path_for(result)
    earlier = record.earlier(path, result["run"], result["machine"]["gpu"]) if resume else None
    if earlier is not None:
        utc = [*earlier["run"].get("resumed", []), earlier["run"]["utc"]]
        result["run"]["resumed"] = utc
        result["floors"] = earlier["floors"]
        result["notes"] = [note for note in earlier["notes"] if LOST not in note]
    before, load = record.gpu_state(device.device), os.getloadavg()[0]
    try:
        _measure_all(chosen, device, effort, result, path, earlier)
    except DeviceLost as error:
        result["notes"].append(f"the GPU {LOST}, and with it all that was to come: {error}")
    result["machine"] |= record.states(before, record.gpu_state(device.device))
    result["machine"]["load"] = [load, os.getloadavg()[0]]
    record.write(result, path)
    return result, path


def _measure_all(
    chosen: Sequence[Case],
    device: Device,
    effort: Effort,
    result: Record,
    path: Path,
    earlier: Record | None,
) -> None:
    start = roofline.copy_roofline(device, "start")
    result["floors"].append(start.record)
    done: list[Case] = []
    for case in chosen:
        case = _fitting(case, device)
        done.append(case)
        if kept := _finished(case, earlier):
            result["rows"] += kept
            print(f"{table.title_of(kept[0])}: kept", flush=True)
            continue
        rows, rooflines = measure.measure(case, device, effort, start.rate)
        result["rows"] += rows
        result["floors"] += [each.record for each in rooflines]
        result["notes"] += _drifted(rooflines)
        record.write(result, path)
        gc.freeze()  # later collections need not scan the peers' modules again
        print(_summary(rows, effort), flush=True)
    measure.add_host_times(result["rows"], done, device, effort)
    try:
        end = roofline.copy_roofline(device, "end")
    except RuntimeError as error:
        raise DeviceLost(one_line(error)) from error
    result["floors"].append(end.record)
    result["notes"] += _drifted([start, end])


def conclude(result: Record, path: Path, show: bool) -> int:
    """Print the table; return 1 if a result of ours is wrong or failed or the GPU was lost."""
    if show:
        print("\n".join(table.lines(result)))
        print(f"-> {path}")
    ours = [row for row in result["rows"] if table.is_ours(row["peer"])]
    bad = [row for row in ours if row["status"] in ("wrong", "failed")]
    return int(bool(bad) or any(LOST in note for note in result["notes"]))


def device_for(name: str | None, threads: int = 2) -> Device:
    """The device by name, or by default a GPU if there is one; limits a CPU's threads."""
    if name == "cuda" or (name is None and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise ValueError("--device cuda must find a GPU, got none; leave the option out")
        return Gpu()
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    return Cpu()


def _finished(case: Case, earlier: Record | None) -> list[Record]:
    """The rows of a case that an earlier run had time for; else none."""
    rows = [row for row in earlier["rows"] if record.same_case(row, case)] if earlier else []
    return [] if any(row["reason"] == NO_TIME for row in rows) else rows


def _fitting(case: Case, device: Device) -> Case:
    """The case, with fewer parameters where several peers' averages would not fit the GPU."""
    if not isinstance(case, EmaCase) or device.device.type != "cuda":
        return case
    device.free()
    return case.scaled(torch.cuda.mem_get_info()[0])


def _drifted(found: list[roofline.Roofline]) -> list[str]:
    """A note if a roofline changed by more than ``roofline.DRIFT`` during the run."""
    if not found or abs(roofline.drift(found)) <= roofline.DRIFT:
        return []
    shape = " ".join(f"{name}={value}" for name, value in found[0].shape.items())
    return [f"the {found[0].kind} roofline ({shape}) drifted by {roofline.drift(found):+.1%}"]


def _summary(rows: list[Record], effort: Effort) -> str:
    counts = (
        (sum(row["status"] == status for row in rows), status)
        for status in ("ok", "wrong", "failed", "skipped")
    )
    said = ", ".join(f"{count} {status}" for count, status in counts if count)
    left = f"; {effort.left():.0f} s left" if effort.left() < 1e6 else ""
    return f"{table.title_of(rows[0])}: {said}{left}"
