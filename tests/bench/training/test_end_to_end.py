"""``bench end_to_end`` at toy sizes: all contenders do the same work on the same data."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sad_kernels import Head, Objective, TeacherHidden, linear_distill_loss
from transformers import AutoModelForCausalLM

from bench.__main__ import main
from bench.peers.base import Unsupported
from bench.training import trainers
from bench.training.end_to_end import measure, run_in_subprocess, table
from bench.training.task import GPU, QUICKSTART, Setup, Task, prepare, quality, random_model, shape
from bench.training.trainers import CONTENDERS, NAIVE, OURS, RunMonitor, attempt, naive_sums
from sad.optim.precision import Precision
from sad.training.evaluate import evaluate_student
from sad.training.student import build_student

TINY = Setup(
    student=shape(32, 1, 2, 1, 16, 64),
    vocab=4608,
    rows=2,
    length=64,
    warmup=1,
    steps=4,
    rounds=2,
    eval_rows=4,
    documents=10,
    threads=1,
)

Run = dict[str, Any]


class Measured:
    """A measurement in this process, which keeps all of its runs."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, int], Run] = {}
        self.result = measure(TINY, self._run)

    def _run(self, setup: Setup, name: str, seed: int) -> Run:
        self.runs[name, seed] = attempt(setup, name, seed)
        return self.runs[name, seed]

    def finished(self, seed: int) -> dict[str, Run]:
        runs = {name: run for (name, number), run in self.runs.items() if number == seed}
        return {name: run for name, run in runs.items() if run["status"] == "ok"}


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("rows")))
        yield


@pytest.fixture(scope="module")
def measured() -> Measured:
    return Measured()


@pytest.fixture(scope="module")
def task() -> Task:
    return prepare(TINY, 0)


@pytest.mark.slow
def test_who_can_run_does(measured: Measured) -> None:
    expected = {OURS, NAIVE}
    expected |= {"transformers.Trainer"} if find_spec("accelerate") else set()
    expected |= {"trl GKDTrainer"} if find_spec("trl") else set()
    for seed in range(TINY.rounds):
        assert measured.finished(seed).keys() == expected, measured.runs
    for row in measured.result["rows"]:
        if row["contender"] not in expected:
            assert row["status"] == "skipped"
            assert "is not installed" in row["reason"] or "student writes" in row["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(TINY.rounds))
def test_losses_are_the_same_at_every_step(measured: Measured, seed: int) -> None:
    runs = measured.finished(seed)
    ours = runs[OURS]["losses"]
    assert len(ours) == TINY.warmup + TINY.steps
    assert len(set(ours)) == len(ours)
    for name, run in runs.items():
        assert run["losses"] == pytest.approx(ours, rel=1e-5), name
        for score in ("kl", "nll", "teacher_nll"):
            assert run[score] == pytest.approx(runs[OURS][score], rel=1e-5), name


def test_the_first_loss_is_the_objective_s(measured: Measured, task: Task) -> None:
    """The first step's loss agrees with float64, computed from the models alone."""
    batch = task.inputs.train_rows.batch(task.order[: TINY.rows])
    keep = batch.labels != -100
    with torch.no_grad():
        s, t = (m(batch.input_ids).logits[keep].double() for m in (task.student, task.teacher))
    ce = F.cross_entropy(s, batch.labels[keep])
    kd = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    expected = float(0.1 * ce + 0.9 * kd)
    assert measured.runs[NAIVE, 0]["losses"][0] == pytest.approx(expected, rel=1e-5)
    assert measured.runs[OURS, 0]["losses"][0] == pytest.approx(expected, rel=1e-5)


def test_the_naive_loss_leaves_out_tokens_without_a_label() -> None:
    """Tokens without a label, such as padding, which few rows here have."""
    draw = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(2, 6, size, generator=draw) for size in (8, 12))
    heads = [Head(torch.randn(50, size, generator=draw)) for size in (8, 12)]
    labels = torch.randint(50, (2, 6), generator=draw)
    labels[1, 2:] = -100
    teacher = TeacherHidden(teacher_hidden, heads[1])
    objective = Objective(ce_weight=1.0, temperature=2.0)
    ours = linear_distill_loss(hidden, heads[0], labels, teacher, objective)
    ce, kd, count = naive_sums(heads[0](hidden), heads[1](teacher_hidden), labels, 2.0)
    assert count == ours.num_tokens == 8
    torch.testing.assert_close(ce, ours.ce)
    torch.testing.assert_close(kd, ours.kd)


