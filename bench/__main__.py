"""``python -m bench``: run benchmarks, print the results and keep them under ``bench/results/``.

python -m bench                 every kernel against every peer, on this machine
python -m bench --quick         the most important cases, in 100 seconds
python -m bench CASE...         these cases only: ce kd/jsd linear_kd ema; kd means every kd/...
python -m bench --shape N,D_s,D_t,V --dtype DTYPE       every loss on sizes of one's own: tokens,
                                hidden sizes of student and teacher, vocabulary; CASE... as above
python -m bench --compare OLD.json NEW.json     what got slower; exit status 1 if anything did
python -m bench --readme        rewrite the tables of all READMEs, and the plots, from what is
                                committed under bench/results

python -m bench loss            time and memory of linear_distill_loss against naive autograd
python -m bench outcomes        what a loss costs that compares two tokenizers by outcomes
python -m bench overhead        what the trainer adds to a step
python -m bench topk_step       what a top-k teacher in memory adds to a step, and to its loss
python -m bench cache_reading   how fast a run reads its teacher's cache
python -m bench saves           how long a checkpoint keeps training waiting
python -m bench startup         CPU time of imports, help texts and a plan
python -m bench quickstart      what distillation gains in the quickstart, over three seeds (about
                                ten minutes)
python -m bench quickstart_instruct     the same, of function bodies after their docstrings
python -m bench on_policy       what a student gains from text that it writes itself, over three
                                seeds (about a quarter of an hour)
python -m bench tiles           tile sizes of the row kernels, compared on a GPU
python -m bench faults          known faults of other libraries, reproduced here, and ours beside
python -m bench end_to_end      sad distill against other trainers: tokens/s, memory, final quality
python -m bench ablation        what each structural loss gains, over three seeds (half an hour)
python -m bench teachers        what a teacher cache costs in quality: gradients, trained students
                                and hidden states in 8 bits (half an hour)
python -m bench cross_tokenizer losses for a teacher with another tokenizer, on three pairs of
                                tokenizers over three seeds (an hour)
python -m bench structure       time and memory of each structural loss
python -m bench curves          memory, time and error against tokens, vocabulary and chunks
python -m bench ceilings        hardware limits: copies, GEMMs by rows per call, EMA updates
python -m bench counters        stall reasons of the row kernels by hardware counters (needs ncu)
python -m bench compact         16-bit logits of linear losses against 32 bits, part by part
python -m bench batches         the largest batch of each trainer in 24, 48 and 80 GiB

The kernels and compact write their JSON after every case or part, and go on from there with
--resume; end_to_end, batches, teachers, cross_tokenizer and on_policy write theirs after every run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from bench.problems.cases import Case

NAMED = {
    "loss": "bench.kernels.linear_loss",
    "outcomes": "bench.kernels.outcomes",
    "overhead": "bench.training.overhead",
    "topk_step": "bench.training.topk_step",
    "cache_reading": "bench.training.cache_reading",
    "saves": "bench.training.saves",
    "startup": "bench.training.startup",
    "quickstart": "bench.training.quickstart",
    "quickstart_instruct": "bench.training.quickstart_instruct",
    "on_policy": "bench.training.on_policy",
    "tiles": "bench.kernels.tiles",
    "faults": "bench.faults",
    "end_to_end": "bench.training.end_to_end",
    "curves": "bench.kernels.curves",
    "ablation": "bench.training.ablation",
    "teachers": "bench.training.teachers",
    "cross_tokenizer": "bench.training.cross_tokenizer",
    "structure": "bench.training.structural_cost",
    "ceilings": "bench.kernels.ceilings",
    "counters": "bench.kernels.counters",
    "compact": "bench.kernels.compact",
    "batches": "bench.training.batches",
}
"""Benchmarks with a module of their own: ``measure()`` returns the record that is written."""

INCREMENTAL = {
    "compact": ("fake", "resume"),
    "end_to_end": ("rounds", "only"),
    "batches": ("limits", "only"),
    "teachers": ("only",),
    "on_policy": (),
    "cross_tokenizer": (),
}
"""Benchmarks that hand over their record after every run, and the options that they take."""

SHARED = ("fake", "resume")
"""Options of the kernel benchmark, too."""


def main(words: Sequence[str]) -> int:
    start = time.monotonic()
    parser = _parser()
    options = parser.parse_args(words)
    named = [case for case in options.cases if case in NAMED]
    if options.dtype and not options.shape:
        parser.error(f"--dtype must come with --shape, got {options.dtype} alone; leave it out")
    if options.shape and (named or any(case.startswith("ema") for case in options.cases)):
        got = " ".join(options.cases)
        parser.error(f"--shape must come with losses, or with no case, got {got}; leave it out")
    if options.compare:
        from bench.report import compare

        try:
            return compare.report(*options.compare)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
    if options.readme:
        from bench.report import readme

        print("\n".join(f"-> {path}" for path in readme.rewrite()) or "all tables are current")
        return 0
    if named and len(options.cases) > 1:
        sys.exit(f"error: {named[0]} must be the only case, got {' '.join(options.cases)}")
    given = _case_options(named[0] if named else None, options)
    if options.resume and options.out is None:
        parser.error("--resume must come with --out, got none; name the file of the earlier run")
    if named:
        _run_named(named[0], given, options.out)
        return 0
    with tempfile.TemporaryDirectory() as caches:
        _choose_environment(caches)
        return _run_kernels(options, start, words)


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser("python -m bench", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE")
    add("--quick", action="store_true", help="a small set, fewer calls, no torch.compile")
    add(
        "--fake",
        action="store_true",
        default=None,
        help="a tiny set on the CPU, to see that everything runs",
    )
    add("--seconds", type=float, help="stop after so many, with the cases done by then (quick: 90)")
    add("--shape", type=_shape, metavar="N,D_s,D_t,V", help="sizes for every loss")
    dtypes = ("bfloat16", "float16", "float32")
    add("--dtype", choices=dtypes, metavar="DTYPE", help=f"of --shape: {', '.join(dtypes)}")
    add("--peers", nargs="+", default=(), metavar="PEER", help="only these, even in quick sets")
    add("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    add("--out", type=Path, help="the JSON file; default: a name in bench/results")
    resume = "keep what the same command and commit have left in --out, and measure the rest"
    add("--resume", action="store_true", default=None, help=resume)
    add("--rounds", type=int, help="of end_to_end; default: 3")
    only = "of end_to_end, batches: ours, ...; of teachers: gradients, codecs, students"
    add("--only", type=_comma_separated, metavar="A,B", help=only)
    add("--limits", type=_integers, metavar="A,B", help="GiB, of batches; default: 24,48,80")
    add("--no-graphs", action="store_true", help="try no CUDA graphs")
    add("--readme", action="store_true", help="rewrite tables and plots from committed results")
    add("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    add("--part", action="store_true", help=argparse.SUPPRESS)  # of a run in several processes
    return parser


def _comma_separated(text: str) -> list[str]:
    return text.split(",")


def _integers(text: str) -> list[int]:
    try:
        return [int(word) for word in _comma_separated(text)]
    except ValueError:
        message = f"must be whole numbers, got {text!r}; write them like 24,48"
        raise argparse.ArgumentTypeError(message) from None


def _shape(text: str) -> tuple[int, int, int, int]:
    """N, D_s, D_t and V; a teacher's hidden states are the student's and more of them."""
    words = text.split(",")
    if len(words) != 4 or not all(word.strip().isdecimal() and int(word) for word in words):
        message = f"must be four whole numbers from 1 on, got {text!r}"
        raise argparse.ArgumentTypeError(f"{message}; write them like 8192,1024,4096,151936")
    N, D_s, D_t, V = map(int, words)
    if D_t < D_s:
        message = f"D_t must be at least D_s, got {D_t} and {D_s}"
        raise argparse.ArgumentTypeError(f"{message}; give the teacher more")
    return N, D_s, D_t, V


def _case_options(case: str | None, options: Any) -> dict[str, Any]:
    """The given options among those that only ``INCREMENTAL`` cases take; exits if misplaced."""
    names = dict.fromkeys(name for taken in INCREMENTAL.values() for name in taken)
    given = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in (INCREMENTAL.get(case, ()) if case else SHARED):
            cases = " or ".join(case for case, taken in INCREMENTAL.items() if name in taken)
            got = case or " ".join(options.cases) or "no case"
            sys.exit(f"error: --{name} must come with {cases}, got {got}; leave it out")
    return given


def _choose_environment(caches: str) -> None:
    """Set the environment variables that triton, liger and the profiler read at import.

    Variables that are already set stay. On Hopper Liger would choose CuTe DSL where it finds
    CUTLASS; here its Triton kernels are compared. ``LIGER_KERNEL_IMPL`` cannot choose them: one
    half of Liger 0.8.5 refuses the value that the other half needs.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", caches)  # empty: first calls compile
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{caches}/inductor")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler
    os.environ.setdefault("LIGER_KERNEL_BACKEND", "nvidia-triton")


