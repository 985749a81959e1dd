"""A metric is one row: log, terminal, table, report, plots and the best model's choice read it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from support.runs import make_trainer, run_log
from support.tiny import save_tiny, write_texts
from support.tiny_moe import tiny_moe
from torch import nn

from sad.config.schema import STRUCTURAL, DistillConfig
from sad.environment import StopSignals
from sad.errors import UsageError
from sad.metrics import METRICS, OWN_PANEL, PANELS, Metric, in_order, is_number, table_metrics
from sad.report import format_results, write_report
from sad.report.log import RunLog, read_log
from sad.report.terminal import bar_postfix
from sad.training.meters import result_row

TOY = Metric(
    "toy", "toy score", "toys per target", "lower", "percent",
    about="what this test made up", in_table=True, headline=True, bar="toy {}",
)  # fmt: skip

TRAIN: dict[str, Any] = {
    "micro_step": 4,
    "global_step": 2,
    "epoch": 0.1,
    "tokens": 64,
    "loss": 2.5,
    "ce": 2.5,
    "weights": {"ce": 1.0},
    "lr": 1e-4,
}
EVAL: dict[str, Any] = {"micro_step": 4, "global_step": 2, "eval/nll": 2.0, "eval/perplexity": 7.4}


def record_run(run_dir: Path, name: str, row: dict[str, Any]) -> str:
    """A run that logs ``name`` in training and evaluation; what the terminal showed."""
    stream = io.StringIO()
    with RunLog(run_dir, total_batches=8, stream=stream) as log:
        log.train(TRAIN | {name: 0.5})
        log.evaluation(EVAL | {f"eval/{name}": 0.25})
    (run_dir / "run.json").write_text(json.dumps({"results": [row]}))
    return stream.getvalue()


def plots_of(html: str) -> list[tuple[str, str]]:
    """Title and SVG of each plot."""
    svgs = [f"<svg{part.partition('</svg>')[0]}</svg>" for part in html.split("<svg")[1:]]
    return [(ET.fromstring(svg).attrib["aria-label"], svg) for svg in svgs]


# One row


def test_a_metric_that_is_declared_in_one_row_is_shown_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "toy", TOY)
    row = result_row("student", nn.Linear(2, 2), {"eval/nll": 2.0, "eval/toy": 0.25}, "eval")
    shown = record_run(tmp_path, "toy", row)

    train, evaluation = [r for r in read_log(tmp_path) if r["kind"] in ("train", "eval")]
    assert (train["toy"], evaluation["eval/toy"]) == (0.5, 0.25)
    titles, values, scores = shown.splitlines()
    assert "toy score" in titles and "50.0 %" in values
    assert "toy score  25.0 %" in scores
    assert " toy 50.0 %" in bar_postfix(TRAIN | {"toy": 0.5})

    assert "toy score" in format_results([row]) and "25.0 %" in format_results([row])
    html = write_report(tmp_path).read_text()
    assert "toy score&nbsp;<span>↓</span>" in html and ">25.0 %</td>" in html
    assert "toy score: what this test made up" in html
    assert "reaches toy score 25.0 %" in html
    drawn = [svg for title, svg in plots_of(html) if title == "toy score"]
    assert len(drawn) == 2 and all(">toys per target<" in svg for svg in drawn)
    assert {"toy.png", "eval_toy.png"} <= {path.name for path in (tmp_path / "plots").iterdir()}

    keys: dict[str, Any] = {
        "student": "tiny",
        "teacher": "tiny",
        "data": {"train": "x", "eval": "x"},
    }
    assert DistillConfig(**keys, metric_for_best_model="eval/toy")
    monkeypatch.setitem(METRICS, "toy", Metric("toy", "toy", better="higher", in_table=True))
    with pytest.raises(UsageError, match="one of eval/nll, eval/perplexity, eval/kl, eval/bits"):
        DistillConfig(**keys, metric_for_best_model="eval/toy")


@pytest.mark.parametrize(
    "name", ["gates_open", "<script>alert('x')</script>/../..", "memory", "$_"]
)
def test_a_name_that_is_not_declared_is_shown_under_itself(tmp_path: Path, name: str) -> None:
    """Nothing that somebody logs is lost, and nothing that it is called does harm."""
    shown = record_run(tmp_path, name, {"name": "student", "nll": 2.0})
    titles, values, scores = shown.splitlines()
    assert titles.split()[-3] == name.split()[-1] and "0.5000" in values
    assert f"{name}  0.2500" in scores
    html = write_report(tmp_path).read_text()
    assert "<script" not in html
    common = ["Held-out loss", "Training loss and its parts", "Learning rate"]
    titles = [*common, "Weights of the loss terms", name, name]
    assert sorted(title for title, _ in plots_of(html)) == sorted(titles)
    assert len(list((tmp_path / "plots").iterdir())) == len(titles)
    assert {path.name for path in tmp_path.iterdir()} == {
        "log.jsonl", "plots", "report.html", "run.json"
    }  # fmt: skip


def test_panels_of_the_same_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_batches=8, stream=io.StringIO()) as log:
        log.train(TRAIN | {"a b": 1.0, "a/b": 2.0, "a_b": 3.0, "weights ": 1.0})
    html = write_report(tmp_path).read_text()
    assert {"a b", "a/b", "a_b"} <= {title for title, _ in plots_of(html)}
    assert len(list((tmp_path / "plots").iterdir())) == html.count("<svg") == 7


def test_values_that_are_not_numbers_are_recorded_and_not_shown(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_batches=8, stream=io.StringIO()) as log:
        log.train(TRAIN | {"flag": True, "text": "on", "many": [1, 2]})
    assert {title for title, _ in plots_of(write_report(tmp_path).read_text())} == {
        "Training loss and its parts", "Learning rate", "Weights of the loss terms"
    }  # fmt: skip


# The table itself


def test_every_panel_of_a_metric_exists() -> None:
    for row in METRICS.values():
        for panel in (row.eval_panel, row.train_panel):
            assert panel in (None, OWN_PANEL) or panel in PANELS, row.name
    used = {p for row in METRICS.values() for p in (row.eval_panel, row.train_panel)}
    assert PANELS.keys() - used == {"weights"}  # drawn from the weights of the loss terms


def test_what_the_table_shows_is_explained_and_has_a_title() -> None:
    assert all(row.about and row.title for row in table_metrics())
    assert all(row.better or row.name == "entropy" for row in table_metrics())


def test_order_is_that_of_the_declarations_then_by_name() -> None:
    names = [row.name for row in in_order({"zeta", "kl", "alpha", "nll"})]
    assert names == ["nll", "kl", "alpha", "zeta"]


def test_metrics_need_no_torch() -> None:
    script = "import sys, sad.metrics; assert not {'torch', 'numpy', 'yaml'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_number_that_a_run_records_is_declared(tmp_path: Path) -> None:
    """With whatever a run can have: all structural losses, gates that learn, TAID, an average."""
    sections: dict[str, Any] = {name: {"weight": 0.1} for name in STRUCTURAL} | {
        "attention": {"weight": 0.1, "head_map": "learned"},
        "data": {"train": write_texts(tmp_path / "texts", count=6), "eval_fraction": 0.3},
        "taid": {"enabled": True},
        "routing": {"mode": "student_aware"},
    }
    config = DistillConfig(
        student=save_tiny(tmp_path / "student", tiny_moe("qwen3_moe", seed=2)),
        teacher=save_tiny(tmp_path / "teacher", tiny_moe("qwen3_moe", seed=1)),
        output_dir=str(tmp_path / "run"),
        max_length=32,
        per_device_train_batch_size=4,
        max_steps=1,
        max_eval_rows=2,
        logging_steps=1,
        use_curriculum=False,
        z_loss=1e-4,
        **sections,
    )
    trainer = make_trainer(config)
    with run_log(config, trainer) as log:
        trainer.train(log, StopSignals())
    train, evaluation = [r for r in read_log(tmp_path / "run") if r["kind"] in ("train", "eval")]
    assert {"feature", "router", "teacher_share", "ema_decay", "entropy"} <= {
        key.rpartition("/")[2] for key in train | evaluation
    }
    names = {key for key, value in train.items() if is_number(value)} | train["weights"].keys()
    names |= {key.rpartition("/")[2] for key, value in evaluation.items() if is_number(value)}
    assert names - METRICS.keys() == set()