def test_all_read_the_same_tokens(measured: Measured, task: Task) -> None:
    ids = task.inputs.train_rows.batch(task.order).input_ids
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
    assert {run["witness"] for run in measured.finished(0).values()} == {digest}
    assert len({run["witness"] for run in measured.finished(1).values()} | {digest}) == 2


def test_who_reads_other_tokens_has_failed(measured: Measured) -> None:
    def run(setup: Setup, name: str, seed: int) -> Run:
        other = {"witness": "other"} if (name, seed) == (NAIVE, 1) else {}
        return measured.runs.get((name, seed), measured.runs[name, 0]) | other

    row = measure(TINY, run)["rows"][1]
    assert (row["status"], row["reason"]) == ("failed", f"read other tokens than {OURS}")


def test_rounds_are_interleaved_and_every_second_is_reversed(measured: Measured) -> None:
    calls = []

    def run(_: Setup, name: str, seed: int) -> Run:
        calls.append((name, seed))
        return {"status": "failed", "reason": "no"}

    measure(replace(TINY, rounds=3), run)
    names = list(CONTENDERS)
    assert calls == [(n, i) for i in range(3) for n in (names[::-1] if i == 1 else names)]


def test_medians_and_rounds(measured: Measured) -> None:
    row = measured.result["rows"][0]
    speeds = [measured.runs[OURS, seed]["tokens_per_s"] for seed in range(2)]
    assert row["contender"] == OURS
    assert row["tokens_per_s_rounds"] == speeds
    assert row["tokens_per_s"] == pytest.approx(sum(speeds) / 2)
    assert row["peak_mib"] >= row["start_mib"] > 0
    losses = [measured.runs[OURS, seed]["losses"] for seed in range(2)]
    assert row["quality"]["loss_first"] == pytest.approx((losses[0][0] + losses[1][0]) / 2)
    assert row["quality"]["loss_last"] == pytest.approx((losses[0][-1] + losses[1][-1]) / 2)
    assert row["quality"]["kl_apart"] == 0
    assert json.loads(json.dumps(measured.result)) == measured.result


