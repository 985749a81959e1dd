"""The report: one page that needs nothing else, from any state of a run directory, and harmless."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sad.errors import OutputError, UsageError
from sad.report.log import RunLog
from sad.report.page import write_report
from sad.report.panels import History, filled_panels
from sad.report.results import format_results, verdict

HOSTILE = (
    "</pre></style><script>alert('x')</script><img src=http://x.invalid/ onerror=\"alert(1)\">&$x_$"
)

TEACHER = {
    "name": "teacher",
    "parameters": 4_521_984,
    "perplexity": math.exp(4.38),
    "nll": 4.38,
    "kl": None,
    "agreement": None,
    "accuracy": 0.362,
    "bits_per_byte": 1.812,
    "entropy": 4.2,
}
BASELINE = {
    "name": "student, CE only",
    "parameters": 372_352,
    "perplexity": math.exp(5.38),
    "nll": 5.38,
    "kl": 0.8,
    "agreement": 0.45,
    "accuracy": 0.279,
    "bits_per_byte": 2.189,
    "entropy": 5.1,
}
DISTILLED = BASELINE | {
    "name": "student, distilled",
    "perplexity": math.exp(5.03),
    "nll": 5.03,
    "kl": 0.5,
    "agreement": 0.56,
    "accuracy": 0.31,
}
EMA = DISTILLED | {"name": "student, distilled (EMA)", "nll": 4.98, "perplexity": math.exp(4.98)}
ROWS = [TEACHER, BASELINE, DISTILLED, EMA]


class Page(HTMLParser):
    """What a browser would make of a page: balanced tags, attributes, text."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def train_record(micro_step: int, **changes: Any) -> dict[str, Any]:
    progress = micro_step / 80
    record = {
        "micro_step": micro_step,
        "global_step": micro_step // 2,
        "num_updates": micro_step // 2,
        "epoch": progress,
        "tokens": 512 * micro_step,
        "loss": 4.0 - progress,
        "ce": 6.0 - progress,
        "kd": 2.0 - progress,
        "z": 90.0,
        "weights": {"ce": 0.3, "kd": 0.7, "feature": 0.1 * max(0.0, progress - 0.3)},
        "feature": 0.4,
        "lr": 3e-4 * (1 - progress),
        "grad_norm": 1.0 + progress,
        "ema_decay": 0.5,
        "loss_scale": 1.0,
        "skipped": 0,
        "tokens_per_second": 12000.0,
        "rss_bytes": 2**30,
        "rss_peak_bytes": 3 * 2**29,
    }
    return record | changes


