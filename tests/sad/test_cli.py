"""The ``sad`` command: its words, its first line on stderr, its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sad import errors
from sad.cli import main
from sad.config.schema import DistillConfig
from sad.recipes import recipe_names


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("student: s\nteacher: t\n")
    return str(path)


@pytest.fixture
def replace_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a stand-in where the command imports a module from."""

    def put(name: str, **contents: Any) -> None:
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def test_distill_gets_the_configuration(recipe: str, replace_module: Any) -> None:
    seen: list[DistillConfig] = []
    replace_module("sad.training.run", distill=seen.append)
    assert main(["distill", recipe, "--seed", "5", "--data.train=x"]) == 0
    (config,) = seen
    assert (config.student, config.seed, config.data.train) == ("s", 5, ("x",))


def test_eval_prints_the_table_of_the_run(replace_module: Any, capsys: Any) -> None:
    replace_module(
        "sad.training.rescore", evaluate_run=lambda run_dir, **trust: [{"name": run_dir}]
    )
    replace_module("sad.report.results", format_results=lambda rows: f"table of {rows[0]['name']}")
    assert main(["eval", "runs/one"]) == 0
    assert capsys.readouterr() == ("table of runs/one\n", "sad eval: runs/one\n")


def test_plan_prints_what_the_planner_says(recipe: str, replace_module: Any, capsys: Any) -> None:
    replace_module(
        "sad.models.memory_plan",
        plan=lambda config, cached: config.seed,
        format_plan="seed {}".format,
    )
    assert main(["plan", recipe, "--seed", "3"]) == 0
    assert capsys.readouterr() == ("seed 3\n", "sad plan: s from t\n")


def test_plan_of_ranks_and_the_largest_batch(recipe: str, replace_module: Any, capsys: Any) -> None:
    replace_module(
        "sad.models.rank_plan",
        Cluster=lambda *args: args,
        plan_ranks=lambda config, cluster, flops, cached: (config.seed, cluster, flops),
        format_rank_plan="ranks {}".format,
    )
    replace_module(
        "sad.models.largest_batch",
        describe_largest=lambda config, memory, cluster, cached: f"largest {memory} {cluster}",
    )
    words = "--ranks 16 --seed 3 --bandwidth 450,50 --tflops 400 --memory 24".split()
    assert main(["plan", recipe, *words]) == 0
    cluster = (16, 8, 450e9, 50e9)
    assert capsys.readouterr().out == f"ranks (3, {cluster}, {4e14})\nlargest 24.0 {cluster}\n"


def test_plan_of_one_process_with_the_largest_batch(
    recipe: str, replace_module: Any, capsys: Any
) -> None:
    replace_module(
        "sad.models.memory_plan", plan=lambda config, cached: 1, format_plan="plan {}".format
    )
    replace_module(
        "sad.models.largest_batch",
        describe_largest=lambda config, memory, cluster, cached: f"largest {memory} {cluster}",
    )
    assert main(["plan", recipe, "--memory"]) == 0
    assert capsys.readouterr().out == "plan 1\nlargest None None\n"


def test_plan_refuses_what_several_ranks_cannot_do(recipe: str, capsys: Any) -> None:
    assert main(["plan", recipe, "--ranks", "2", "--optim", "adamw_8bit"]) == 2
    assert "optim must be adamw_torch_fused on several processes" in capsys.readouterr().err


def test_help_of_plan_names_its_options(capsys: Any) -> None:
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("ranks", "ranks_per_node", "bandwidth", "tflops", "memory"):
        assert f"  --{name} " in out
    assert main(["distill", "--help"]) == 0
    assert "--ranks_per_node" not in capsys.readouterr().out


