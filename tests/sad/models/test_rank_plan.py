"""The plan of a run on several ranks: a worked example, meshes, memory, and what they refuse."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sad_kernels import _dispatch
from support.tiny import tiny_llama

from sad.config.schema import DistillConfig
from sad.errors import UsageError
from sad.models.cached_targets import CachedTargets
from sad.models.largest_batch import MOST_ROWS, describe_largest, largest_batch, most_that_fit
from sad.models.memory_plan import plan
from sad.models.rank_plan import (
    Cluster,
    RankPlan,
    Transfer,
    format_rank_plan,
    mesh_of,
    plan_ranks,
    transfers,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def worked() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "rank_plan.py"))


@pytest.fixture(scope="module")
def meshes(worked: dict[str, Any]) -> dict[str, RankPlan]:
    with pytest.MonkeyPatch.context() as patch:  # tiles as where Triton compiles for a GPU
        patch.setattr(_dispatch, "HAS_TRITON", True)
        patch.setattr(_dispatch, "INTERPRETED", False)
        return worked["plans"]()


# The worked plan


GB = 1e9
FIGURES: dict[str, dict[str, Any]] = {
    "8": {"state": 20.5, "teacher": 18.2, "inside": 0.69, "between": 0.0},
    "512, all split": {"state": 0.32, "teacher": 0.284, "inside": 0.0, "between": 5.2},
    "512, 64 x 8": {"state": 20.5, "teacher": 18.2, "inside": 0.69, "between": 0.20},
}
"""Gigabytes per rank, and seconds of the transfers of a micro-batch, worked out by hand."""
WHOLE = {
    "student: embedding, norm and head": 2.5,
    "their gradients": 2.5,
    "fp32 sum of the head's gradient": 2.5,
    "teacher head": 2.5,
    "two teacher layers": 3.5,
    "two student layers": 0.77,
}
MOVED = {
    "student weights, gathered": 30.3,
    "teacher weights, gathered": 145.4,
    "gradients, summed in fp32": 32.8,
}


def test_the_worked_plan_is_the_one_by_hand(meshes: dict[str, RankPlan]) -> None:
    def near(value: Any) -> Any:
        return pytest.approx(value, rel=0.03)

    for name, expected in FIGURES.items():
        found = meshes[name]
        teacher = dict(found.kept)["teacher weights, bfloat16"]
        assert sum(size for _, size in found.kept) - teacher == near(expected["state"] * GB)
        assert teacher == near(expected["teacher"] * GB)
        assert sum(size for _, size in found.whole) == near(15.4 * GB)
        whole = dict(found.whole)
        assert {label: whole[label] / GB for label in WHOLE} == near(WHOLE)
        moved = {t.label: t.size / GB for t in found.transfers}
        assert {label: moved[label] for label in MOVED} == near(MOVED)
        assert found.seconds(crosses=False) == near(expected["inside"])
        assert found.seconds(crosses=True) == near(expected["between"])
        assert found.compute_seconds == near(3.86)
        assert found.student_flops == near(45.4e9) and found.teacher_flops == near(142.9e9)
        assert found.teacher_share_of_transfers == near(0.70)
        assert found.teacher_share_of_work == near(0.76)
    split, hybrid = meshes["512, all split"], meshes["512, 64 x 8"]
    assert split.tokens_to_hide() == near(11_068)
    assert split.tokens_to_hide(teacher=False) == near(3_347)
    (between,) = [t for t in hybrid.transfers if t.crosses]
    assert between.size == near(8.2 * GB)
    assert hybrid.tokens * 512 == 4_194_304


def test_the_readme_has_the_worked_plan(
    worked: dict[str, Any], meshes: dict[str, RankPlan]
) -> None:
    text = (ROOT / "sad" / "README.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- worked-plan:begin -->")[2].partition("<!-- worked-plan:end -->")[0]
    assert worked["table"](meshes) in shown, "python scripts/rank_plan.py prints it"


def test_what_stops_scaling_is_said(meshes: dict[str, RankPlan]) -> None:
    split = format_rank_plan(meshes["512, all split"])
    assert "transfers between nodes set the pace: at most 1,569 tokens/s per rank" in split
    assert "dp_shard_size: 8 with dp_replicate_size: 64 keeps all but" in split
    hybrid = format_rank_plan(meshes["512, 64 x 8"])
    assert "computation sets the pace: at most 2,099 tokens/s per rank, 1,074,663 in all" in hybrid
    assert "larger, now 4,194,304 tokens" in hybrid and "4.1 times as fast" in hybrid
    assert "dp_shard_size" not in hybrid
    unknown = format_rank_plan(replace(meshes["8"], flops_per_second=None))
    assert "state --tflops" in unknown and "70% of the transfers inside a node" in unknown


# Meshes


def config(**keys: Any) -> DistillConfig:
    return DistillConfig(student="s", teacher="t", device="cpu", **keys)


@pytest.mark.parametrize(
    ("ranks", "per_node", "keys", "crossing"),
    [
        (8, 8, {}, [False]),
        (16, 8, {}, [True]),
        (16, 8, {"dp_replicate_size": 2}, [False, True]),
        (16, 16, {"dp_replicate_size": 2}, [False, False]),
        (12, 8, {"dp_replicate_size": 2}, [True, True]),  # the second replica is on both nodes
        (16, 8, {"dp_replicate_size": 4, "dp_shard_size": 4}, [False, True]),
        (16, 8, {"dp_replicate_size": 16}, [True]),
    ],
)
def test_what_crosses_nodes(
    ranks: int, per_node: int, keys: dict[str, Any], crossing: list[bool]
) -> None:
    model = tiny_llama()
    found = transfers(config(**keys), model, None, Cluster(ranks, per_node))
    labels = ("gradients, summed in fp32", "gradients, between replicas")
    assert [t.crosses for t in found if t.label in labels] == crossing


def test_links_work_at_the_same_time(meshes: dict[str, RankPlan]) -> None:
    both = replace(
        meshes["8"],
        transfers=(Transfer("a", int(300e9), 1, False), Transfer("b", int(80e9), 1, True)),
    )
    assert (both.seconds(crosses=False), both.seconds(crosses=True)) == (1.0, 2.0)
    assert both.transfer_seconds == 2.0 and both.slowest_crosses


def test_replicas_must_make_up_the_ranks() -> None:
    with pytest.raises(
        UsageError, match=r"number of processes, 6, got 4 x 1; leave one of the two"
    ):
        mesh_of(config(dp_replicate_size=4), 6)
    assert mesh_of(config(dp_replicate_size=2), 6) == (2, 3)


# Memory


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    folder = tmp_path_factory.mktemp("pair")
    for name in ("student", "teacher"):
        tiny_llama(vocab_size=2048).save_pretrained(folder / name)
    return DistillConfig(
        student=str(folder / "student"),
        teacher=str(folder / "teacher"),
        device="cpu",
        max_length=64,
        per_device_eval_batch_size=1,
        per_device_train_batch_size=4,
        eval_teacher_cache=0,
    )


def test_ranks_share_the_states_and_not_the_activations(pair: DistillConfig) -> None:
    alone, four = (plan_ranks(pair, Cluster(ranks)) for ranks in (1, 4))
    assert sum(s for _, s in alone.kept) == 4 * sum(s for _, s in four.kept)
    assert alone.passing == four.passing and alone.whole == four.whole
    assert not alone.transfers and "nothing is moved" in format_rank_plan(alone)
    states = {label: size for label, size in plan(pair).items if label in dict(alone.kept)}
    known = {label: size for label, size in alone.kept if label in states}
    assert known == pytest.approx(states, rel=0.01)  # but for buffers
    assert {"student weights, float32", "AdamW moments", "EMA, float32"} <= known.keys()


def test_a_global_batch_is_divided(pair: DistillConfig) -> None:
    whole = replace(pair, global_batch_size=16, gradient_accumulation_steps=2)
    assert [plan_ranks(whole, Cluster(ranks)).tokens for ranks in (1, 3)] == [8 * 64, 3 * 64]


def test_a_global_batch_does_not_grow_with_the_ranks(pair: DistillConfig) -> None:
    rows = replace(pair, global_batch_size=8)  # over three ranks: 3, 3 and 2
    said = format_rank_plan(plan_ranks(rows, Cluster(3, 8), 1e9))
    assert f"more ranks share the {8 * pair.max_length:,} tokens of an optimizer step" in said
    grows = replace(pair, per_device_train_batch_size=3)
    said = format_rank_plan(plan_ranks(grows, Cluster(3, 8), 1e9))
    assert f"optimizer steps larger, now {9 * pair.max_length:,} tokens" in said


def test_what_is_kept_whole_counts(pair: DistillConfig) -> None:
    student = sum(p.numel() for p in tiny_llama(vocab_size=2048).parameters())
    late = replace(pair, sync_each_batch=False, gradient_accumulation_steps=2)
    whole = dict(plan_ranks(late, Cluster(2)).whole)
    assert whole["gradients of the step, float32"] == 4 * student
    kept = dict(plan_ranks(replace(pair, reshard_after_forward=False), Cluster(2)).whole)
    assert kept["all student layers"] == 4 * (student - 2 * 2048 * 32 - 32)


def test_a_cache_of_the_teacher_is_not_moved(pair: DistillConfig) -> None:
    cached = CachedTargets(68, head_rows=2048, width=64)
    config = replace(pair, teacher=None, teacher_cache="not opened")
    found = plan_ranks(config, Cluster(2), 1e12, cached)
    assert found.teacher_flops == 0 and found.teacher_share_of_transfers == 0
    assert not any(transfer.teacher for transfer in found.transfers)
    assert dict(found.kept)["teacher head"] == 4 * 2048 * 64  # on every rank
    assert not any("teacher" in label for label, _ in found.whole)
    sparse = plan_ranks(config, Cluster(2), 1e12, CachedTargets(292, top_k=64))
    assert "teacher head" not in dict(sparse.kept) and sparse.total < found.total
    assert "teacher" not in format_rank_plan(sparse).partition("moved per")[2].partition("time")[0]


# The largest batch


@pytest.mark.parametrize(
    "need",
    [
        lambda n: 100 + 7 * n,
        lambda n: 100 + 7 * n + n * n,
        lambda n: 100 + 64 * (n // 64),
        lambda n: 100 + (0 if n < 90 else 10**6),
    ],
    ids=["straight", "curved", "stairs", "cliff"],
)
def test_the_largest_that_fits_is_found(need: Any) -> None:
    calls: list[int] = []

    def counted(n: int) -> int:
        calls.append(n)
        return need(n)

    for memory in (99, 106, 107, 115, 163, 164, 1000, 5000):
        expected = max((n for n in range(1, 5001) if need(n) <= memory), default=0)
        calls.clear()
        assert most_that_fit(counted, memory) == (expected, need(max(expected, 1)))
        assert len(calls) <= 30


def test_a_straight_line_takes_few_calls() -> None:
    calls: list[int] = []

    def need(n: int) -> int:
        calls.append(n)
        return 100 + 7 * n

    assert most_that_fit(need, 100_000) == (14_271, 99_997)
    assert len(calls) <= 5
    assert most_that_fit(lambda n: 1, 1) == (MOST_ROWS, 1)


@pytest.mark.few(1)
@pytest.mark.parametrize("cluster", [None, Cluster(2)], ids=["one process", "two ranks"])
def test_one_row_more_does_not_fit(
    pair: DistillConfig, cluster: Cluster | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sad.models.largest_batch.beside_tensors", lambda config: 1 << 20)

    known: dict[int, Any] = {}

    def once(config: DistillConfig, cluster: Cluster | None = None, cached: Any = None) -> Any:
        """The plan, made once for each batch."""
        rows = config.per_device_train_batch_size
        if rows not in known:
            known[rows] = plan(config) if cluster is None else plan_ranks(config, cluster)
        return known[rows]

    monkeypatch.setattr("sad.models.largest_batch.plan", once)
    monkeypatch.setattr("sad.models.largest_batch.plan_ranks", once)

    def need(rows: int) -> int:
        one = replace(pair, per_device_train_batch_size=rows)
        return (1 << 20) + once(one, cluster).total

    needs = [need(rows) for rows in (1, 2, 3, 4, 5)]
    assert needs == sorted(set(needs))  # rises with every row
    assert largest_batch(pair, needs[3], cluster) == (4, needs[3])
    assert largest_batch(pair, needs[3] - 1, cluster) == (3, needs[2])
    assert largest_batch(pair, needs[0] - 1, cluster) == (0, needs[0])
    line = describe_largest(pair, needs[3] / 2**30, cluster)
    assert line.startswith("largest per_device_train_batch_size: 4, which needs 0.0")
    assert "no batch fits" in describe_largest(pair, 1e-6, cluster)


def test_memory_must_be_stated_without_a_gpu(pair: DistillConfig) -> None:
    with pytest.raises(UsageError, match="write for example --memory 24"):
        describe_largest(pair, None)