def test_a_failure_keeps_its_row_and_reason(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no memory\nleft")

    def unable(*_: Any) -> None:
        raise Unsupported("too old")

    known, gkd = dict(measured.runs), "trl GKDTrainer"
    ways = {NAIVE: broken, gkd: unable}
    changed = {name: CONTENDERS[name]._replace(train=way) for name, way in ways.items()}
    monkeypatch.setattr(trainers, "CONTENDERS", CONTENDERS | changed)
    made = []

    def run(setup: Setup, name: str, seed: int) -> Run:
        if name in ways:
            made.append(name)
            return attempt(setup, name, seed)
        return known.get((name, seed), known[name, 0])

    result = measure(TINY, run)
    rows = {row["contender"]: row for row in result["rows"]}
    assert list(rows) == list(CONTENDERS)
    assert rows[NAIVE]["status"] == "failed"
    assert rows[NAIVE]["reason"] == "RuntimeError: no memory left"
    assert rows[gkd]["status"] == "skipped"
    assert (made.count(NAIVE), made.count(gkd)) == (2, 1)
    assert rows[OURS]["status"] == "ok"
    lines = table(result)
    assert f"| {NAIVE} | failed | - | - |" in lines
    assert f"{NAIVE}: RuntimeError: no memory left." in lines


def test_a_measurement_that_is_cut_off_leaves_what_it_had(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second, reversed round: two of three trainers have both rounds."""
    path, words = tmp_path / "folder" / "result.json", ["ours", "naive", "transformers"]

    def run(setup: Setup, name: str, seed: int) -> Run:
        if (name, seed) == (OURS, 1):
            raise KeyboardInterrupt
        return measured.runs[NAIVE if name == "transformers.Trainer" else name, seed]

    monkeypatch.setattr("bench.training.end_to_end.CPU", TINY)
    monkeypatch.setattr("bench.training.end_to_end.run_in_subprocess", run)
    asked = ["--rounds", "2", "--only", ",".join(words), "--out", str(path)]
    with pytest.raises(KeyboardInterrupt):
        main(["end_to_end", *asked])
    result = json.loads(path.read_text())
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    assert result["run"]["command"] == f"python -m bench end_to_end {' '.join(asked[:4])}"
    assert result["schema"] == 1 and result["machine"] and result["versions"]
    assert result["setup"]["rounds"] == 2
    assert result["contenders"] == [OURS, NAIVE, "transformers.Trainer"]
    ours, *others = result["rows"]
    assert ours["tokens_per_s_rounds"] == [measured.runs[OURS, 0]["tokens_per_s"]]
    assert ours["tokens_per_s"] == ours["tokens_per_s_rounds"][0]
    assert [len(row["quality"]["kl_rounds"]) for row in others] == [2, 2]
    assert table(result)[2].startswith(f"| {OURS} | {ours['tokens_per_s']:,.0f} (")
    done = f"{OURS}: 1; {NAIVE}: 2; transformers.Trainer: 2"
    assert f"Of 2 rounds there are: {done}." in table(result)


def test_every_result_on_the_way_has_a_table(measured: Measured) -> None:
    kept: list[Run] = []

    def run(setup: Setup, name: str, seed: int) -> Run:
        return measured.runs.get((name, seed), measured.runs[name, 0])

    last = measure(TINY, run, keep=lambda result: kept.append(json.loads(json.dumps(result))))
    assert len(kept) == TINY.rounds * len(CONTENDERS)
    assert kept[-1] == json.loads(json.dumps(last))
    assert not any(line.startswith("Of ") for line in table(last))
    for i, result in enumerate(kept[:-1], 1):
        names = list(CONTENDERS)[:i]
        assert [row["contender"] for row in result["rows"]] == names
        lines = table(result)
        assert [line.split(" | ")[0] for line in lines[2 : 2 + len(names)]] == [
            f"| {name}" for name in names
        ]


def test_a_contender_that_fails_in_a_later_round_keeps_the_first(measured: Measured) -> None:
    def run(setup: Setup, name: str, seed: int) -> Run:
        if (name, seed) == (NAIVE, 1):
            return {"status": "failed", "reason": "its process ended with -9: "}
        return measured.runs[name, seed]

    result = measure(TINY, run, only=("ours", "naive"))
    row = result["rows"][1]
    assert row["status"] == "failed"
    assert row["tokens_per_s_rounds"] == [measured.runs[NAIVE, 0]["tokens_per_s"]]
    lines = table(result)
    assert lines[3].startswith(f"| {NAIVE} | {row['tokens_per_s']:,.0f} (1.00) |")
    assert f"Of 2 rounds there are: {OURS}: 2; {NAIVE}: 1." in lines
    assert f"{NAIVE}: its process ended with -9: ." in lines


def test_some_contenders_without_ours(measured: Measured) -> None:
    def run(setup: Setup, name: str, seed: int) -> Run:
        other = {"witness": "other"} if name == "transformers.Trainer" else {}
        return measured.runs[NAIVE, seed] | other

    result = measure(TINY, run, only=("transformers", "naive"), rounds=1)
    assert result["setup"]["rounds"] == 1
    assert [row["status"] for row in result["rows"]] == ["ok", "failed"]
    assert result["rows"][1]["reason"] == f"read other tokens than {NAIVE}"
    alone = measure(TINY, run, only=("transformers",), rounds=1)
    assert len(table(alone)) == 3 and "(1.00)" not in table(alone)[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["end_to_end", "--only", "ours,theirs"], "--only must be some of ours, naive, .*'theirs'"),
        (["end_to_end", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["end_to_end", "--limits", "24"], "--limits must come with batches, got end_to_end"),
        (["batches", "--rounds", "2"], "--rounds must come with end_to_end, got batches"),
        (
            ["loss", "--only", "ours"],
            "--only must come with end_to_end or batches or teachers, got loss",
        ),
        (["ce", "--rounds", "2"], "--rounds must come with end_to_end, got ce; leave it out"),
    ],
)
def test_options_that_cannot_be_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main(words)


def test_limits_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["batches", "--limits", "24,all"])
    assert "must be whole numbers, got '24,all'; write them like 24,48" in capsys.readouterr().err


def test_the_table(measured: Measured) -> None:
    result = json.loads(json.dumps(measured.result))
    ours, naive = result["rows"][:2]
    ours |= {"tokens_per_s": 2500.0, "peak_mib": 1234.4, "start_mib": 800.0}
    ours["quality"] |= {"kl": 1.5, "nll": 2.25}
    naive |= {"tokens_per_s": 1000.0}
    lines = table(result)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert lines[2] == f"| {OURS} | 2,500 (2.50) | 1,234 (800) | 1.5000, 2.2500 |"
    assert lines[3].startswith(f"| {NAIVE} | 1,000 (1.00) |")
    for row in result["rows"]:
        assert any(row["contender"] in line for line in lines)
    noise = next(line for line in lines if line.startswith("In one round"))
    kl = measured.result["rows"][0]["quality"]["kl_rounds"]
    assert f"{max(kl) - min(kl):.1e}" in noise


def test_a_table_without_quality(measured: Measured) -> None:
    """Without ``eval_rows``, as on a GPU, there is no quality."""

    def run(setup: Setup, name: str, seed: int) -> Run:
        known = measured.runs.get((name, seed), measured.runs[name, 0])
        return {key: value for key, value in known.items() if "kl" not in key and "nll" not in key}

    lines = table(measure(TINY, run))
    assert lines[2].endswith("| - |")
    assert not any(line.startswith("In one round") for line in lines)


def test_quality_is_what_sad_s_evaluation_finds(measured: Measured) -> None:
    task = prepare(TINY, 0)  # its own: scoring leaves the student in another mode
    config = replace(task.config, max_eval_rows=TINY.eval_rows)
    precision = Precision(config, "cpu")
    student = build_student(config, task.student, TINY.vocab, precision)
    batches = task.inputs.eval_batches(config)
    theirs = evaluate_student(student, task.inputs.teacher, batches, {"eval": nullcontext})
    scores = quality(task)
    assert scores["kl"] == pytest.approx(theirs["eval/kl"], rel=1e-5)
    assert scores["nll"] == pytest.approx(theirs["eval/nll"], rel=1e-5)
    assert scores["teacher_nll"] < scores["nll"] - 1
    trained = measured.runs[OURS, 0]
    assert trained["nll"] < scores["nll"] - 0.01
    assert trained["kl"] < scores["kl"] - 0.01


def test_the_widened_teacher_is_the_quickstart_s(task: Task) -> None:
    known = 4096
    quickstart = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32)
    held_out = task.inputs.eval_rows.batch(range(4)).input_ids
    with torch.no_grad():
        logits, theirs = task.teacher(held_out).logits, quickstart(held_out).logits
    assert logits.shape[-1] == TINY.vocab
    torch.testing.assert_close(logits[..., :known], theirs)
    mass = logits.softmax(-1)[..., known:].sum(-1)
    in_qwen = mass * (151936 - known) / (TINY.vocab - known)
    assert 0 < in_qwen.mean() < 1e-3


def test_a_seed_gives_the_same_student_again(task: Task) -> None:
    again, other = (random_model(TINY.student, TINY, seed).state_dict() for seed in (0, 1))
    for name, tensor in task.student.state_dict().items():
        assert torch.equal(tensor, again[name])
    assert not torch.equal(other["lm_head.weight"], again["lm_head.weight"])


def test_the_clock_leaves_out_the_warm_up(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = SimpleNamespace(now=0.0)
    monkeypatch.setattr(trainers, "time", SimpleNamespace(perf_counter=lambda: throughput.now))
    monitor = RunMonitor(task)
    monitor.begin()
    for step in range(TINY.warmup + TINY.steps):
        throughput.now += 100 if step < TINY.warmup else 2
        task.student(torch.zeros(TINY.rows, TINY.length, dtype=torch.int64))
        monitor.step()
    assert monitor.result()["tokens_per_s"] == TINY.rows * TINY.length / 2


def test_the_peak_is_of_the_steps_alone(task: Task) -> None:
    _take(256)
    monitor = RunMonitor(task)
    monitor.begin()
    for _ in range(TINY.warmup + TINY.steps):
        task.student(torch.zeros(TINY.rows, TINY.length, dtype=torch.int64))
        _take(128)
        monitor.step()
    result = monitor.result()
    assert 120 < result["peak_mib"] - result["start_mib"] < 240


def _take(mib: int) -> None:
    """Use fresh memory and give it back. A tensor's may be some that the process still holds."""
    with mmap.mmap(-1, mib << 20) as memory:
        for page in range(0, mib << 20, mmap.PAGESIZE):
            memory[page] = 1


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_in_subprocess(TINY, OURS, 0)
    assert run["status"] == "ok", run["reason"]
    assert run["losses"] == pytest.approx(measured.runs[OURS, 0]["losses"], rel=1e-5)
    assert run["peak_mib"] >= run["start_mib"] > 50
    monkeypatch.setattr("sys.executable", "false")
    assert run_in_subprocess(TINY, OURS, 0)["status"] == "failed"
    monkeypatch.setattr("sys.executable", "no such program")
    assert run_in_subprocess(TINY, OURS, 0) == {
        "status": "failed",
        "reason": "FileNotFoundError of its process",
    }


def test_too_little_text_is_said() -> None:
    run = attempt(replace(TINY, steps=100_000), OURS, 0)
    assert run["status"] == "failed"
    assert "take more of them" in run["reason"]


def test_the_shapes_for_a_gpu_are_those_of_qwen() -> None:
    setup = replace(GPU, device="meta")
    assert setup.teacher is not None
    student, teacher = (random_model(s, setup, 0) for s in (setup.student, setup.teacher))
    assert student.num_parameters() == 596_049_920
    assert teacher.num_parameters() == 4_022_468_096
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
