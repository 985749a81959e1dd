"""Caches of a teacher with another tokenizer: what the teacher itself teaches, and no other's."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.caches import make_cache
from support.other_tokenizer import settings, with_bytes
from support.runs import assert_same_bits, everything, make_trainer
from support.teacher_server import serving
from support.tiny import save_tiny, tiny_llama, tiny_tokenizer

from sad.checkpoint.store import load_checkpoint, save_checkpoint
from sad.config.schema import DistillConfig
from sad.errors import StoppedError, UnfitError, UsageError
from sad.models.load import build_student_model
from sad.models.memory_plan import AT_BOUNDARIES, evaluation_items, forward_items
from sad.teachers.cache.files import COMPLETE
from sad.teachers.cached import planned_targets
from sad.training.evaluate import evaluate_student, evaluate_teacher
from sad.training.inputs import load_inputs
from sad.training.rescore import evaluate_run
from sad.training.run import distill

ALL = 512
"""More ids than there are outcomes: a record holds the whole distribution."""


def from_cache(config: DistillConfig, folder: Path, **options: Any) -> DistillConfig:
    """The same run from a cache, which is made, with no teacher left."""
    cache = make_cache(config, folder, **options)
    tokenizer = str(config.teacher_tokenizer or config.teacher)
    return replace(config, teacher=None, teacher_tokenizer=tokenizer, teacher_cache=str(cache))


def first_step(config: DistillConfig) -> tuple[float, float, dict[str, float]]:
    """The loss and divergence of the first micro-batch, and an evaluation."""
    inputs = load_inputs(config)
    trainer = make_trainer(config, inputs)
    trainer.student.train()
    counts, weights = trainer.batches.counts(trainer._window(0)), trainer.weights(0)
    result = trainer._forward(trainer.batches.batch(0), weights, counts)
    batches = inputs.eval_batches(config)
    scores = evaluate_student(trainer.student, inputs.eval_teacher, batches, {"eval": nullcontext})
    return float(result.loss.detach()), float(result.distill.kd), scores


@pytest.mark.parametrize(
    ("kind", "temperature"), [("topk", 1.0), ("sampled", 1.0), ("sampled", 2.0)]
)
def test_a_cache_of_all_outcomes_teaches_what_the_teacher_does(
    tmp_path: Path, kind: str, temperature: float
) -> None:
    config = with_bytes(tmp_path, temperature=temperature)
    cached = from_cache(config, tmp_path / "cache", kind=kind, top_k=ALL)
    loss, kd, scores = first_step(config)
    found_loss, found_kd, found = first_step(cached)
    assert found_loss == pytest.approx(loss, abs=1e-5)
    assert kd > 0.1 and found_kd == pytest.approx(kd, rel=1e-3)
    assert found["eval/nll"] == scores["eval/nll"]
    assert found["eval/kl_bucket"] == pytest.approx(scores["eval/kl"], rel=1e-3)
    assert "eval/agreement" in found  # with the teacher's likeliest outcome, not its token's


def test_a_run_learns_from_samples_and_is_scored_again(tmp_path: Path) -> None:
    config = with_bytes(tmp_path, max_steps=2, use_ema=False, max_eval_rows=4)
    cached = from_cache(config, tmp_path / "cache", top_k=16)
    result = distill(cached)
    assert result.metrics["eval/kl_bucket"] > 0
    log = (result.run_dir / "log.jsonl").read_text()
    assert "16 sampled outcomes per boundary" in log and "labels disagree at" in log
    teacher, student = evaluate_run(result.run_dir)
    inputs = load_inputs(config)
    assert inputs.eval_teacher is not None
    live = evaluate_teacher(inputs.eval_teacher, inputs.eval_batches(config))
    assert teacher["bits_per_byte"] == pytest.approx(live["eval_teacher/bits_per_byte"])
    assert student["nll"] == pytest.approx(result.metrics["eval/nll"])


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    config = with_bytes(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    cached = from_cache(config, tmp_path / "cache", top_k=16)
    whole = make_trainer(cached)
    advance(whole, whole.run_length.micro_batches)
    first = make_trainer(cached)
    advance(first, 3)  # in the middle of a window
    state, tensors = first.capture()
    path = save_checkpoint(cached.output_dir, 3, state, tensors, save_total_limit=2)
    second = make_trainer(cached)
    second.restore(load_checkpoint(path), warn=pytest.fail)
    advance(second, second.run_length.micro_batches)
    assert_same_bits(everything(second), everything(whole))


def advance(trainer: Any, micro_batches: int) -> None:
    while trainer.counters.micro_step < micro_batches:
        trainer.micro_batch()


def test_a_cache_is_checked_by_its_teacher_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_bytes(tmp_path)
    make_cache(config, tmp_path / "cache")
    make_cache(config, tmp_path / "cache", check=True)
    assert "100.0 % of the ids" in capsys.readouterr().out
    other = replace(config, closed_outcomes=False)
    with pytest.raises(UsageError, match=r"cross_tokenizer .* where") as caught:
        make_cache(other, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_cache_of_other_outcomes_is_refused(tmp_path: Path) -> None:
    config = with_bytes(tmp_path)
    cached = from_cache(config, tmp_path / "cache")
    other = save_tiny(tmp_path / "other", tiny_llama(seed=1), tiny_tokenizer(400))
    for keys, what in (
        ({"closed_outcomes": False}, r"outcomes \(hash of their tables\)"),
        ({"teacher_tokenizer": other}, r"teacher's tokenizer \(fingerprint\)"),
    ):
        with pytest.raises(UnfitError, match=f"must be made for this run's {what}") as caught:
            load_inputs(replace(cached, **keys))
        assert "\n" not in str(caught.value)


def test_a_cache_for_equal_tokenizers_and_one_of_outcomes_are_told_apart(tmp_path: Path) -> None:
    found = settings(tmp_path)
    ordinary = make_cache(DistillConfig(**found), tmp_path / "ordinary")
    crossed = DistillConfig(**found, cross_tokenizer="prefix")
    outcomes = make_cache(crossed, tmp_path / "outcomes")
    for config, folder, what in (
        (crossed, ordinary, "none in .* and prefix in the run"),
        (DistillConfig(**found), outcomes, "prefix in .* and none in the run"),
    ):
        with pytest.raises(UnfitError, match=f"this run's cross_tokenizer, got {what}") as caught:
            load_inputs(replace(config, teacher_cache=str(folder)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ({"likelihood_weight": 0.1}, {}, "likelihood_weight must be 0 to cache targets, got 0.1"),
        (
            {"cross_tokenizer": "likelihood"},
            {"kind": "hidden"},
            "kind must be left out with cross_tokenizer likelihood",
        ),
        (
            {"cross_tokenizer": "likelihood"},
            {"temperatures": (2.0,)},
            "temperatures must be left out with cross_tokenizer likelihood",
        ),
        ({"prefix_inside": True}, {}, "prefix_inside must be false to cache targets"),
        ({}, {"kind": "hidden"}, "kind must be sampled or topk with cross_tokenizer, got hidden"),
        ({}, {"kind": "topk", "temperatures": (1.0, 2.0)}, "temperatures must be 1 with --kind"),
        ({"temperature": 2.0}, {"kind": "topk"}, "temperatures must be 1 with --kind topk"),
        (
            {},
            {"kind": "topk", "server": "http://localhost:1"},
            "cross_tokenizer must be likelihood with --server, got prefix",
        ),
        (
            {},
            {"kind": "topk", "import_path": "files"},
            "cross_tokenizer must be left out with --import, got prefix",
        ),
    ],
)
def test_what_is_not_cached_is_refused(
    tmp_path: Path, keys: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"student": "s", "teacher": "t", "cross_tokenizer": "prefix"}
    given |= {"temperature": 1.0, "label_smoothing": 0.0} | keys
    config = DistillConfig(**given)
    with pytest.raises(UsageError) as caught:
        make_cache(config, tmp_path / "cache", **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_sampled_cache_at_another_temperature_is_read(tmp_path: Path) -> None:
    config = DistillConfig(**settings(tmp_path, temperature=2.0))
    scores = []
    for kind in ("sampled", "topk"):
        cache = make_cache(config, tmp_path / kind, kind=kind, top_k=16)
        loss, _, found = first_step(replace(config, teacher=None, teacher_cache=str(cache)))
        assert math.isfinite(loss)
        scores.append(found)
    assert scores[0] == scores[1] and scores[0]["eval/kl_bucket"] > 0  # held-out rows are the same


def test_likelihoods_from_a_cache_are_the_teachers(tmp_path: Path) -> None:
    config = with_bytes(tmp_path, cross_tokenizer="likelihood", temperature=2.0)
    cached = from_cache(config, tmp_path / "cache")
    assert {path.stat().st_size < 10_000 for path in (tmp_path / "cache").glob("shard-*")} == {True}
    loss, kd, scores = first_step(config)
    found_loss, found_kd, found = first_step(cached)
    assert found_loss == pytest.approx(loss, abs=1e-6)
    assert kd > 0.1 and found_kd == pytest.approx(kd, rel=1e-6)
    assert found["eval/nll"] == scores["eval/nll"] and "eval/kl" not in found
    make_cache(config, tmp_path / "cache", check=True)
    with pytest.raises(
        UnfitError, match=r"this run's cross_tokenizer, got likelihood in .* prefix"
    ):
        load_inputs(replace(cached, cross_tokenizer="prefix", temperature=1.0))


def test_a_run_learns_from_likelihoods_and_is_scored_again(tmp_path: Path) -> None:
    config = with_bytes(tmp_path, cross_tokenizer="likelihood", max_steps=2, use_ema=False)
    result = distill(from_cache(config, tmp_path / "cache"))
    assert result.metrics["eval/bits_per_byte"] > 0 and "eval/kl" not in result.metrics
    assert "the likelihood of the text between" in (result.run_dir / "log.jsonl").read_text()
    teacher, student = evaluate_run(result.run_dir)
    assert teacher["bits_per_byte"] == result.metrics["eval_teacher/bits_per_byte"]
    assert student["nll"] == pytest.approx(result.metrics["eval/nll"])


@pytest.mark.parametrize("server_kind", ["vllm", "sglang"])
def test_a_served_teacher_gives_the_likelihood_of_its_own_tokens(
    tmp_path: Path, server_kind: str
) -> None:
    config = with_bytes(tmp_path, cross_tokenizer="likelihood", teacher_wait=20)
    served = {"kind": "topk", "server_kind": server_kind}
    with serving(tiny_llama(seed=1)) as stub:
        cached = from_cache(config, tmp_path / "cache", **served, server=stub.url)
        loss, kd, _ = first_step(config)
        found_loss, found_kd, _ = first_step(cached)
        assert found_loss == pytest.approx(loss, abs=1e-5)
        assert kd > 0.1 and found_kd == pytest.approx(kd, rel=1e-4)
        make_cache(config, tmp_path / "cache", **served, server=stub.url, check=True)
        stub.model = tiny_llama(seed=3)
        with pytest.raises(
            UnfitError, match=r"must hold the targets of teacher, got .* of the log"
        ):
            make_cache(config, tmp_path / "cache", **served, server=stub.url, check=True)


def test_a_served_cache_is_not_finished_by_another_teacher(tmp_path: Path) -> None:
    config = with_bytes(tmp_path, cross_tokenizer="likelihood", teacher_wait=1)
    with serving(tiny_llama(seed=1)) as stub:
        stub.stop_after = 8
        with pytest.raises(StoppedError):
            make_cache(config, tmp_path / "cache", kind="topk", server=stub.url)
        stub.stop_after = None
        right, stub.model = stub.model, tiny_llama(seed=3)
        with pytest.raises(UnfitError, match=r"mean difference of [0-9.]+ nats") as caught:
            make_cache(config, tmp_path / "cache", kind="topk", server=stub.url)
        assert "\n" not in str(caught.value)
        stub.model = right
        make_cache(config, tmp_path / "cache", kind="topk", server=stub.url)
    assert (tmp_path / "cache" / COMPLETE).exists()


@pytest.mark.parametrize(("mode", "size"), [("prefix", 16 * (8 + 4)), ("likelihood", 4)])
def test_the_plan_knows_what_a_cache_holds(tmp_path: Path, mode: Any, size: int) -> None:
    config = from_cache(with_bytes(tmp_path, cross_tokenizer=mode), tmp_path / "cache")
    cached = planned_targets(Path(config.teacher_cache or ""))
    student, device = build_student_model(config), torch.device("cpu")
    items = dict(forward_items(config, device, student, cached))
    assert items["teacher targets"] == 2 * 32 * size and AT_BOUNDARIES not in items
    held = dict(evaluation_items(config, device, student, cached, eval_rows=16))
    assert AT_BOUNDARIES not in held
