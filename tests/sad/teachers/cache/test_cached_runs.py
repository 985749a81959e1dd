"""Runs from a cache: the same student as from the live teacher, which is never opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sad_kernels import TeacherHidden, TeacherTopK
from support.caches import make_cache
from support.runs import assert_same_bits, everything, make_trainer

from sad.checkpoint.store import load_checkpoint, save_checkpoint
from sad.config.schema import DistillConfig
from sad.errors import UnfitError, UsageError
from sad.teachers.cache.files import COMPLETE
from sad.teachers.cached import CachedTeacher
from sad.training.inputs import RunInputs, load_inputs
from sad.training.run import distill

Make = Callable[..., DistillConfig]
Caches = dict[str, Path]


def cached_inputs(config: DistillConfig) -> tuple[RunInputs, CachedTeacher]:
    inputs = load_inputs(config)
    assert isinstance(inputs.teacher, CachedTeacher)
    return inputs, inputs.teacher


@pytest.mark.parametrize(("codec", "bound"), [("bf16", 0.01), ("int8", 0.03)])
def test_hidden_states_are_those_of_the_live_teacher(
    make_config: Make, caches: Caches, codec: str, bound: float
) -> None:
    config = make_config()
    live = load_inputs(config).teacher
    inputs, cached = cached_inputs(make_config(teacher=None, teacher_cache=str(caches[codec])))
    assert live is not None
    for rows in ([0], [3, 1], [2, 2]):
        batch = inputs.train_rows.batch(rows)
        (theirs,), (ours,) = live.forward(batch).targets, cached.forward(batch).targets
        assert isinstance(ours, TeacherHidden) and isinstance(theirs, TeacherHidden)
        inside = torch.arange(config.max_length) < batch.lengths[:, None]
        exact = theirs.hidden[inside]
        assert (ours.hidden[inside] - exact).norm() < bound * exact.norm()
        assert torch.equal(ours.head.weight, theirs.head.weight)
        assert ours.head.vocab_size == theirs.head.vocab_size == 512


def test_bf16_keeps_every_bit_of_a_bf16_teacher(make_config: Make, tmp_path: Path) -> None:
    config = make_config(teacher_dtype="bfloat16")
    folder = make_cache(config, tmp_path / "cache", "hidden", codec="bf16", all_rows=True)
    live = load_inputs(config).teacher
    inputs, cached = cached_inputs(make_config(teacher=None, teacher_cache=str(folder)))
    assert live is not None
    batch = inputs.train_rows.batch([0, 1])  # as the cache had them
    (theirs,), (ours,) = live.forward(batch).targets, cached.forward(batch).targets
    assert isinstance(ours, TeacherHidden) and isinstance(theirs, TeacherHidden)
    inside = torch.arange(config.max_length) < batch.lengths[:, None]
    assert ours.hidden.dtype == torch.bfloat16
    assert torch.equal(ours.hidden[inside], theirs.hidden[inside])


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_sparse_targets_are_those_of_the_live_teacher(
    make_config: Make, caches: Caches, kind: str
) -> None:
    live = load_inputs(make_config()).teacher
    inputs, cached = cached_inputs(make_config(teacher=None, teacher_cache=str(caches[kind])))
    assert live is not None
    subset = cached.reader.facts.subset
    numbers = [4, 0] if subset is None else subset.numbers()[[3, 0]]
    batch = inputs.train_rows.batch(numbers)
    (theirs,), (ours,) = live.forward(batch).targets, cached.forward(batch).targets
    assert isinstance(ours, TeacherTopK) and isinstance(theirs, TeacherHidden)
    learned = batch.labels >= 0
    assert ours.log_probs[~learned].isneginf().all()
    ids, log_w = ours.ids[learned], ours.log_probs[learned].double()
    p = theirs.head(theirs.hidden[learned]).double().softmax(1)
    at_ids = p.gather(1, ids)
    if kind == "topk":
        assert ours.tail == "bucket"
        torch.testing.assert_close(log_w.exp(), at_ids, rtol=5e-4, atol=0)
        torch.testing.assert_close(at_ids.sum(1), log_w.exp().sum(1), rtol=1e-6, atol=0)
        assert torch.equal(ids[:, 0], p.argmax(1))
    else:
        assert ours.tail == "zero"
        torch.testing.assert_close(log_w.exp().sum(1), torch.ones(len(log_w)).double())
        # An id weighs its probability, or the tail's share per draw, which is no less.
        assert (log_w.exp() > at_ids * (1 - 1e-3)).all()


def test_top_k_targets_serve_every_temperature_they_were_made_for(
    make_config: Make, tmp_path: Path
) -> None:
    folder = make_cache(make_config(), tmp_path / "cache", "topk", temperatures=(0.5, 2.0))
    live = load_inputs(make_config()).teacher
    assert live is not None
    for temperature in (0.5, 1.0, 2.0):
        keys = {"teacher": None, "teacher_cache": str(folder), "temperature": temperature}
        inputs, cached = cached_inputs(make_config(**keys))
        subset = cached.reader.facts.subset
        assert subset is not None
        batch = inputs.train_rows.batch(subset.numbers()[:2])
        (theirs,), (ours,) = live.forward(batch).targets, cached.forward(batch).targets
        assert isinstance(ours, TeacherTopK) and isinstance(theirs, TeacherHidden)
        learned = batch.labels >= 0
        z = theirs.head(theirs.hidden[learned]).double() / temperature
        exact = z.softmax(1).gather(1, ours.ids[learned])
        weights = ours.log_probs[learned].double().exp()
        torch.testing.assert_close(weights, exact, rtol=1e-3 / temperature, atol=0)
        torch.testing.assert_close(weights.sum(1), exact.sum(1), rtol=2e-6, atol=0)


@pytest.mark.slow
def test_the_student_of_hidden_states_is_that_of_the_teacher(
    make_config: Make, caches: Caches, tmp_path: Path
) -> None:
    live = distill(make_config(output_dir=str(tmp_path / "live"))).metrics
    for codec in ("bf16", "int8"):
        out = str(tmp_path / codec)
        config = make_config(teacher=None, teacher_cache=str(caches[codec]), output_dir=out)
        result = distill(config)
        for name in ("eval/nll", "eval/kl", "eval_ema/kl", "eval_teacher/nll"):
            assert result.metrics[name] == pytest.approx(live[name], abs=2e-3), (codec, name)
        assert result.results[0]["name"] == "teacher" and result.results[0]["parameters"]


def test_the_teachers_folder_is_never_opened(
    make_config: Make, sources: dict[str, Any], tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(sources["teacher"], gone)
    folder = make_cache(make_config(teacher=str(gone)), tmp_path / "cache")
    shutil.rmtree(gone)
    config = make_config(teacher=None, teacher_cache=str(folder), baseline=True)
    metrics = distill(config).metrics
    assert metrics["eval/kl_bucket"] > 0 and "eval/kl" not in metrics


def test_a_cached_run_resumes_to_the_same_bits(
    make_config: Make, caches: Caches, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"teacher": None, "max_steps": 2, "gradient_accumulation_steps": 2}
    config = make_config(**keys, teacher_cache=str(caches["sampled"]))
    whole = make_trainer(config)
    for _ in range(4):
        whole.micro_batch()
    first = make_trainer(config)
    for _ in range(3):
        first.micro_batch()
    path = save_checkpoint(tmp_path / "saved", 3, *first.capture(), save_total_limit=2)
    second = make_trainer(config)
    second.restore(load_checkpoint(path), warn=pytest.fail)
    second.micro_batch()
    assert_same_bits(everything(second), everything(whole))

    other = make_config(**keys, teacher_cache=str(caches["int8"]))
    with pytest.raises(UsageError, match="the teacher's cache: "):
        make_trainer(other).restore(load_checkpoint(path), warn=pytest.fail)


REFUSED: list[Any] = [
    ("bf16", {"max_length": 24}, "max_length, got 16 in .* and 24 in the run"),
    ("bf16", {"packing": False}, "packing, got True in .* and False in the run"),
    ("bf16", {"max_eval_rows": 6}, "held-out rows that are scored, got 4 in .* and 6"),
    ("bf16", {"attention": {"weight": 1.0}}, "attention.weight must be 0 with hidden targets"),
    ("sampled", {"divergence": "reverse_kl"}, "divergence must be forward_kl with sampled"),
    ("sampled", {"temperature": 2.0}, "temperature must be 1 with sampled targets, got 2"),
    ("topk", {"temperature": 2.0}, "temperature must be 1 with topk targets, got 2"),
    ("topk", {"taid": {"enabled": True}}, "taid.enabled must be false with topk targets"),
    ("topk", {"feature": {"weight": 1.0}}, "feature.weight must be 0 with topk targets"),
]


@pytest.mark.parametrize(("kind", "keys", "message"), REFUSED)
def test_what_a_cache_does_not_serve_is_refused(
    make_config: Make, caches: Caches, kind: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnfitError, match=message) as refusal:
        load_inputs(make_config(teacher=None, teacher_cache=str(caches[kind]), **keys))
    assert "\n" not in str(refusal.value) and refusal.value.exit_code == 65


def test_another_text_or_seed_is_refused(
    make_config: Make, sources: dict[str, Any], caches: Caches, tmp_path: Path
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"other words {number}\n" * 100)
    data = sources["data"] | {"train": str(tmp_path)}
    with pytest.raises(UnfitError, match=r"training text .*fingerprint of its rows"):
        load_inputs(make_config(teacher=None, teacher_cache=str(caches["topk"]), data=data))
    with pytest.raises(UnfitError, match="8 that runs of seed 42 read first, and 8 of seed 7"):
        load_inputs(make_config(teacher=None, teacher_cache=str(caches["topk"]), seed=7))
    with pytest.raises(UnfitError, match="8 that runs of seed 42 read first, and 12 of seed 42"):
        load_inputs(make_config(teacher=None, teacher_cache=str(caches["topk"]), max_steps=6))


@pytest.mark.slow
def test_losses_on_final_states_work_from_hidden_states(make_config: Make, caches: Caches) -> None:
    config = make_config(
        teacher=None,
        teacher_cache=str(caches["int8"]),
        feature={"weight": 1.0},
        contrastive={"weight": 0.5},
        taid={"enabled": True},
        divergence="jsd",
        temperature=2.0,
        use_curriculum=False,
    )
    result = distill(config)
    assert result.metrics["eval/feature"] > 0 and result.metrics["eval/contrastive"] > 0


def copy_of(cache: Path, folder: Path) -> Path:
    shutil.copytree(cache, folder)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda c: flip(c / "shard-00001.safetensors"), "be what was written"),
    "a cut shard": (
        lambda c: (c / "shard-00000.safetensors").write_bytes(
            (c / "shard-00000.safetensors").read_bytes()[:-64]
        ),
        "be what was written",
    ),
    "a missing shard": (
        lambda c: (c / "shard-00000.safetensors").unlink(),
        "got no shard-00000.safetensors",
    ),
    "a missing held-out shard": (
        lambda c: (c / "eval-00000.safetensors").unlink(),
        "got no eval-00000.safetensors",
    ),
    "a damaged head": (lambda c: flip(c / "head.safetensors"), "be what was written"),
    "not finished": (lambda c: (c / COMPLETE).unlink(), "must be finished"),
    "other facts": (
        lambda c: (c / "cache.json").write_text(
            (c / "cache.json").read_text().replace('"max_length": 16', '"max_length": 24')
        ),
        "plan must be",
    ),
    "no JSON": (lambda c: (c / "cache.json").write_text("{"), "must hold a JSON object"),
    "another format": (
        lambda c: (c / "cache.json").write_text(
            (c / "cache.json").read_text().replace('"format": 1', '"format": 99')
        ),
        "must be of format 1, got 99",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_trains_nothing(
    make_config: Make, caches: Caches, tmp_path: Path, damage: str
) -> None:
    cache = copy_of(caches["bf16"], tmp_path / "cache")
    spoil, message = DAMAGE[damage]
    spoil(cache)
    with pytest.raises(UnfitError, match=message) as refusal:
        load_inputs(make_config(teacher=None, teacher_cache=str(cache)))
    assert "\n" not in str(refusal.value)


def test_a_shard_of_another_cache_is_refused(
    make_config: Make, caches: Caches, tmp_path: Path
) -> None:
    """Also if somebody has made the list of hashes fit it."""
    cache = copy_of(caches["bf16"], tmp_path / "cache")
    shutil.copy(caches["int8"] / "shard-00000.safetensors", cache)
    other = json.loads((caches["int8"] / COMPLETE).read_text())
    content = json.loads((cache / COMPLETE).read_text())
    name = "shard-00000.safetensors"
    content["files"][name] = other["files"][name]
    (cache / COMPLETE).write_text(json.dumps(content))
    with pytest.raises(UnfitError, match="must be a shard of the cache beside it"):
        load_inputs(make_config(teacher=None, teacher_cache=str(cache)))


def test_another_teachers_cache_is_refused(
    make_config: Make, sources: dict[str, Any], caches: Caches, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(sources["teacher"], other)
    with (other / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(UnfitError, match=r"run's teacher \(config.json of .*other\)"):
        load_inputs(make_config(teacher=str(other), teacher_cache=str(caches["bf16"])))
    load_inputs(make_config(teacher_cache=str(caches["bf16"])))  # its own


def test_a_folder_that_is_not_there_is_named_at_once(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run `sad cache-teacher` with the same recipe and"):
        load_inputs(make_config(teacher=None, teacher_cache=str(tmp_path / "none")))
