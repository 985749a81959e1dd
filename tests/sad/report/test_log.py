"""The log survives kills, full disks and numbers JSON does not know, and shows what it records."""

from __future__ import annotations

import io
import json
import math
import mmap
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sad.environment import memory_now
from sad.errors import OutputError, UsageError
from sad.metrics import format_count, format_metric
from sad.report.log import RunLog, from_json, read_log, to_json
from sad.report.terminal import aligned_pairs, format_duration, waiting_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def train_record(micro_step: int, **changes: Any) -> dict[str, Any]:
    return {
        "micro_step": micro_step,
        "global_step": micro_step // 2,
        "num_updates": micro_step // 2,
        "epoch": 0.25,
        "tokens": 512 * micro_step,
        "loss": 2.5,
        "ce": 4.0,
        "kd": 2.0,
        "z": 90.0,
        "weights": {"ce": 0.3, "kd": 0.7, "feature": 0.0},
        "lr": 3e-4,
        "grad_norm": 1.25,
        "ema_decay": 0.5,
        "loss_scale": 1.0,
        "skipped": 0,
        "tokens_per_second": 12345.6,
        "rss_bytes": 2**30,
    } | changes


def eval_record(micro_step: int, nll: float) -> dict[str, Any]:
    metrics = {"eval/nll": nll, "eval/agreement": 0.5, "eval_teacher/nll": 1.0}
    return {"micro_step": micro_step, "global_step": micro_step // 2} | metrics


def open_log(run_dir: Path, stream: io.StringIO | None = None, **options: Any) -> RunLog:
    options = {"total_batches": 100} | options
    return RunLog(run_dir, stream=stream or io.StringIO(), **options)


def lines_of(run_dir: Path) -> list[str]:
    return (run_dir / "log.jsonl").read_text().splitlines()


# The file


def test_a_record_is_on_disk_before_the_next_call(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (2, 4):
        log.train(train_record(step))
        assert json.loads(lines_of(tmp_path)[-1])["micro_step"] == step
    log.close()


def test_records_say_attempt_kind_and_time(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.header([("student", "tiny")])
        log.train(train_record(2))
        log.evaluation(eval_record(2, 3.0))
        log.saved({"micro_step": 2, "path": "checkpoints/batch-000000002"})
        log.warning("two updates skipped")
        log.end({"state": "finished"})
    records = read_log(tmp_path)
    kinds = ["start", "train", "eval", "save", "warning", "end"]
    assert [record["kind"] for record in records] == kinds
    assert {record["attempt"] for record in records} == {1}
    assert all(record["time"].endswith("Z") for record in records)
    assert records[0]["header"] == [["student", "tiny"]]
    assert records[1]["weights"] == {"ce": 0.3, "kd": 0.7, "feature": 0.0}
    assert records[4]["message"] == "two updates skipped"


def test_each_process_is_an_attempt_and_the_newest_wins_a_repeated_step(tmp_path: Path) -> None:
    for attempt, (initial, steps, loss) in enumerate([(0, (2, 4, 6), 1.0), (4, (6, 8), 2.0)], 1):
        with open_log(tmp_path, initial=initial) as log:
            assert log.attempt == attempt
            log.header([])
            for step in steps:
                log.train(train_record(step, loss=loss))
            log.evaluation(eval_record(6, loss))
            log.warning("careful")
    records = read_log(tmp_path)
    train = {r["micro_step"]: r["loss"] for r in records if r["kind"] == "train"}
    assert train == {2: 1.0, 4: 1.0, 6: 2.0, 8: 2.0}
    assert [r["eval/nll"] for r in records if r["kind"] == "eval"] == [2.0]
    assert [r["resumed_from"] for r in records if r["kind"] == "start"] == [0, 4]
    assert len([r for r in records if r["kind"] == "warning"]) == 2


def test_positions_are_in_the_newest_attempts_micro_batches(tmp_path: Path) -> None:
    """Resumed twice with another batch size: 4 rows, then 8, then 2."""
    with open_log(tmp_path) as log:
        log.header([("student", "tiny")])
        for step in (4, 8, 12):
            log.train(train_record(step))
    with open_log(tmp_path, initial=4) as log:
        log.header([("student", "tiny")], rows=(4, 8))
        for step in (6, 8):
            log.train(train_record(step))
    with open_log(tmp_path, initial=32) as log:
        log.header([("student", "tiny")], rows=(8, 2))
        log.train(train_record(40))
    records = read_log(tmp_path)
    positions = [record["micro_step"] for record in records if record["kind"] == "train"]
    assert positions == [8, 16, 24, 32, 40]
    assert [r["resumed_from"] for r in records if r["kind"] == "start"] == [0, 16, 32]
    with open_log(tmp_path, initial=40) as log:
        log.header([("student", "tiny")], rows=(2, 2))
    assert [r["micro_step"] for r in read_log(tmp_path) if r["kind"] == "train"] == positions
    with open_log(tmp_path, initial=8) as log:  # from a checkpoint of the first attempt
        log.header([("student", "tiny")], rows=(4, 4))
    halves = [r["micro_step"] for r in read_log(tmp_path) if r["kind"] == "train"]
    assert halves == [4, 8, 12, 16, 20]


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_line_torn_by_a_kill_is_left_behind(tmp_path: Path, cut: int) -> None:
    with open_log(tmp_path) as log:
        log.train(train_record(2))
        log.train(train_record(4))
    whole = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(whole[: whole.index(b"\n") + 1 + cut])

    with open_log(tmp_path, initial=2) as log:
        assert log.attempt == 2
        log.train(train_record(4))
        log.train(train_record(6))
    assert [(r["attempt"], r["micro_step"]) for r in read_log(tmp_path)] == [(1, 2), (2, 4), (2, 6)]


def test_a_record_that_lacks_only_its_newline_counts(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.train(train_record(2))
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with open_log(tmp_path) as log:
        log.train(train_record(4))
    assert [r["micro_step"] for r in read_log(tmp_path)] == [2, 4]


def test_zeros_after_a_power_cut_and_foreign_lines_are_skipped(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.train(train_record(2))
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b"\0" * 64 + b'\n17\n"text"\n{"other": 1}\n\xff\xfe\n')
    assert [r["micro_step"] for r in read_log(tmp_path)] == [2]


def test_nonfinite_numbers_survive_as_strict_json(tmp_path: Path) -> None:
    values = {"loss": math.nan, "grad_norm": math.inf, "weights": {"kd": -math.inf}}
    with open_log(tmp_path) as log:
        log.train(train_record(2, **values))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads(lines_of(tmp_path)[0], parse_constant=refuse)
    assert (stored["loss"], stored["grad_norm"]) == ("NaN", "Infinity")
    record = read_log(tmp_path)[0]
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == math.inf
    assert record["weights"] == {"kd": -math.inf}


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.header([("student", "NaN")])
        log.warning("Infinity")
    start, warning = read_log(tmp_path)
    assert start["header"] == [["student", "NaN"]]
    assert warning["message"] == "Infinity"


def test_json_round_trip_keeps_every_bit_of_a_float() -> None:
    value = {"a": [0.1 + 0.2, 5e-324, math.inf], "text": "naïve \u2028 <b>"}
    assert from_json(to_json(value)) == value
    assert "\n" not in to_json({"text": "two\nlines"})


def test_a_log_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "nowhere") == []


def test_a_full_disk_is_announced_once_and_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk(io.BytesIO):
        full = False

        def write(self, data: Any) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(data)

    out, disk = io.StringIO(), Disk()
    log = open_log(tmp_path, out)
    log._file._file.close()
    monkeypatch.setattr(log._file, "_file", disk)
    for step in (2, 4, 6, 8):
        disk.full = step in (4, 6)
        log.train(train_record(step))
    assert out.getvalue().count("No space left") == 1
    assert [json.loads(line)["micro_step"] for line in disk.getvalue().splitlines()] == [2, 8]


def test_a_short_write_tears_one_line_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk(io.BytesIO):
        room = 10**6

        def write(self, data: Any) -> int:
            return super().write(bytes(data)[: self.room])

    log, disk = open_log(tmp_path), Disk()
    log._file._file.close()
    monkeypatch.setattr(log._file, "_file", disk)
    for step, room in ((2, 10**6), (4, 30), (6, 10**6)):
        disk.room = room
        log.train(train_record(step))
    (tmp_path / "log.jsonl").write_bytes(disk.getvalue())
    assert [r["micro_step"] for r in read_log(tmp_path)] == [2, 6]


def test_a_directory_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"log\.jsonl must be writable, got Not a directory"):
        open_log(tmp_path / "file" / "run")


# What people see


def test_lines_are_aligned_under_titles_that_return(tmp_path: Path) -> None:
    out = io.StringIO()
    with open_log(tmp_path, out, total_batches=1200) as log:
        for step in range(2, 52, 2):
            log.train(train_record(step, loss=math.nan if step == 6 else 10.0**step))
            log.advance(2)
    lines = out.getvalue().splitlines()
    titles = [i for i, line in enumerate(lines) if "micro-batch" in line]
    assert titles == [0, 21]
    assert len(lines) == 27
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[0].split() == (
        "micro-batch step epoch loss ce kd lr grad norm tok/s GiB elapsed left".split()
    )
    values = "6/1,200 3 0.25 nan 4.0000 2.0000 3.00e-04 1.2500 12.3k 1.00".split()
    assert lines[3].split()[: len(values)] == values


def test_a_loss_part_gets_its_column_when_it_gets_a_weight(tmp_path: Path) -> None:
    out = io.StringIO()
    with open_log(tmp_path, out) as log:
        log.train(train_record(2, feature=0.5))
        log.train(train_record(4, feature=0.5, weights={"ce": 0.3, "kd": 0.0, "feature": 0.1}))
    first, _, second, _ = out.getvalue().splitlines()
    assert "kd" in first.split() and "feature" not in first.split()
    assert "kd" not in second.split() and "feature" in second.split()


def test_a_loss_part_that_is_declared_nowhere_stands_with_the_others(tmp_path: Path) -> None:
    out = io.StringIO()
    with open_log(tmp_path, out) as log:
        log.train(train_record(2, mine=0.5, more=2.0, weights={"ce": 0.3, "kd": 0.7, "mine": 0.1}))
    assert out.getvalue().split()[3:13] == "loss ce kd mine lr grad norm tok/s GiB more".split()


def test_the_header_is_aligned(tmp_path: Path) -> None:
    out = io.StringIO()
    with open_log(tmp_path, out) as log:
        log.header([("student", "tiny"), ("memory plan", "1 GiB\nof 4")])
    assert out.getvalue() == "student      tiny\nmemory plan  1 GiB\n             of 4\n"
    assert aligned_pairs([]) == ""


def test_an_evaluation_is_one_aligned_line_per_set_of_weights(tmp_path: Path) -> None:
    out = io.StringIO()
    with open_log(tmp_path, out) as log:
        log.evaluation(eval_record(40, math.inf))
    raw, teacher = out.getvalue().splitlines()
    assert raw == "eval         at micro-batch 40: NLL     inf  agreement  50.0 %"
    assert teacher == "eval_teacher at micro-batch 40: NLL  1.0000  agreement       -"


def test_a_terminal_has_one_bar_over_the_whole_run(tmp_path: Path) -> None:
    out = Terminal()
    with open_log(tmp_path, out, initial=40, name="student, CE only") as log:
        log.header([("student", "tiny")])
        log.train(train_record(42, skipped=3))
        log.advance(60)
        log.message("a message")
    shown = out.getvalue()
    assert "micro-batch " not in shown
    last = shown.rstrip("\n").split("\r")[-1]
    assert "student, CE only 100%" in last and "100/100" in last
    postfix = "loss 2.5000 ce 4.0000 kd 2.0000 lr 3.00e-04 12.3k tok/s 1.00 GiB skipped 3"
    assert postfix[:20] in last  # the rest depends on the terminal's width
    before_message = shown.partition("a message\n")[0]
    assert before_message.endswith("\r")  # the bar was cleared, the message has a line of its own
    assert len(lines_of(tmp_path)) == 2


def test_the_bar_says_loss_parts_rate_and_memory() -> None:
    from sad.report.terminal import bar_postfix

    text = bar_postfix(train_record(42, skipped=3, cuda_used_bytes=2**31))
    assert text == "loss 2.5000 ce 4.0000 kd 2.0000 lr 3.00e-04 12.3k tok/s 2.00 GiB skipped 3"


def test_the_bar_starts_with_the_work_and_closes_twice(tmp_path: Path) -> None:
    out = Terminal()
    log = open_log(tmp_path, out)
    log.message("loading models")
    assert out.getvalue() == "loading models\n"
    log.advance()
    assert "1/100" in out.getvalue() or "0/100" in out.getvalue()
    log.end({"state": "stopped"})
    log.close()
    log.close()


def test_elsewhere_moving_the_bar_shows_nothing(tmp_path: Path) -> None:
    out = io.StringIO()
    with open_log(tmp_path, out) as log:
        log.advance(7)
    assert out.getvalue() == ""
    assert lines_of(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (950, "950"),
        (999, "999"),
        (1000, "1.00k"),
        (12345.6, "12.3k"),
        (950_000, "950k"),
        (999_600, "1.00M"),
        (4_521_984, "4.52M"),
        (7e9, "7.00B"),
        (math.nan, "nan"),
    ],
)
def test_counts_have_three_digits(value: float | None, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("nll", 5.03214, "5.0321"),
        ("nll", None, "-"),
        ("nll", math.inf, "inf"),
        ("agreement", 0.5627, "56.3 %"),
        ("accuracy", 1.0, "100.0 %"),
        ("perplexity", 152.131, "152.13"),
        ("perplexity", 12345.6, "12,346"),
        ("perplexity", 3e30, "3.00e+30"),
        ("loss", -123456.0, "-1.23e+05"),
    ],
)
def test_metrics_read_like_metrics(name: str, value: float | None, text: str) -> None:
    assert format_metric(name, value) == text


