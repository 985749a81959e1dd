"""The kernel benchmark: every peer gets a row, and no peer's failure affects another's row."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sad_kernels import cross_entropy
from torch import Tensor

from bench import record, table
from bench.kernels import measure
from bench.kernels import run as kernels
from bench.kernels.entry import Effort, Row
from bench.kernels.timing import Cpu
from bench.peers import Peer, Unsupported, for_case
from bench.problems import cases, oracle
from bench.problems.cases import EmaCase, LossCase
from bench.problems.inputs import Hidden, Logits, draw

CE = LossCase(name="ce", N=6, V=97, dtype="float32")
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def effort(seconds: float = 60.0, **options: Any) -> Effort:
    return Effort(2, 1, time.monotonic() + seconds, compiled=False, **options)


def rows_with(peers: list[Peer], monkeypatch: pytest.MonkeyPatch) -> dict[str, Row]:
    """Result rows by peer for one small cross-entropy."""
    monkeypatch.setattr(measure, "for_case", lambda case: tuple(peers))
    rows, _ = measure.measure(CE, Cpu(), effort(), copy_rate=1e9)
    return {row["peer"]: row for row in rows}


def right(problem: Logits) -> Callable[[], Tensor]:
    return lambda: cross_entropy(problem.logits, problem.labels)


def wrong(problem: Logits) -> Callable[[], Tensor]:
    return lambda: 1.1 * cross_entropy(problem.logits, problem.labels)


def not_finite(problem: Logits) -> Callable[[], Tensor]:
    return lambda: cross_entropy(problem.logits, problem.labels) * math.nan


def failing(problem: Logits) -> Callable[[], Tensor]:
    raise RuntimeError("no such kernel")


def unable(problem: Logits) -> Callable[[], Tensor]:
    raise Unsupported("has no cross-entropy")


def overwriting(problem: Logits) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        result = cross_entropy(problem.logits.clone(), problem.labels)
        problem.logits.detach().fill_(7.0)
        return result

    return loss


def test_every_way_to_fail_has_its_own_status(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = (right, wrong, not_finite, failing, unable)
    rows = rows_with([Peer(f.__name__, "", f) for f in builds], monkeypatch)
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {
        "right": "ok",
        "wrong": "wrong",
        "not_finite": "wrong",
        "failing": "failed",
        "unable": "skipped",
    }
    assert rows["failing"]["reason"] == "RuntimeError: no such kernel"
    assert rows["unable"]["reason"] == "has no cross-entropy"
    assert rows["right"]["err"]["dlogits"] < 1e-5 and rows["wrong"]["err"]["dlogits"] > 0.09
    assert "ms" not in rows["failing"] and rows["right"]["ms"]["full"][1] > 0


@pytest.mark.parametrize("honest", [True, False])
def test_a_peer_that_overwrites_logits_leaves_them_to_the_next(
    honest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Peer("first", "", overwriting, overwrites=honest)
    rows = rows_with([first, Peer("next", "", right)], monkeypatch)
    assert rows["next"]["status"] == ("ok" if honest else "wrong")


def test_when_time_is_over_rows_say_so() -> None:
    rows, _ = measure.measure(CE, Cpu(), effort(seconds=-1.0), copy_rate=1e9)
    assert {row["reason"] for row in rows} == {"no time was left"}
    assert len(rows) == len(for_case(CE))


@pytest.mark.parametrize(
    "case",
    [
        LossCase(name="kd/joint", N=6, V=97, dtype="float32", ignored=0.5),
        LossCase(name="kd/top_k", N=6, V=97, dtype="float32"),
        LossCase(name="linear_ce", N=6, V=97, D_s=8, D_t=8, dtype="float32"),
        LossCase(name="linear_kd/jsd", N=6, V=97, D_s=8, D_t=12, V_t=101, dtype="float32"),
        EmaCase(name="ema/update", parameters=300, tensors=3),
        EmaCase(name="ema/swap", parameters=300, tensors=3),
    ],
    ids=lambda case: case.name,
)
def test_ours_and_by_hand_agree_with_float64(case: cases.Case) -> None:
    rows, floors = measure.measure(case, Cpu(), effort(), copy_rate=1e9)
    assert [row["peer"] for row in rows] == [peer.name for peer in for_case(case)]
    status = {row["peer"]: row["status"] for row in rows}
    assert status["ours"] == "ok"
    assert status["foreach" if isinstance(case, EmaCase) else "eager"] == "ok"
    assert bool(floors) == case.name.startswith("linear")
    for row in rows:
        assert (row["status"] == "ok") == (row["reason"] is None)


@pytest.mark.parametrize(
    ("name", "dtype", "plain"),
    [
        ("ema/update", "bfloat16", "foreach lerp"),
        ("ema/update", "float32", "foreach"),
        ("ema/swap", "bfloat16", "foreach"),
    ],
)
def test_averages_are_compared_with_plain_torch(name: str, dtype: str, plain: str) -> None:
    case = EmaCase(name=name, parameters=300, tensors=3, dtype=dtype)
    rows, _ = measure.measure(case, Cpu(), effort(), copy_rate=1e9)
    ratios = {row["peer"]: row.get("ratio_eager") for row in rows}
    assert ratios[plain] == 1.0 and ratios["ours"] is not None


def test_a_run_is_written_and_printed(tmp_path: Path) -> None:
    some = [CE, LossCase(name="linear_ce", N=6, V=97, D_s=8, D_t=8, dtype="float32")]
    result, path = kernels.run(some, Cpu(), effort(), "python -m bench", tmp_path / "r.json")
    assert kernels.conclude(result, path, show=False) == 0
    written = json.loads(path.read_text())
    assert written["schema"] == 1 and len(written["rows"]) == sum(len(for_case(c)) for c in some)
    assert {floor["when"] for floor in written["floors"]} == {"start", "end"}
    ours = [row for row in written["rows"] if row["peer"] == "ours"]
    assert all(row["host_us"] > 0 for row in ours)
    assert ours[0]["ratio_copy"] > 0 and ours[1]["ratio_gemm"] > 0
    lines = list(table.lines(written))
    assert any(line.startswith("ce: N=6 V=97, float32") for line in lines)
    assert any(line.startswith("skipped: ") and "needs a GPU" in line for line in lines)


def test_numbers_that_json_does_not_have_become_words(tmp_path: Path) -> None:
    record.write({"a": [math.nan, math.inf, 0.123456789], "b": None}, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "a": ["nan", "inf", 0.12346],
        "b": None,
    }


# What a case is


def test_least_bytes_and_products_by_hand() -> None:
    ce, kd = (LossCase(name=n, N=8192, V=128256) for n in ("ce", "kd/forward_kl"))
    logits = 2 * 8192 * 128256
    assert (ce.bytes(False), ce.bytes(True)) == (logits, 3 * logits)
    assert (kd.bytes(False), kd.bytes(True)) == (2 * logits, 5 * logits)
    sizes: Any = {"N": 8192, "V": 128256, "D_s": 4096, "D_t": 2048}
    linear_ce, linear_kd = (LossCase(name=n, **sizes) for n in ("linear_ce", "linear_kd/jsd"))
    assert linear_ce.flops(True) == 8192 * 128256 * 6 * 4096
    assert linear_kd.flops(True) == 8192 * 128256 * (6 * 4096 + 2 * 2048)
    assert EmaCase(name="ema/update", parameters=10, tensors=1).bytes() == 100


@pytest.mark.parametrize("some", [cases.quick, cases.full, cases.cpu, cases.quick_cpu, cases.fake])
def test_every_set_has_every_family_once(some: Callable[[], list[cases.Case]]) -> None:
    chosen = some()
    assert len(chosen) == len(set(chosen))
    assert {c.name.partition("/")[0] for c in chosen} == {
        "ce",
        "kd",
        "linear_ce",
        "linear_kd",
        "ema",
    }
    assert {c.name for c in cases.chosen(chosen, ["kd"])} <= set(cases.ROWS) - {"ce"}


def test_ignored_rows_and_the_teacher_are_as_asked() -> None:
    case = LossCase(name="linear_kd/forward_kl", N=64, V=512, D_s=64, D_t=96, ignored=0.25)
    problem = draw(case, CPU)
    assert isinstance(problem, Hidden)
    assert int((problem.labels == -100).sum()) == 16 == case.N - case.valid
    assert 0.05 < oracle.truth_of(problem).loss < 0.2  # asked for: 0.1
    again = draw(case, CPU)
    assert isinstance(again, Hidden) and again.weight.equal(problem.weight)


def test_a_gradient_is_judged_by_rows_that_include_the_last() -> None:
    problem = draw(LossCase(name="ce", N=3000, V=16, dtype="float32"), CPU)
    assert isinstance(problem, Logits)
    truth = oracle.truth_of(problem)
    assert truth.rows is not None
    assert truth.rows[0] == 0 and truth.rows[-1] == 2999 and len(truth.rows) <= oracle.SAMPLE + 1
    loss = cross_entropy(problem.logits, problem.labels)
    loss.backward(problem.upstream)
    assert not oracle.is_wrong(truth.errors(loss, problem.leaves))
    assert problem.logits.grad is not None
    problem.logits.grad[-1] = math.nan
    assert oracle.is_wrong(truth.errors(loss, problem.leaves))