def eval_record(micro_step: int, **changes: Any) -> dict[str, Any]:
    nll = 6.0 - micro_step / 80
    scores = {"nll": nll, "perplexity": math.exp(nll), "kl": nll / 10, "agreement": 1 / nll}
    scores |= {"accuracy": 0.9 / nll, "bits_per_byte": nll / 3, "entropy": nll + 0.1}
    record: dict[str, Any] = {"micro_step": micro_step, "global_step": micro_step // 2}
    for prefix in ("eval", "eval_ema"):
        record |= {f"{prefix}/{name}": value for name, value in scores.items()}
    return record | changes


def write_log(
    run_dir: Path, steps: range, initial: int = 0, eval_every: int = 20, **changes: Any
) -> None:
    with RunLog(run_dir, total_batches=80, initial=initial, stream=io.StringIO()) as log:
        log.header([("student", "llama, 0.37M parameters"), ("schedule", "80 micro-batches")])
        for step in steps:
            log.train(train_record(step, **changes))
            if step % eval_every == 0:
                log.evaluation(eval_record(step))
        log.end({"state": "finished", "micro_step": steps.stop})


def make_run(run_dir: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """A run as ``sad distill`` leaves it: resumed once, with a baseline, exports and samples."""
    write_log(run_dir, range(4, 60, 4))
    write_log(run_dir, range(44, 84, 4), initial=40)
    write_log(run_dir / "baseline", range(4, 84, 4))
    samples = [
        {"prompt": "class Reader:\n    def read(", "text": "self):", "model": "student, distilled"}
    ]
    environment = {"python": "3.11", "cores": 2}
    run = {"results": rows, "samples": samples, "environment": environment}
    run["scored"] = {"rows": 12, "targets": 3456}
    (run_dir / "run.json").write_text(json.dumps(run))
    (run_dir / "status.json").write_text('{"state": "running", "code": 0, "message": ""}')
    (run_dir / "config.yaml").write_text("student: tiny\nmax_grad_norm: 1.5\n")
    for name, weights in (("best", "ema"), ("final", "raw")):
        (run_dir / name).mkdir()
        facts = {"metric": "eval/nll", "value": 4.98, "weights": weights, "micro_step": 80}
        facts["micro_batch_rows"] = 8
        (run_dir / name / "sad.json").write_text(json.dumps(facts))
    return run_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run and its page, drawn once for the tests that only look."""
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "quickstart")
    return run_dir, page_of(run_dir)


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def svgs_of(html: str) -> dict[str, str]:
    """Title of each plot -> its SVG, which must be XML by itself."""
    svgs = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    return {ET.fromstring(svg).attrib["aria-label"]: svg for svg in svgs}


# A whole run


def test_a_finished_run_has_everything_on_one_page(finished: tuple[Path, str]) -> None:
    run_dir, html = finished
    page = Page(html)
    for text in (
        "quickstart",
        "finished · 80 micro-batches · 40 optimizer steps · 41.0k tokens in 0:00:0",
        "2 attempts",
        "peak memory 1.50 GiB",
        "Distillation helped",
        "student, distilled (EMA)",
        "llama, 0.37M parameters",
        "max_grad_norm: 1.5",
        "python",
        f"from_pretrained({str(run_dir / 'best')!r})",
        "EMA weights after micro-batch 80 of 8 rows, eval/nll 4.9800",
        "tokenizer('    def read(', return_tensors=\"pt\")",
    ):
        assert text in page.text, text
    assert re.search(r"peak memory 1.50 GiB · \d{4}-\d\d-\d\d \d\d:\d\d UTC", page.text)
    assert "All on held-out text: 12 rows with 3,456 targets." in page.text


def test_prompt_and_written_text_are_told_apart(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    samples = [
        {"prompt": "class Reader:", "text": " def read(self):", "model": "final"},
        {"prompt": "import os", "text": "", "model": "final"},
        {"prompt": "import re", "text": "\n" * 64, "model": "final"},
        {"prompt": "import io", "text": "\n" * 61 + "    x\n\n\ny", "model": "final"},
    ]
    run = json.loads((run_dir / "run.json").read_text()) | {"samples": samples}
    (run_dir / "run.json").write_text(json.dumps(run))
    section = page_of(run_dir).partition("What it writes")[2].partition("</section>")[0]
    boxes = re.findall(
        r"<figcaption>(.*?)</figcaption>\s*<(\w+)[^>]*>(.*?)</\2>", section, re.DOTALL
    )
    assert boxes == [
        ("Prompt", "pre", "class Reader:"),
        ("Written by the student", "pre", " def read(self):"),
        ("Prompt", "pre", "import os"),
        ("Written by the student", "p", "Nothing: it ended the text at once."),
        ("Prompt", "pre", "import re"),
        ("Written by the student", "p", "White space alone."),
        ("Prompt", "pre", "import io"),
        ("Written by the student", "pre", "\n[60 blank lines]\n    x\n\n\ny"),
    ]


@pytest.mark.slow
def test_no_box_is_empty(tmp_path: Path) -> None:
    """No text of nothing; plots of one dot, whose number is in the table, are folded away."""
    run_dir = make_run(tmp_path)
    assert "<h2>On held-out text</h2>" in page_of(run_dir)
    once = tmp_path / "once"
    write_log(once, range(4, 84, 4), eval_every=80)
    assert "<h2>On held-out text</h2>" in page_of(once)  # there is no table yet
    (once / "run.json").write_text((run_dir / "run.json").read_text())
    html = page_of(once)
    assert "<h2>On held-out text</h2>" not in html
    folded = html.partition("<details><summary>On held-out text: one")[2].partition("</details>")[0]
    assert "Held-out loss" in svgs_of(folded)
    for page in (html, page_of(run_dir)):
        assert not re.findall(r"<(pre|dl|ul|figure|p|td|figcaption|section)[^>]*>\s*</\1>", page)


def test_a_narrow_screen_has_the_numbers_that_matter_first(finished: tuple[Path, str]) -> None:
    """At 420 pixels each model is a card: the student's first, perplexity, KL, agreement on top."""
    html = finished[1]
    narrow = html.partition("@media (max-width: 40rem) {")[2].partition("</style>")[0]
    assert ".results tr.chosen { order: -1; }" in narrow
    assert ".results .headline { order: -1;" in narrow and "attr(data-title)" in narrow
    row = html.partition('<tr class="chosen">')[2].partition("</tr>")[0]
    cells = re.findall(r'<td(?: class="(\w+)")? data-title="([^"]+)">', row)
    headline = ["perplexity", "KL", "agreement"]
    assert [title for rank, title in cells if rank == "headline"] == headline
    assert len(cells) == 8


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    write_log(tmp_path, range(20, 21))
    message = "gradients must be finite, got 3 updates in a row"
    (tmp_path / "status.json").write_text(json.dumps({"state": "failed", "message": message}))
    page = Page(page_of(tmp_path))
    assert message in page.text and "No results yet" not in page.text


def test_the_page_loads_nothing_and_runs_nothing(finished: tuple[Path, str]) -> None:
    page = Page(finished[1])
    assert "script" not in page.tags
    assert not page.values("src")
    assert all(target.startswith("#") for target in page.values("href"))
    assert all(target.startswith("#") for target in page.values("xlink:href"))
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.values("content")


def test_all_text_is_escaped(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "<script>alert('x')", [EMA | {"name": HOSTILE}])
    weights = {"weights": {"ce": 1.0, HOSTILE: 1.0}, HOSTILE: 2.0}
    with RunLog(run_dir, total_batches=80, initial=80, stream=io.StringIO()) as log:
        log.header([(HOSTILE, HOSTILE)])
        log.train(train_record(80, **weights))
        log.warning(HOSTILE)
    run = json.loads((run_dir / "run.json").read_text())
    run["samples"] = [{"prompt": HOSTILE, "text": HOSTILE * 2, "model": HOSTILE}]
    run["environment"] = {HOSTILE: HOSTILE}
    (run_dir / "run.json").write_text(json.dumps(run))
    (run_dir / "config.yaml").write_text(f"student: |\n  {HOSTILE}\n")
    (run_dir / "best" / "sad.json").write_text(
        json.dumps({"metric": HOSTILE, "value": 1.0, "weights": "raw", "micro_step": 80})
    )

    html = page_of(run_dir)
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert not page.values("onerror")
    assert page.text.count("<script>alert('x')</script>") >= 12
    weights_plot = ET.fromstring(svgs_of(html)["Weights of the loss terms"])
    assert HOSTILE in [element.text for element in weights_plot.iter()]


def test_every_quantity_has_a_plot_with_units(finished: tuple[Path, str]) -> None:
    run_dir, html = finished
    svgs = svgs_of(html)
    counts = {
        "Held-out loss": "nats per target",
        "KL to the teacher": "nats per target",
        "Top-1 agreement with the teacher": "% of targets",
        "Top-1 accuracy": "% of targets",
        "Entropy of the predictions": "nats per target",
        "Training loss and its parts": "per target, token or sequence",
        "Learning rate": "learning rate",
        "Weights of the loss terms": "weight",
        "Gradient norm": "norm before clipping",
        "Throughput": "tokens per second",
        "Memory": "GiB",
        "Decay of the averaged weights": "decay per update",
    }
    assert list(svgs) == list(counts)
    for title, unit in counts.items():
        assert f">{unit}<" in svgs[title] and ">micro-batches<" in svgs[title]
    legend = ("student", "student, EMA", "CE only", "CE only, EMA", "teacher", "resumed")
    assert all(f">{label}<" in svgs["Held-out loss"] for label in legend)
    parts = ("loss", "CE", "KD", "feature", "CE, CE-only run", "resumed")
    assert all(f">{label}<" in svgs["Training loss and its parts"] for label in parts)
    assert ">clipped at 1.5<" in svgs["Gradient norm"]
    names = {path.name for path in (run_dir / "plots").iterdir()}
    assert len(names) == 12 and {"loss.png", "eval_nll.png"} <= names
    for path in (run_dir / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_parts_of_the_loss_can_be_told_apart() -> None:
    """However many there are: colours are fewer."""
    names = ["ce", *(f"part {i}" for i in range(9))]
    record = {"micro_step": 1, "loss": 1.0, "weights": dict.fromkeys(names, 1)}
    history = History([record | dict.fromkeys(names, 1.0)], [])
    (lines,) = (p.lines for p in filled_panels(history, None, {}) if p.name == "loss")
    assert len({(line.colour, str(line.dash)) for line in lines}) == len(lines) == 11


def test_plots_follow_the_colours_of_the_page(finished: tuple[Path, str]) -> None:
    html = finished[1]
    for svg in svgs_of(html).values():
        assert not re.findall(r"#[0-9a-f]{3,8}\b(?=[;\"'])|\bblack\b|\bwhite\b|rgb\(", svg)
        for name in re.findall(r"var\(--([a-z]+)\)", svg):
            assert html.count(f"--{name}: #") == 2  # light and dark


def test_no_identifier_occurs_twice_and_none_dangles(finished: tuple[Path, str]) -> None:
    page = Page(finished[1])
    ids = page.values("id")
    assert ids and len(ids) == len(set(ids))
    targets = {target[1:] for target in page.values("xlink:href")}
    targets |= {
        m for value in page.values("clip-path") for m in re.findall(r"url\(#(\w+)\)", value)
    }
    assert targets == set(ids)


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)

    def everything() -> dict[str, bytes]:
        page = write_report(run_dir)
        return {path.name: path.read_bytes() for path in [page, *(run_dir / "plots").iterdir()]}

    assert everything() == everything()


# Whatever state the run is in


def test_an_empty_log_gives_a_page_without_plots(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").touch()
    page = Page(page_of(tmp_path))
    assert "nothing logged yet" in page.text
    assert "No results yet" in page.text
    assert "svg" not in page.tags
    assert not (tmp_path / "plots").exists()


def test_a_single_point_is_visible(tmp_path: Path) -> None:
    write_log(tmp_path, range(20, 21))
    svgs = svgs_of(page_of(tmp_path))
    assert len(svgs) == 12
    assert all("<use " in markers(svg) for svg in svgs.values())


def markers(svg: str) -> str:
    """The uses of data markers: those drawn inside the axes' clip path."""
    return "".join(re.findall(r"<g clip-path=[^>]*>\s*<use [^>]*>", svg))


def test_a_point_between_gaps_is_visible_in_a_long_run(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_batches=400, stream=io.StringIO()) as log:
        for step in range(4, 404, 4):
            broken = 100 <= step <= 200 and step != 152
            log.train(train_record(step, loss=math.nan if broken else 2.0))
    svg = svgs_of(page_of(tmp_path))["Training loss and its parts"]
    assert len(re.findall("<use [^>]*--ink", markers(svg))) == 1
    assert ">not finite (25)<" in svg


def test_missing_evaluations_leave_only_the_training_plots(tmp_path: Path) -> None:
    write_log(tmp_path, range(4, 84, 4), eval_every=1000)
    html = page_of(tmp_path)
    assert "On held-out text" not in html
    assert len(svgs_of(html)) == 7


def test_a_run_without_a_teacher_shows_no_agreement(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_batches=80, stream=io.StringIO()) as log:
        log.train(train_record(20, weights={"ce": 1.0, "kd": 0.0}))
        log.evaluation({"micro_step": 20, "global_step": 10, "eval/nll": 3.0})
    svgs = svgs_of(page_of(tmp_path))
    assert "Held-out loss" in svgs and "KL to the teacher" not in svgs
    assert ">KD<" not in svgs["Training loss and its parts"]


@pytest.mark.few(2)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_marked(tmp_path: Path, value: float) -> None:
    write_log(tmp_path, range(4, 84, 4), loss=value, ce=value, kd=value, grad_norm=value, lr=value)
    with RunLog(tmp_path, total_batches=80, initial=80, stream=io.StringIO()) as log:
        log.evaluation(eval_record(80, **{"eval/nll": value, "eval_teacher/nll": value}))
    (tmp_path / "run.json").write_text(json.dumps({"results": [EMA | {"nll": value}]}))
    html = page_of(tmp_path)
    assert "training diverged" in html
    svgs = svgs_of(html)
    assert ">not finite (20)<" in svgs["Training loss and its parts"]
    assert ">not finite (20)<" in svgs["Gradient norm"]
    assert ">not finite (1)<" in svgs["Held-out loss"]


def test_gradients_over_orders_of_magnitude_get_a_logarithmic_axis(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_batches=80, stream=io.StringIO()) as log:
        for step, norm in ((4, 1.0), (8, 5000.0), (12, 1.5)):
            log.train(train_record(step, grad_norm=norm))
    svg = svgs_of(page_of(tmp_path))["Gradient norm"]
    assert all(f">{tick}<" in svg for tick in ("1", "10", "100", "1,000"))


def test_the_levels_of_a_teacher_come_from_its_evaluation_or_the_table(tmp_path: Path) -> None:
    write_log(tmp_path / "table", range(4, 44, 4))
    (tmp_path / "table" / "run.json").write_text(json.dumps({"results": [TEACHER]}))
    assert ">teacher<" in svgs_of(page_of(tmp_path / "table"))["Held-out loss"]

    write_log(tmp_path / "log", range(4, 44, 4))
    with RunLog(tmp_path / "log", total_batches=80, initial=40, stream=io.StringIO()) as log:
        log.evaluation(eval_record(44, **{"eval_teacher/nll": 4.0}))
    svgs = svgs_of(page_of(tmp_path / "log"))
    assert ">teacher<" in svgs["Held-out loss"]
    assert ">teacher<" not in svgs["Top-1 accuracy"]


def test_without_matplotlib_the_page_says_how_to_get_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "sad.report.plots", raising=False)
    page = Page(page_of(run_dir))
    assert "pip install 'student-aware-distillation[report]'" in page.text
    assert f"write_report({str(run_dir)!r})" in page.text
    assert "svg" not in page.tags
    assert "Distillation helped" in page.text and "max_grad_norm: 1.5" in page.text


@pytest.mark.few(2)
@pytest.mark.parametrize("content", [b"", b"{half", b"\xff\xfe\0", b"[1, 2]", b"a: [b"])
def test_a_broken_file_costs_only_its_own_section(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "best").mkdir()
    for name in ("run.json", "status.json", "config.yaml", "best/sad.json"):
        (tmp_path / name).write_bytes(content)
    write_log(tmp_path, range(20, 21))
    assert "20 micro-batches" in page_of(tmp_path)


def test_a_run_without_results_says_how_it_stands(tmp_path: Path) -> None:
    write_log(tmp_path, range(20, 21))
    (tmp_path / "status.json").write_text(json.dumps({"state": HOSTILE}))
    page = Page(page_of(tmp_path))
    assert f"{HOSTILE} · 20 micro-batches" in page.text
    assert "script" not in page.tags


def test_warnings_are_listed(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_batches=80, stream=io.StringIO()) as log:
        log.train(train_record(4, skipped=3))
        log.warning("three updates were skipped")
    text = Page(page_of(tmp_path)).text
    assert "three updates were skipped" in text and "3 updates skipped" in text


def test_a_run_of_an_earlier_version_has_its_report(tmp_path: Path) -> None:
    """As version 0.1.0 left them: other names in the table, no entropy in it, other keys."""
    train = {
        "attempt": 1, "kind": "train", "time": "2026-11-01T10:00:00.000Z", "micro_step": 4,
        "global_step": 4, "epoch": 0.5, "tokens": 512, "loss": 3.0, "ce": 6.0, "kd": 2.0, "z": 90.0,
        "accuracy": 0.1, "agreement": 0.2, "weights": {"ce": 0.3, "kd": 0.7}, "lr": 1e-3,
        "grad_norm": "NaN", "loss_scale": 1.0, "skipped": 0, "tokens_per_second": 100.0,
        "rss_bytes": 2**30, "rss_peak_bytes": 2**30, "num_updates": 4, "ema_decay": 0.5,
    }  # fmt: skip
    scores = {"eval/nll": 5.0, "eval/perplexity": 148.4, "eval/entropy": 4.0, "eval/loss": 3.0}
    lines = [train, {**train, "kind": "eval"} | scores]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [TEACHER, BASELINE | {"name": "student, text alone"}, DISTILLED]
    rows = [{key: value for key, value in row.items() if key != "entropy"} for row in rows]
    (tmp_path / "run.json").write_text(json.dumps({"results": rows}))
    html = page_of(tmp_path)
    text = Page(html).text
    assert "Distillation helped" in text and "student, text alone" in text
    assert "entropy" not in text  # no row has it
    assert list(svgs_of(html)) == [
        "Held-out loss", "Entropy of the predictions", "Training loss and its parts",
        "Learning rate", "Weights of the loss terms", "Gradient norm", "Throughput", "Memory",
        "Top-1 in training", "Decay of the averaged weights",
    ]  # fmt: skip
    assert ">z-loss<" not in html


def test_a_scale_and_skipped_updates_are_drawn_where_they_say_something(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_batches=80, stream=io.StringIO()) as log:
        for step, scale in ((4, 65536.0), (8, 32768.0)):
            log.train(train_record(step, loss_scale=scale, skipped=step // 8))
    svgs = svgs_of(page_of(tmp_path))
    assert {"Loss scale of fp16", "Updates skipped so far"} <= svgs.keys()


def test_structural_losses_are_drawn_on_held_out_text(tmp_path: Path) -> None:
    """Also one that is declared nowhere but among the weights."""
    weights = {"weights": {"ce": 1.0, "feature": 0.1, "mine": 0.1}, "feature": 1.0, "mine": 2.0}
    with RunLog(tmp_path, total_batches=80, stream=io.StringIO()) as log:
        log.train(train_record(4, **weights))
        log.evaluation({"micro_step": 4, "global_step": 2, "eval/feature": 1.0, "eval/mine": 2.0})
    svgs = svgs_of(page_of(tmp_path))
    for title in ("Structural losses on held-out text", "Training loss and its parts"):
        assert ">feature<" in svgs[title] and ">mine<" in svgs[title]
    assert "mine" not in svgs


def test_a_directory_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run directory must exist"):
        write_report(tmp_path / "nowhere")


def test_a_directory_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    (run_dir / "plots").write_text("in the way")
    with pytest.raises(OutputError, match="plots must be writable"):
        write_report(run_dir)


# Table and verdict


def test_the_table_is_aligned(tmp_path: Path) -> None:
    lines = format_results([*ROWS, {"name": "x", "nll": math.nan}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == (
        "parameters perplexity NLL KL agreement accuracy bits/byte entropy".split()
    )
    assert set(lines[1]) == {"-"}
    assert lines[2].split() == "teacher 4.52M 79.84 4.3800 - - 36.2 % 1.8120 4.2000".split()
    assert lines[-1].split() == "x - - nan - - - - -".split()
    ends = [len(line[: line.index(text)] + text) for line, text in zip(lines[2:6], (
        "4.3800", "5.3800", "5.0300", "4.9800"), strict=True)]  # fmt: skip
    assert len(set(ends)) == 1


def test_a_table_without_rows_has_its_titles() -> None:
    assert "perplexity" in format_results([])


def test_the_verdict_compares_the_best_weights_with_the_baseline() -> None:
    assert verdict(ROWS) == (
        "Distillation helped: against the same student trained with CE only, for as many steps on "
        "the same batches, perplexity fell from 217.02 to 145.47 (-33.0 %), KL to the "
        "teacher fell from 0.8000 to 0.5000 (-37.5 %) and top-1 agreement rose from 45.0 % to "
        "56.0 % (+11.0 points). That closes 40 % of that student's gap to its teacher in NLL."
    )


@pytest.mark.parametrize("name", ["student, CE only", "student, text alone (EMA)"])
def test_the_baseline_is_known_by_its_names_of_now_and_before(name: str) -> None:
    assert verdict([TEACHER, BASELINE | {"name": name}, DISTILLED]).startswith(
        "Distillation helped: against the same student trained with CE only"
    )


def test_the_verdict_takes_the_better_of_two_baselines() -> None:
    better = BASELINE | {"name": "student, CE only (EMA)", "perplexity": 100.0, "nll": 4.605}
    assert "perplexity rose from 100.00 to 145.47 (+45.5 %)" in verdict([*ROWS, better])


@pytest.mark.parametrize(
    ("changes", "judgement"),
    [
        ({"nll": 5.5, "perplexity": 244.7}, "Distillation helped in part: "),
        (
            {"nll": 5.5, "perplexity": 244.7, "kl": 0.9, "agreement": 0.4},
            "Distillation did not help: ",
        ),
        ({"kl": 0.8, "agreement": 0.45}, "Distillation helped in part: "),
        ({"kl": None, "agreement": None}, "Distillation helped: "),
    ],
)
def test_the_verdict_is_honest(changes: dict[str, Any], judgement: str) -> None:
    sentence = verdict([TEACHER, BASELINE, DISTILLED | changes])
    assert sentence.startswith(judgement)
    assert ("That closes" in sentence) == (changes.get("nll", 5.03) < 5.38)


def test_the_verdict_names_what_did_not_change() -> None:
    sentence = verdict([BASELINE | {"kl": 0.0}, DISTILLED | {"agreement": 0.45004}])
    assert "KL to the teacher rose from 0.0000 to 0.5000 and " in sentence
    assert "top-1 agreement stayed at 45.0 %" in sentence


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "There is no evaluation of the student yet."),
        ([TEACHER], "There is no evaluation of the student yet."),
        (
            [TEACHER, DISTILLED],
            "The student reaches perplexity 152.93, KL 0.5000 and agreement 56.0 % on held-out "
            "text; its teacher has perplexity 79.84.",
        ),
        (
            [{"name": "student", "nll": 3.0, "perplexity": 20.09}],
            "The student reaches perplexity 20.09 on held-out text.",
        ),
        (
            [BASELINE, DISTILLED | {"nll": math.nan}],
            "The student's held-out loss is not finite: training diverged.",
        ),
        (
            [BASELINE | {"perplexity": math.nan, "kl": None, "agreement": None}, DISTILLED],
            "The students' metrics are not finite, so they cannot be compared.",
        ),
    ],
)
def test_the_verdict_says_what_is_known(rows: list[dict[str, Any]], sentence: str) -> None:
    assert verdict(rows) == sentence
