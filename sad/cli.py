"""The ``sad`` command: parse the command line, run one command, turn errors into exit codes.

torch and transformers are slow to import: a command imports them after its arguments are parsed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from sad.environment import processes, quiet_quantizers
from sad.errors import (
    OutOfMemoryError,
    SadError,
    StoppedError,
    UsageError,
    is_out_of_memory,
    one_line,
    printable,
    quoted,
    shortened,
    speaks_for_itself,
)
from sad.recipes import recipe_names, recipe_summary

INTERRUPTED = 128 + 2  # SIGINT, as shells count
BROKEN_PIPE = 128 + 13  # SIGPIPE
WAIT_FOR_SPEAKER = 5.0  # seconds; torchrun looks ten times per second whether a process has ended

OVERRIDES = """
--key value, --key=value and --data.train value override what the file says. A list takes several
values, null stands for nothing, and a bare --key switches on. Relative paths in a file mean the
file's own folder first.
"""


PLAN_OPTIONS = """\
options of this command, among the keys:
  --ranks 8               plan a run on so many processes: memory of each, bytes moved, what limits
  --ranks_per_node 8      processes in one node
  --bandwidth 300,40      GB/s per process, inside a node and between nodes, as nccl-tests' algbw
  --tflops 400            10^12 operations per second that one process reaches; by default the bf16
                          peak of this machine's GPU, where it is known
  --memory 24             also print the largest per_device_train_batch_size that fits so many GiB;
                          without a number: those of this machine's GPU
"""

CACHE_OPTIONS = """\
options of this command, among the keys:
  --output DIR            the folder to write; an unfinished cache in it is finished
  --kind sampled          sampled: ids drawn so that the gradient of forward_kl is right in mean;
                          topk: the most likely ids, for other divergences; hidden: final hidden
                          states, for all of them at any temperature, and for TAID
  --codec int8            of hidden states: int8, D + 4 bytes per token, or bf16, 2 D bytes
  --top_k 64              ids per token
  --temperatures 1,2      of topk; by default that of the configuration, and 1
  --all_rows              also rows that the run of this file does not come to: for other seeds, and
                          longer runs
  --window 4              keep so many shards of 256 MB ahead of one run that reads them meanwhile,
                          and delete what it needs no more; 0 keeps all, for any run
  --wait_for_reader       with a window: wait for that run for ever, not for teacher_wait seconds
  --check                 make some batches of a cache again and compare: the only test that sees a
                          wrong adapter or chat template

