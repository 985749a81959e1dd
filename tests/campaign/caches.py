"""Caches of a teacher's targets: whoever writes or reads one may be killed at any moment.

Three promises: a cache that is killed and begun again, on other numbers of processes, has the bits
of one that nobody disturbed; a run from a cache resumes to the same bits; and so does one whose
teacher fills a window meanwhile, whichever of the two is killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from support.caches import SMALL_SHARDS, make_cache
from support.ranks import ends_of_ranks

from campaign.report import Tally
from campaign.runs import Outcome, Workshop, digest, in_child, in_this_child, run
from sad.checkpoint import atomic_files as files
from sad.config.schema import DistillConfig, config_to_yaml
from sad.teachers.cache.files import COMPLETE
from sad.teachers.fingerprint import fingerprint_file
from sad.training.run import distill

ROOT = Path(__file__).resolve().parents[2]
NAME = "accumulation, with a baseline"
KINDS = ("sampled", "hidden")
IN_A_ROW = 5
"""Kills of one cache, run or pair, at most; then it is left alone."""

LOST = 76  # of a rank that has lost another

ENTRY = f"""
import sys
from sad.teachers.cache import files

files.SHARD_BYTES = {SMALL_SHARDS}  # before it is a default: a small text fills several
from sad.cli import main