def _run_kernels(options: Any, start: float, words: Sequence[str]) -> int:
    from bench import record
    from bench.kernels import isolated
    from bench.kernels import run as kernels
    from bench.kernels.entry import Effort
    from bench.problems import cases

    unknown = [
        c for c in options.cases if not any(f"{n}/".startswith(f"{c}/") for n in cases.NAMES)
    ]
    if unknown:
        names = " ".join((*cases.NAMES, *NAMED))
        sys.exit(f"error: CASE must be one of {names}, got {unknown[0]}; choose one of these")
    seconds = options.seconds or (90.0 if options.quick else 1e9)
    command = " ".join(["python -m bench", *_without_out(words)])
    if _several_processes(options):
        of_set = _shaped(options) if options.shape else cases.full()
        names = dict.fromkeys(c.name for c in cases.chosen(of_set, options.cases))
        result, path = {"rows": [], "notes": []}, Path()
        for result in isolated.measure_isolated(tuple(names), _passed_on(options), start + seconds):
            result["run"] = record.run(command)
            path = options.out or record.path_for(result)
            record.write(result, path)
        return kernels.conclude(result, path, show=True)
    try:
        if options.fake:  # one thread: its times mean nothing, and busy cores slow barriers
            device = kernels.device_for("cpu", threads=1)
        else:
            device = kernels.device_for(options.device)
    except ValueError as error:
        sys.exit(f"error: {error}")
    on_gpu = device.device.type == "cuda"
    if options.fake:
        every, rounds, calls = cases.fake(), 2, 1
    elif options.quick:
        every, rounds, calls = (cases.quick(), 2, 5) if on_gpu else (cases.quick_cpu(), 3, 1)
    else:
        every, rounds, calls = (cases.full(), 6, 5) if on_gpu else (cases.cpu(), 7, 1)
    if options.shape:
        every = _shaped(options)
    effort = Effort(
        rounds,
        calls,
        start + seconds,
        round_ms=400 if options.quick else 1e9,
        compiled=not (options.quick or options.fake),
        peers=tuple(options.peers),
        graphs=not options.no_graphs,
        resident=not (on_gpu or options.quick or options.fake),
        interpreted=options.fake and os.environ.get("TRITON_INTERPRET") == "1",
    )
    chosen = cases.chosen(every, options.cases)
    fake = Path(tempfile.gettempdir()) / "bench-fake.json" if options.fake else None
    out = options.out or fake
    result, path = kernels.run(chosen, device, effort, command, out, bool(options.resume))
    return kernels.conclude(result, path, show=not options.part)