def test_durations() -> None:
    assert [format_duration(s) for s in (0, 61.9, 36000)] == ["0:00:00", "0:01:01", "10:00:00"]


def test_memory_grows_with_what_is_held() -> None:
    before = memory_now()
    held = mmap.mmap(-1, 2**26)  # never memory that was freed before
    held.write(b"x" * len(held))
    after = memory_now()
    assert after["rss_bytes"] - before["rss_bytes"] > len(held) // 2
    if sys.platform == "linux":
        assert after["rss_peak_bytes"] >= after["rss_bytes"] - 2**22  # counted per thread, in lots


# Trackers


class FakeTracker:
    """Stands for the wandb and trackio modules, and for TensorBoard's writer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.opened = (args, options)
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def init(self, **options: Any) -> None:
        self.opened = ((), options)

    def log(self, scalars: dict[str, float], step: int) -> None:
        self.logged.append((scalars, step))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.logged.append(({name: value}, step))

    def finish(self) -> None:
        self.finished += 1

    close = finish


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_hosted_trackers_get_scalars_by_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, package, tracker)
    with open_log(tmp_path / "first", report_to=(package,)) as log:
        log.train(train_record(2))
        log.evaluation(eval_record(2, 3.0))
    assert tracker.opened == ((), {"project": "sad", "name": "first"})
    (train, at), (evaluation, _) = tracker.logged
    assert at == 2 and train["train/loss"] == 2.5 and train["weights/kd"] == 0.7
    assert evaluation == {"eval/nll": 3.0, "eval/agreement": 0.5, "eval_teacher/nll": 1.0}
    assert tracker.finished == 1

    with open_log(tmp_path / "first", report_to=(package,)):
        assert tracker.opened[1]["name"] == "first (attempt 2)"


def test_tensorboard_purges_the_steps_that_are_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[FakeTracker] = []

    def summary_writer(*args: Any, **options: Any) -> FakeTracker:
        writers.append(FakeTracker(*args, **options))
        return writers[-1]

    module = SimpleNamespace(SummaryWriter=summary_writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)  # type: ignore[arg-type]
    with open_log(tmp_path, initial=40, report_to=("tensorboard",)) as log:
        log.train(train_record(42))
    (writer,) = writers
    assert writer.opened == ((str(tmp_path / "tensorboard"),), {"purge_step": 41})
    assert ({"train/lr": 3e-4}, 42) in writer.logged
    assert writer.finished == 1


@pytest.mark.parametrize(
    ("package", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_missing_tracker_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=f"got '{package}', which is missing.*pip install"):
        open_log(tmp_path, report_to=(package,))


class FailingTracker(FakeTracker):
    """A tracker without a network: the call named ``at`` raises."""

    at = ""
    error: type[BaseException] = ConnectionError

    def _fail(self, call: str) -> None:
        if call == self.at:
            raise self.error("no route to host\ndetails")

    def init(self, **options: Any) -> None:
        self._fail("init")
        super().init(**options)

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._fail("log")
        super().log(scalars, step)

    def finish(self) -> None:
        self._fail("finish")
        super().finish()


@pytest.mark.parametrize("error", [ConnectionError, SystemExit])
@pytest.mark.parametrize("at", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: type[BaseException]
) -> None:
    failing, working = FailingTracker(), FakeTracker()
    failing.at, failing.error = at, error
    monkeypatch.setitem(sys.modules, "wandb", failing)
    monkeypatch.setitem(sys.modules, "trackio", working)
    shown = io.StringIO()
    with open_log(tmp_path, shown, report_to=("wandb", "trackio")) as log:
        for step in (2, 4):
            log.train(train_record(step))
    records = read_log(tmp_path)
    (warning,) = (r["message"] for r in records if r["kind"] == "warning")
    assert warning.startswith(f"wandb fails, got {error.__name__}: no route to host; the run goes")
    assert f"warning: {warning}" in shown.getvalue()
    assert len([r for r in records if r["kind"] == "train"]) == len(working.logged) == 2
    assert working.finished == 1


def test_a_tracker_whose_import_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio.py").write_text("raise AttributeError('its protobuf is another')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with open_log(tmp_path, report_to=("trackio",)) as log:
        log.train(train_record(2))
    (warning,) = (r["message"] for r in read_log(tmp_path) if r["kind"] == "warning")
    assert warning.startswith("trackio fails, got AttributeError: its protobuf is another; the run")


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_who_waits_at_a_terminal_sees_a_bar(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    assert list(waiting_bar(range(3), "scoring the teacher", delay=0)) == [0, 1, 2]
    assert ("scoring the teacher" in shown.getvalue()) == shown.isatty()