sys.exit(main(["cache-teacher", *sys.argv[1:]]))
"""

Cache = Callable[[Path, int, float | None], Outcome]
"""Caches to a folder on so many processes; killed so many seconds after the first sign of it."""


# Writing


def kill_writers(
    workshop: Workshop, folder: Path, kills: int, seed: int = 0, *, real: bool = True
) -> Iterator[Tally]:
    """Kill caching ``kills`` times in all, in real processes that torchrun starts or in forked
    ones, of which there are one, two or three; one tally per cache that was made whole."""
    draw = random.Random(seed)
    sizes = (1, 2, 3)
    configs = {kind: _config(workshop, folder / "none") for kind in KINDS}
    write = {kind: _writer(configs[kind], folder, kind, real=real) for kind in KINDS}
    expected, seconds = {}, {}
    for kind in KINDS:
        whole = folder / f"whole-{kind}"
        make_cache(configs[kind], whole, kind, all_rows=True)
        expected[kind] = _hashes(whole)
    for size in sizes:
        begin, log = time.monotonic(), folder / f"whole-{size}"
        if (outcome := write["sampled"](log, size, None)).code:
            raise RuntimeError(f"a cache that nobody disturbs must be finished, got {outcome}")
        # The imports of a real process come before the first sign, and do not count.
        seconds[size] = (time.monotonic() - begin) / (3 if real else 1)
    inflicted = turn = 0
    while inflicted < kills:
        kind, cache, deaths = KINDS[turn % 2], folder / f"cache-{turn}", 0
        used = []
        while deaths < min(IN_A_ROW, kills - inflicted):
            used.append(size := draw.choice(sizes))
            outcome = write[kind](cache, size, draw.uniform(0.0, 1.0) * seconds[size])
            if outcome.code == 0:
                break  # it was done before
            deaths += 1
        used.append(size := draw.choice(sizes))
        outcome = write[kind](cache, size, None)
        same = outcome.code == 0 and _hashes(cache) == expected[kind]
        same = same and not list(cache.glob(".tmp-*"))
        inflicted += deaths
        example = "" if same else f"a cache of {kind} targets on {used} processes: {outcome}"
        yield Tally(inflicted=deaths, lost=int(not same), example=example)
        files.remove_tree(cache)
        turn += 1


def _writer(config: DistillConfig, folder: Path, kind: str, *, real: bool) -> Cache:
    if real:
        (folder / "entry.py").write_text(ENTRY)
        (folder / "cache.yaml").write_text(config_to_yaml(config))
        return partial(_write_for_real, folder, kind)

    def forked(cache: Path, size: int, kill_after: float | None) -> Outcome:
        work, log = partial(make_cache, config, cache, kind, all_rows=True), folder / "cache.log"
        if size == 1:
            return in_child(work, log, kill_after=kill_after)
        # One of them is killed; the others hear of it.
        return _on_ranks(work, size, log, kill_after, lost=int(1000 * (kill_after or 0)) % size)

    return forked


def _write_for_real(
    folder: Path, kind: str, cache: Path, size: int, kill_after: float | None
) -> Outcome:
    """``sad cache-teacher`` in real processes, under torchrun if they are several."""
    words = [str(folder / "entry.py"), str(folder / "cache.yaml"), "--output", str(cache)]
    words += ["--kind", kind, "--all_rows", *(["--top_k", "16"] if kind == "sampled" else [])]
    launcher = [sys.executable]
    if size > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={size}"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    log = folder / "process.log"
    before = set(cache.glob("*")) | set(cache.glob(".*")) if cache.exists() else set()
    with log.open("w") as sink:
        process = subprocess.Popen([*launcher, *words], env=env, stdout=sink, stderr=sink)
        if kill_after is not None:
            seen = partial(_changed, cache, before)
            _until(lambda: process.poll() is not None or seen(), 200)
            with suppress(subprocess.TimeoutExpired):
                process.wait(kill_after)
            _kill_tree(process)
        code = process.wait(200)
    said = "" if code == 0 else log.read_text()[-300:]
    return Outcome(code, said)


def _changed(cache: Path, before: set[Path]) -> bool:
    now = set(cache.glob("*")) | set(cache.glob(".*")) if cache.exists() else set()
    return now != before


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        for each in (*children, process):
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                each.kill()
        psutil.wait_procs(children, timeout=20)


def _until(there: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline:
        time.sleep(0.005)


def _hashes(cache: Path) -> dict[str, str]:
    """What ``complete.json`` says of every file, if that is so."""
    said = json.loads((cache / COMPLETE).read_text())["files"]
    found = {name: fingerprint_file(cache / name) for name in said}
    return said if said == found else {}


# Reading


def kill_readers(
    workshop: Workshop, folder: Path, kills: int, seed: int = 0, sizes: tuple[int, ...] = (1, 2)
) -> Iterator[Tally]:
    """Kill runs from a cache ``kills`` times in all, on one rank and on two in turn; one tally per
    run that came to its end."""
    draw = random.Random(seed)
    whole: dict[tuple[str, int], tuple[dict[str, str], float]] = {}
    for kind in KINDS:
        make_cache(_config(workshop, folder / "none"), folder / kind, kind, all_rows=True)
    inflicted = turn = 0
    while inflicted < kills:
        kind, size = KINDS[turn // len(sizes) % 2], sizes[turn % len(sizes)]
        cache = str(folder / kind)
        log = folder / "run.log"
        if (kind, size) not in whole:
            run_dir, begin = folder / f"whole-{kind}-{size}", time.monotonic()
            outcome = _train(_config(workshop, run_dir, teacher_cache=cache), size, log)
            if outcome.code:
                raise RuntimeError(f"a run that nobody disturbs must finish, got {outcome}")
            whole[kind, size] = digest(run_dir), time.monotonic() - begin
        expected, seconds = whole[kind, size]
        run_dir = folder / f"run-{turn}"
        config = _config(workshop, run_dir, teacher_cache=cache)
        deaths, outcome = 0, Outcome(-signal.SIGKILL)
        while deaths < min(IN_A_ROW, kills - inflicted):
            outcome = _train(config, size, log, draw.uniform(0.1, 1.0) * seconds, draw)
            if outcome.code != -signal.SIGKILL:
                break
            deaths += 1
        if outcome.code in (0, -signal.SIGKILL):
            outcome = _train(config, size, log)
        same = outcome.code == 0 and digest(run_dir) == expected
        inflicted += deaths
        example = "" if same else f"a run from {kind} targets on {size} ranks: {outcome}"
        yield Tally(inflicted=deaths, lost=int(not same), example=example)
        if same:
            files.remove_tree(run_dir)
        turn += 1


def _train(
    config: DistillConfig,
    size: int,
    log: Path,
    kill_after: float | None = None,
    draw: random.Random | None = None,
) -> Outcome:
    """A run that goes on from what it finds; of several ranks one is killed, and all end."""
    if size == 1:
        return run(config, log, kill_after=kill_after)
    work = partial(distill, replace(config, resume_from_checkpoint="auto"))
    return _on_ranks(work, size, log, kill_after, (draw or random.Random(0)).randrange(size))


def _on_ranks(
    work: Callable[[], Any], size: int, log: Path, kill_after: float | None, lost: int
) -> Outcome:
    """Do ``work`` on forked ranks; that of number ``lost`` is killed, if one is to be.

    Not in its first instants: ranks that have not found one another wait for one that is gone, and
    it is torchrun that ends them.
    """

    def on_rank() -> None:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        if kill_after is not None and int(os.environ["RANK"]) == lost:
            _kill_later(max(kill_after, 0.3))
        work()

    ends = ends_of_ranks(size, on_rank)
    codes = {end.code for end in ends}
    if codes == {0}:
        return Outcome(0)
    if ends[lost].code == -signal.SIGKILL and codes <= {0, LOST, -signal.SIGKILL}:
        return Outcome(-signal.SIGKILL)
    return Outcome(max(codes), "; ".join(end.message[-200:] for end in ends))


def _kill_later(seconds: float) -> None:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


# A window


def kill_pairs(workshop: Workshop, folder: Path, kills: int, seed: int = 0) -> Iterator[Tally]:
    """Kill a teacher that fills a window, or its student, ``kills`` times in all; one tally per
    pair that came to its end."""
    draw = random.Random(seed)
    begin = time.monotonic()
    expected = _pair(workshop, folder / "whole", draw, 0)
    seconds = time.monotonic() - begin
    if not isinstance(expected, dict):
        raise RuntimeError(f"a pair that nobody disturbs must finish, got {expected}")
    inflicted = turn = 0
    while inflicted < kills:
        deaths = min(IN_A_ROW, kills - inflicted)
        found = _pair(workshop, folder / f"pair-{turn}", draw, deaths, seconds)
        same = found == expected
        inflicted += deaths
        said = found if isinstance(found, str) else "other bits"
        example = "" if same else f"a teacher with a window, and its student: {said}"
        yield Tally(inflicted=deaths, lost=int(not same), example=example)
        turn += 1


def _pair(
    workshop: Workshop, folder: Path, draw: random.Random, deaths: int, seconds: float = 0.0
) -> dict[str, str] | str:
    """The digest of a run beside whose student a teacher fills a window, or what went wrong."""
    cache = folder / "cache"
    cache.mkdir(parents=True)
    steps = {"max_steps": 24, "save_steps": 3, "eval_steps": 8, "teacher_wait": 20}
    writes = _config(workshop, folder / "none", **steps)
    reads = _config(workshop, folder / "run", teacher_cache=str(cache), **steps)
    fill = partial(make_cache, writes, cache, "hidden", window=9, wait_for_reader=True)
    learn = partial(distill, replace(reads, resume_from_checkpoint="auto"))
    work = {"teacher": fill, "student": learn}
    logs = {who: folder / f"{who}.log" for who in work}
    running: dict[str, BaseProcess] = {}
    deadline = time.monotonic() + 200
    try:
        for who in work:
            running[who] = _forked(work[who], logs[who])
        while running["student"].exitcode != 0:
            if time.monotonic() > deadline:
                return "it takes more than 200 s"
            if deaths:
                running["student"].join(draw.uniform(0.0, 1.0) * seconds)
                who = draw.choice(list(work))
                if running[who].exitcode is None:
                    deaths -= 1
                    running[who].kill()
                    running[who].join()
            else:
                running["student"].join(0.05)
            for who, process in running.items():
                if process.exitcode == -signal.SIGKILL:
                    running[who] = _forked(work[who], logs[who])
                elif process.exitcode:
                    return f"the {who} ended with {process.exitcode}: {_last(logs[who])}"
        running["teacher"].join(60)
        if running["teacher"].exitcode != 0 or list(cache.glob("shard-*")):
            return f"the teacher did not end when the student needed no more: {running['teacher']}"
    finally:
        for process in running.values():
            process.kill()
            process.join()
    return digest(folder / "run")


def _forked(work: Callable[[], Any], log: Path) -> BaseProcess:
    def ending() -> None:
        os._exit(in_this_child(work, log))

    process = multiprocessing.get_context("fork").Process(target=ending)
    process.start()
    return process


def _last(log: Path) -> str:
    with suppress(OSError):
        return log.with_suffix(".error").read_text()[:300]
    return ""


def _config(workshop: Workshop, run_dir: Path, **changes: Any) -> DistillConfig:
    """A run that each number of ranks shares out alike."""
    rows = {"global_batch_size": 4, "baseline": False, "temperature": 1.0, "max_length": 16}
    return workshop.config(NAME, run_dir, **rows | changes)