without a teacher in the file; its most likely ids at temperature 1:
  --server URL            ask a server that runs it, once for each part of a document in a row
  --server_kind vllm      vllm, started with --max-logprobs 64 --no-enable-prefix-caching
                          --max-num-batched-tokens 2048, or sglang
  --server_key_env NAME   the environment variable that holds its key
  --server_model NAME     which of its models, if there are several
  --import PATH           take targets, and the text's tokens, from a file or a folder of files;
                          one document per row (packing: false), in place of the keys of data
  --import_format FORMAT  distillkit, axolotl, vllm, sglang or openai; by default what the first
                          record looks like. Or vllm-hidden, by default for .safetensors: final
                          hidden states (--kind hidden, at any temperature) of the file's teacher,
                          which is loaded for its norm and its head, and to compare
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or the one of its error.

    The first line on stderr is ``sad: error: ...``. A traceback follows for a bug of ours (code 1)
    and with ``--debug``.
    """
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if not {"-h", "--help"}.isdisjoint(words):
        words = [*words[:1], "--help"]  # whatever else stands on the line
    # --debug counts before the words are parsed, so that a parsing error shows its traceback, too.
    args = argparse.Namespace(debug="--debug" in words)
    try:
        code = _run(words, args)
        sys.stdout.flush()  # here, where a broken pipe is still handled
        return code
    except KeyboardInterrupt:
        print("sad: error: interrupted; nothing new is saved", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone, as in `sad distill --help | head`
        # Python flushes stdout once more at exit, and would report the broken pipe there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        return _report(error, debug=args.debug)


def _run(words: Sequence[str], args: argparse.Namespace) -> int:
    parser = _parser()
    quiet_quantizers()
    try:
        _, unknown = parser.parse_known_args(words, namespace=args)
        if unknown and "overrides" in args:  # all that comes after the file would be one
            raise UsageError(
                f"a recipe or file must come before the keys, got {unknown[0]} before it; write "
                f"sad {words[0]} RECIPE|FILE.yaml {unknown[0]} ..."
            )
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit:  # argparse has printed a help text or versions
        return 0
    return args.run(args)


def _distill(args: argparse.Namespace) -> int:
    config = _load(args)
    rank, _ = processes()
    # Before torch and transformers, whose import takes seconds.
    if rank == 0:  # under torchrun it says for all what is done
        print(f"sad distill: {_models(config)} -> {printable(config.output_dir)}", flush=True)

    from sad.training.run import distill

    distill(config)
    return 0


def _eval(args: argparse.Namespace) -> int:
    _require_path(args.run_dir, "RUN_DIR", "name the output_dir of a run")
    print(f"sad eval: {args.run_dir}", file=sys.stderr, flush=True)

    from sad.report.results import format_results
    from sad.training.rescore import evaluate_run

    rows = evaluate_run(
        args.run_dir,
        trust_remote_code_student=args.trust_remote_code_student,
        trust_remote_code_teacher=args.trust_remote_code_teacher,
    )
    print(format_results(rows))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from sad.config.plan_options import read_plan_options

    options, args.overrides = read_plan_options(args.overrides)
    config = _load(args)
    print(f"sad plan: {_models(config)}", file=sys.stderr, flush=True)

    cached = None
    if config.teacher_cache is not None:
        from pathlib import Path

        from sad.teachers.cached import planned_targets

        cached = planned_targets(Path(config.teacher_cache))
    if options.ranks is None:
        from sad.models.memory_plan import format_plan, plan

        cluster = None
        print(format_plan(plan(config, cached=cached)))
    else:
        from sad.distributed.world import World
        from sad.models.rank_plan import Cluster, format_rank_plan, plan_ranks
        from sad.training.ranks import check_ranks

        check_ranks(config, World(size=options.ranks))
        inside, between = (rate * 1e9 for rate in options.bandwidth)
        cluster = Cluster(options.ranks, options.ranks_per_node, inside, between)
        ranks = plan_ranks(config, cluster, options.flops_per_second, cached)
        print(format_rank_plan(ranks))
    if options.asks_for_batch:
        from sad.models.largest_batch import describe_largest

        print(describe_largest(config, options.memory, cluster, cached))
    return 0


def _cache_teacher(args: argparse.Namespace) -> int:
    from sad.config.cache_options import read_cache_options

    options, args.overrides = read_cache_options(args.overrides)
    _require_path(options.output, "output", "name a folder")
    if options.from_elsewhere:  # what a run reads in place of a teacher
        args.overrides += ["--teacher_cache", options.output]
    config = _load(args)
    source = options.server or options.import_path or config.teacher or "none"
    print(
        f"sad cache-teacher: {printable(source)} -> {options.output}",
        file=sys.stderr,
        flush=True,
    )

    from sad.training.cache_teacher import cache_teacher

    cache_teacher(config, options)
    return 0


def _export(args: argparse.Namespace) -> int:
    _require_path(args.checkpoint, "CHECKPOINT", "name a folder under RUN_DIR/checkpoints")
    _require_path(args.out, "OUT", "name a new folder")
    print(f"sad export: {args.checkpoint} -> {args.out}", file=sys.stderr, flush=True)

    from sad.distributed.export import describe, export_checkpoint

    exported = export_checkpoint(
        args.checkpoint,
        args.out,
        weights=args.weights,
        trust_remote_code_student=args.trust_remote_code_student,
        trust_remote_code_teacher=args.trust_remote_code_teacher,
    )
    if exported.note:
        print(f"note: {printable(exported.note)}", file=sys.stderr)
    print(printable(describe(exported)))
    return 0


def _require_path(path: str, what: str, remedy: str) -> None:
    from sad.config.values import PATH, is_path

    if not is_path(os.fsencode(path).decode(errors="backslashreplace")):
        raise UsageError(f"{what} must {PATH.expectation}, got {quoted(path)}; {remedy}")


def _selftest(args: argparse.Namespace) -> int:
    from sad.selftest import run

    return run()


def _models(config: Any) -> str:
    names = f"{config.student} from {config.teacher}" if config.teacher else config.student
    return printable(names)


def _load(args: argparse.Namespace) -> Any:
    from sad.config.load import load_config

    config = load_config(args.config, args.overrides)
    args.debug |= config.debug
    return config


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sad",
        description="Turn a large language model into a small one on little memory.",
        epilog=f"{_recipes()}\n\n`sad distill --help` lists every key of a configuration.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print versions, for a bug report")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    distill = commands.add_parser(
        "distill", add_help=False, help="train a student from a teacher, or from text alone"
    )
    _takes_configuration(distill, _distill)

    evaluate = commands.add_parser("eval", help="score the best student of a run")
    evaluate.add_argument("run_dir", metavar="RUN_DIR", help="its output_dir")
    _may_trust(evaluate)
    evaluate.set_defaults(run=_eval)

    export = commands.add_parser("export", help="write the student of a checkpoint as a model")
    export.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a folder under RUN_DIR/checkpoints"
    )
    export.add_argument("out", metavar="OUT", help="the folder to write: new, or an earlier export")
    export.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="averaged or as trained; by default those whose score the run compares",
    )
    _may_trust(export)
    export.set_defaults(run=_export)

    plan = commands.add_parser(
        "plan", add_help=False, help="predict a run's peak memory; no weights are loaded"
    )
    _takes_configuration(plan, _plan)
    plan.epilog = PLAN_OPTIONS

    cache = commands.add_parser(
        "cache-teacher",
        add_help=False,
        help="keep a teacher's targets on disk, for students that train without it",
    )
    _takes_configuration(cache, _cache_teacher)
    cache.epilog = CACHE_OPTIONS

    selftest = commands.add_parser("selftest", help="check the kernels against their definitions")
    selftest.set_defaults(run=_selftest)

    for child in (distill, evaluate, export, plan, cache, selftest):
        child.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,  # a default here would overwrite what main has set
            help="show tracebacks for every error",
        )
    return parser


def _takes_configuration(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("-h", "--help", action=_ConfigurationHelp)
    parser.add_argument("config", metavar="RECIPE|FILE.yaml")
    parser.add_argument("overrides", metavar="...", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def _may_trust(parser: argparse.ArgumentParser) -> None:
    for model in ("student", "teacher"):
        parser.add_argument(
            f"--trust_remote_code_{model}",
            action="store_true",
            help=f"run Python code that comes with the {model}; the run's own file cannot allow it",
        )


def _recipes() -> str:
    names = recipe_names()
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {recipe_summary(name)}" for name in names]
    return "\n".join(["recipes:", *lines])


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors are ``UsageError``s; no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{shortened(message, 200)}; see `{self.prog} --help`")


class _ConfigurationHelp(argparse.Action):
    """``--help`` of a command that takes a configuration: usage, recipes, every key."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from sad.config.help import keys_help

        print(f"usage: {parser.prog} RECIPE|FILE.yaml [--key value ...]\n{OVERRIDES}")
        if parser.epilog:
            print(parser.epilog)
        print(f"{_recipes()}\n\n{keys_help()}")
        parser.exit()