def _shaped(options: Any) -> list[Case]:
    from bench.problems import cases

    return cases.of_shape(options.shape, options.dtype or "bfloat16")


def _several_processes(options: Any) -> bool:
    import torch

    small = options.quick or options.fake or options.part or options.device == "cpu"
    return (
        not small and not options.resume and len(options.cases) != 1 and torch.cuda.is_available()
    )


def _passed_on(options: Any) -> list[str]:
    words = ["--no-graphs"] if options.no_graphs else []
    if options.shape:
        words += ["--shape", ",".join(map(str, options.shape))]
        words += ["--dtype", options.dtype or "bfloat16"]
    return words + (["--peers", *options.peers] if options.peers else [])


def _without_out(words: Sequence[str]) -> list[str]:
    """The command line without ``--out`` and ``--resume``, on which no result depends."""
    kept = [word for word in words if not word.startswith("--out=")]
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return [word for word in kept if word != "--resume"]


def _run_named(case: str, given: dict[str, Any], out: Path | None) -> None:
    import torch

    from bench import record
    from sad.checkpoint.atomic_files import write_atomic
    from sad.environment import library_versions

    module = importlib.import_module(NAMED[case])
    path = out or record.RESULTS / f"{case}.json"
    resume = given.pop("resume", False)
    run = record.run(_command(case, given))
    machine = record.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if resume:
        given["earlier"] = record.earlier(path, run, machine["gpu"])

    def keep(result: dict[str, Any]) -> None:
        about = {"schema": 1, "run": run, "machine": machine, "versions": library_versions()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(about | result, indent=1) + "\n")

    result = module.measure(**given, keep=keep) if case in INCREMENTAL else module.measure()
    keep(result)
    print(json.dumps(result, indent=1))
    print(f"-> {path}")


def _command(case: str, given: dict[str, Any]) -> str:
    words = [f"python -m bench {case}"]
    for name, value in given.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        words.append(f"--{name}" if value is True else f"--{name} {text}")
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