ERRORS = [
    (errors.UsageError("x"), 2, "x"),
    (errors.UnfitError("x"), 65, "x"),
    (errors.OutputError("x"), 73, "x"),
    (errors.CheckpointError("x"), 74, "x"),
    (errors.StoppedError("x"), 75, "x"),
    (errors.DivergedError("x"), 90, "x"),
    (errors.OutOfMemoryError("x"), 71, "x"),
    (torch.OutOfMemoryError("CUDA out of memory\ndetails"), 71, "memory must hold"),
    (MemoryError(), 71, "memory must hold"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1"), 71, "memory must"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize("error, code, start", ERRORS, ids=lambda v: type(v).__name__)
def test_known_errors_are_one_line_and_their_code(
    error: BaseException,
    code: int,
    start: str,
    recipe: str,
    replace_module: Any,
    capsys: Any,
) -> None:
    replace_module("sad.training.run", distill=raising(error))
    assert main(["distill", recipe]) == code
    activations = capsys.readouterr().err
    assert activations.startswith(f"sad: error: {start}")
    assert activations.count("\n") == 1


def test_a_bug_is_code_1_with_a_traceback(recipe: str, replace_module: Any, capsys: Any) -> None:
    replace_module("sad.training.run", distill=raising(RuntimeError("broken")))
    assert main(["distill", recipe]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("sad: error: this is a bug in sad, got RuntimeError: broken;")
    assert lines[1] == "Traceback (most recent call last):"


@pytest.mark.parametrize(
    "words", [["--debug"], ["--debug", "true"], ["--seed", "1", "--debug"]], ids=" ".join
)
def test_debug_shows_the_traceback_of_a_known_error(
    words: list[str], recipe: str, replace_module: Any, capsys: Any
) -> None:
    replace_module("sad.training.run", distill=raising(errors.UnfitError("x")))
    assert main(["distill", recipe, *words]) == 65
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_where_a_configuration_fails(recipe: str, capsys: Any) -> None:
    assert main(["distill", recipe, "--debug", "--seed", "-1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_debug_in_the_file_counts_too(recipe: str, replace_module: Any, capsys: Any) -> None:
    with open(recipe, "a") as file:
        file.write("debug: true\n")
    replace_module("sad.training.run", distill=raising(errors.UnfitError("x")))
    assert main(["distill", recipe]) == 65
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["distil"], "invalid choice: 'distil'"),
        (["distill"], "the following arguments are required: RECIPE|FILE.yaml"),
        (["distill", "--student", "a"], "must come before the keys, got --student before it;"),
        (["distill", "nowhere.yaml"], "got 'nowhere.yaml'; check the path"),
        (["distill", "quickstart", "--ema_decya", "1"], "did you mean 'ema_decay'?"),
        (["--frobnicate"], "required: COMMAND"),
        (["selftest", "extra"], "unrecognized arguments: extra"),
        (["eval"], "required: RUN_DIR"),
    ],
)
def test_wrong_words_are_code_2(words: list[str], message: str, capsys: Any) -> None:
    assert main(words) == 2
    first_line = capsys.readouterr().err.splitlines()[0]
    assert first_line.startswith("sad: error: ") and message in first_line


@pytest.mark.parametrize("words", [["--help"], [], ["-h"]])
def test_help_names_commands_and_recipes(words: list[str], capsys: Any) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    for word in ("distill", "eval", "plan", "selftest", "quickstart"):
        assert f"  {word} " in out
    recipes = out.partition("recipes:\n")[2].partition("\n\n")[0].splitlines()
    width = max(len(name) for name in recipe_names()) + 4
    assert all(line[width - 2 : width] == "  " and line[width] != " " for line in recipes)


@pytest.mark.parametrize("words", [["distill", "-h"], ["distill", "quickstart", "--help"]])
def test_help_of_distill_names_keys_and_defaults(words: list[str], capsys: Any) -> None:
    assert main(words) == 0
    assert "  --temperature NUMBER  [2.0]\n      Softens both" in capsys.readouterr().out


def test_version_names_what_numbers_depend_on(capsys: Any) -> None:
    assert main(["--version"]) == 0
    assert f"torch {torch.__version__}" in capsys.readouterr().out


def test_words_that_need_no_model_import_nothing_heavy(recipe: str) -> None:
    """A configuration, help, versions and wrong words, one after the other in one process."""
    lines = [
        (["--help"], 0),
        (["--version"], 0),
        (["distill", "--help"], 0),
        (["plan", "--help"], 0),
        (["eval", "--help"], 0),
        (["selftest", "--help"], 0),
        (["distil"], 2),
        (["distill", "nowhere.yaml"], 2),
        (["distill", recipe, "--ema_decya", "1"], 2),
        (["plan", recipe, "--seed", "-1"], 2),
        (["plan", recipe, "--device", "cuda:1", "--temperature", "-1"], 2),
    ]
    script = (
        "import sys\nfrom sad.cli import main\nfrom sad import load_config\n"
        f"assert load_config({recipe!r}, ['--device', 'cuda:1']).device == 'cuda:1'\n"
        f"for words, code in {lines!r}:\n"
        "    assert main(words) == code, words\n"
        f"    heavy = {HEAVY!r} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    light = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert light.returncode == 0, light.stderr


HEAVY = {"torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "psutil"}


def test_the_process_returns_the_code() -> None:
    command = [sys.executable, "-m", "sad", "distil"]
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("sad: error: ")


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_leaves_is_no_bug_of_ours(buffered: bool) -> None:
    """As in ``sad --version | head``, with the reader gone before the first word."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    env = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    command = [sys.executable, "-m", "sad", "--version"]
    ended = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write_end)
    assert ended.stderr == "" and ended.returncode == 141


def test_interrupt_before_the_loop(tmp_path: Path) -> None:
    """SIGINT while models load: nothing is running yet that would save.

    The handler is set because a shell starts its background jobs, and their children, without.
    """
    script = (
        "import signal, sys, time, types\nfrom sad.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "train = types.ModuleType('sad.training.run')\n"
        "def distill(config):\n    print('loading', flush=True)\n    time.sleep(60)\n"
        "train.distill = distill\nsys.modules['sad.training.run'] = train\n"
        "sys.exit(main(['distill', 'quickstart']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("sad distill: ")
        assert process.stdout.readline() == "loading\n"
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "sad: error: interrupted; nothing new is saved\n"


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as the second of two that torchrun has started."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second_of_two")
def test_what_the_first_process_says_is_not_said_again(
    recipe: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended_by_torchrun(seconds: float) -> None:
        raise SystemExit(f"ended within {seconds} s")

    monkeypatch.setattr("time.sleep", ended_by_torchrun)
    with pytest.raises(SystemExit, match="ended within"):  # it has not ended by itself
        main(["distill", recipe, "--learning_rat", "3"])
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("second_of_two")
def test_what_no_other_process_says_is_said(
    recipe: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main(["distill", recipe, "--learning_rat", "3"]) == 2
    assert capsys.readouterr().err.startswith("sad: error: unknown key 'learning_rat'")