class _Version(argparse.Action):
    """``--version``: this package's and those that matter in a bug report."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from sad.environment import library_versions

        print(", ".join(f"{name} {version}" for name, version in library_versions().items()))
        parser.exit()


def _report(error: Exception, *, debug: bool) -> int:
    """Print an error in one line, with a traceback if it is a bug or ``debug``; return its exit
    code."""
    known = _as_sad_error(error)
    if known is None:
        kind = type(error).__name__
        line = f"this is a bug in sad, got {kind}: {error}; please report it with the lines below"
    else:
        line = printable(str(known))
    if debug or speaks_for_itself(error, first=processes()[0] == 0) or _nobody_speaks(error):
        print(f"sad: error: {line}", file=sys.stderr)
    if known is None or debug:
        traceback.print_exception(error)
    return 1 if known is None else known.exit_code


def _nobody_speaks(error: Exception) -> bool:
    """Whether no other process ends while this one, whose error another is to say, waits for it.

    torchrun ends all processes as soon as one has ended: one that ended in silence would take the
    word from the one that speaks. And that one may have no error to say, where configurations
    differ. Processes of one node wake one after another, so that one of them speaks.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or isinstance(error, StoppedError):
        return False
    local = os.environ.get("LOCAL_RANK", "")
    time.sleep(WAIT_FOR_SPEAKER + (int(local) if local.isdecimal() else 0))
    return True


def _as_sad_error(error: Exception) -> SadError | None:
    """The error as one that users can act on; None for a bug."""
    if isinstance(error, SadError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError(
            f"memory must hold model, optimizer and activations, got: {one_line(error)}; lower "
            "per_device_train_batch_size or max_length (`sad plan` itemises the need)"
        )
    return None
