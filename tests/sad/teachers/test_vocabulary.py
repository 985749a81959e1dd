"""A teacher with other ids teaches all the same: by definition, in runs, from a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sad_kernels import Head, Objective, TeacherHidden, linear_distill_loss
from sad_kernels._divergence_table import DIVERGENCES
from support.runs import assert_same_bits, everything, make_trainer
from support.tiny import TEXT, save_tiny, tiny_llama, tiny_run, tiny_tokenizer
from support.vocabularies import permutation, permuted_model, permuted_tokenizer
from torch import Tensor

from sad.config.cache_options import CacheOptions
from sad.config.schema import DistillConfig
from sad.data.batch import Batch, LossCounts
from sad.data.vocab_map import NONE, VocabMap, find_vocab_map, masked_positions, read_vocab_map
from sad.errors import SadError, UnfitError, UsageError
from sad.teachers.cache.files import read_facts
from sad.teachers.cached import CachedTeacher
from sad.teachers.frozen import FrozenTeacher
from sad.teachers.vocabulary import mapped_head, read_weights, scored_labels, unknown_ids
from sad.training.cache_teacher import cache_teacher
from sad.training.evaluate import evaluate_teacher
from sad.training.inputs import load_inputs
from sad.training.rescore import evaluate_run
from sad.training.run import distill

N, D, D_T, V, V_T = 40, 16, 24, 300, 360
ADDED = "<|tool|>"
FINITE = [name for name in DIVERGENCES if not DIVERGENCES[name].needs_full_support]


def some_map() -> VocabMap:
    ids = permutation(V_T)[:V]
    ids[[7, 50, 299]] = NONE
    return VocabMap(ids, V_T)


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# The definition


def dense(
    hidden: Tensor, head: Tensor, target: TeacherHidden, found: VocabMap, objective: Objective
) -> Tensor:
    """The objective's mean by its definition: the teacher's softmax over the ids that both have."""
    T, beta = objective.temperature, objective.beta
    known = torch.from_numpy(np.flatnonzero(~found.missing))
    s, t = hidden @ head.T, target.head(target.hidden)
    p = torch.zeros_like(s)
    p[:, known] = (t[:, torch.from_numpy(found.teacher_ids)[known]] / T).softmax(1)
    q = (s / T).softmax(1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a.clamp(min=1e-300).log() - b.log()), 0).sum(1)

    mixture = beta * p + (1 - beta) * q
    match objective.divergence:
        case "forward_kl":
            kd = kl(p, q)
        case "jsd":
            kd = beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
        case "skew_forward_kl":
            kd = kl(p, mixture)
        case "skew_reverse_kl":
            kd = kl(q, beta * q + (1 - beta) * p)
        case _:
            kd = 0.5 * (p - q).abs().sum(1)
    ce = F.cross_entropy(s, labels(), reduction="none")
    return (objective.ce_weight * ce + objective.kd_weight * T * T * kd).mean()


def labels() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))


def gradient(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    leaf = hidden.clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", FINITE)
def test_the_mapped_head_is_the_dense_definition(divergence: Any, temperature: float) -> None:
    found = some_map()
    objective = Objective(
        ce_weight=0.1, kd_weight=0.9, divergence=divergence, temperature=temperature
    )
    hidden, weight = numbers(N, D, seed=0), numbers(V, D, seed=1)
    states, theirs = numbers(N, D_T, seed=2), Head(numbers(V_T, D_T, seed=3) / 4)
    target = TeacherHidden(states, mapped_head(theirs, found))

    def ours(leaf: Tensor) -> Tensor:
        return linear_distill_loss(
            leaf, Head(weight / 4), labels(), target, objective, impl="torch"
        ).loss

    exact = TeacherHidden(states, theirs)
    value, grad = gradient(ours, hidden)
    true, true_grad = gradient(lambda x: dense(x, weight / 4, exact, found, objective), hidden)
    assert abs(value - true) < 1e-12 and (grad - true_grad).abs().max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_triton_agrees(divergence: Any, temperature: float) -> None:
    found = some_map()
    objective = Objective(
        ce_weight=0.1, kd_weight=0.9, divergence=divergence, temperature=temperature
    )
    hidden, weight = numbers(N, D, seed=0).float(), (numbers(V, D, seed=1) / 4).float()
    head = mapped_head(Head((numbers(V_T, D_T, seed=3) / 4).float()), found)
    target = TeacherHidden(numbers(N, D_T, seed=2).float(), head)
    found_by: dict[str, tuple[Tensor, Tensor]] = {}
    for impl in ("torch", "triton"):

        def loss(leaf: Tensor, impl: str = impl) -> Tensor:
            keys: Any = {"impl": impl}
            return linear_distill_loss(leaf, Head(weight), labels(), target, objective, **keys).loss

        found_by[impl] = gradient(loss, hidden)
    assert torch.allclose(found_by["torch"][0], found_by["triton"][0], rtol=1e-5)
    assert torch.allclose(found_by["torch"][1], found_by["triton"][1], rtol=1e-4, atol=1e-7)


def test_taid_mixes_with_the_mapped_teacher() -> None:
    found = some_map()
    objective = Objective(kd_weight=1.0, teacher_share=0.5)
    hidden, weight = numbers(N, D, seed=0), numbers(V, D, seed=1) / 4
    states, theirs = numbers(N, D_T, seed=2), Head(numbers(V_T, D_T, seed=3) / 4)
    target = TeacherHidden(states, mapped_head(theirs, found))
    value = linear_distill_loss(hidden, Head(weight), labels(), target, objective).loss
    s, t = hidden @ weight.T, target.head(states)
    p = (0.5 * s + 0.5 * t).softmax(1)
    true = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - s.log_softmax(1)), 0).sum(1).mean()
    assert abs(value - true) < 1e-12


@pytest.mark.parametrize("scale", [0.25, -2.0])
def test_scale_and_bias_of_the_teacher_are_kept(scale: float) -> None:
    found, hidden = some_map(), numbers(N, D_T, seed=2)
    theirs = Head(numbers(V_T, D_T, seed=3), numbers(V_T, seed=4), logit_scale=scale)
    logits = mapped_head(theirs, found)(hidden)
    assert logits[:, found.missing].isneginf().all()
    known = ~found.missing
    assert torch.equal(logits[:, known], theirs(hidden)[:, found.teacher_ids[known]])


def test_a_softcap_needs_every_id() -> None:
    theirs = Head(numbers(V_T, D_T, seed=3), softcap=30.0)
    with pytest.raises(UnfitError, match=r"must know all of the student's ids .* got 3 that it"):
        mapped_head(theirs, some_map())
    trimmed = VocabMap(permutation(V_T)[:V], V_T)
    hidden = numbers(N, D_T, seed=2)
    expected = theirs(hidden)[:, trimmed.teacher_ids]
    assert torch.equal(mapped_head(theirs, trimmed)(hidden), expected)


def test_ids_in_place_share_the_weight() -> None:
    theirs = Head(numbers(V_T, D_T, seed=3))
    more = VocabMap(np.append(np.arange(V - 2), [NONE, NONE]), V - 2)
    head = mapped_head(theirs, more)
    assert head.weight.data_ptr() == theirs.weight.data_ptr() and head.vocab_size == V
    unknown = unknown_ids(head)
    assert unknown is not None and unknown.nonzero().flatten().tolist() == [V - 2, V - 1]


def test_from_an_unknown_token_to_the_end_of_its_document() -> None:
    ids = torch.tensor([[1, 9, 2, 3, 1, 2, 9, 9], [9, 1, 1, 2, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5]])
    expected = [[1, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]]
    counts = LossCounts(0, 0, 0)
    batch = Batch(ids, ids, positions, torch.tensor([8, 8]), counts, 0)
    unknown = torch.zeros(10, dtype=torch.bool)
    unknown[9] = True
    weights = read_weights(batch, unknown)
    assert weights.tolist() == expected
    masked = masked_positions(unknown[ids].numpy(), positions.numpy())
    assert (~masked).astype(int).tolist() == expected
    bias = torch.zeros(10).masked_fill(unknown, -torch.inf)
    scored = scored_labels(batch, weights, Head(torch.zeros(10, 4), bias))
    assert scored[0].tolist() == [1, -100, -100, 3, 1, 2, -100, -100]


# Maps


def with_added(*tokens: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def test_equal_ids_need_no_map() -> None:
    assert find_vocab_map(tiny_tokenizer(), tiny_tokenizer()) == (None, ())


def test_added_tokens_have_no_id_of_the_teachers() -> None:
    found, (note,) = find_vocab_map(tiny_tokenizer(), with_added(ADDED))
    assert found is not None
    assert found.teacher_ids.tolist() == [*range(512), NONE]
    assert note.endswith("512 of its 512 stand for the student's, by equal tokens; 1 of the "
                         "student's have none")  # fmt: skip


def test_a_trimmed_student_is_mapped_by_its_tokens() -> None:
    """The teacher's first tokens and merges, in another order."""
    order = permutation(512)
    found, _ = find_vocab_map(permuted_tokenizer(order), tiny_tokenizer(400))
    assert found is not None and not found.missing.any()
    assert found.teacher_ids.tolist() == order[:400].tolist()


def test_another_vocabulary_is_refused_as_before() -> None:
    with pytest.raises(UnfitError, match="tokenizers must be equal"):
        find_vocab_map(tiny_tokenizer(), tiny_tokenizer(text=TEXT[::-1]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[0, 1", "must be a JSON file that can be read"),
        ("3", "must be a list or an object, got int"),
        ("{}", "name at least one pair"),
        ('{"a": 1}', "have ids of the student as keys, got 'a'"),
        ('{"1": 1, "01": 2}', "name each of the student's ids once"),
        ("[0, 1, 2, 3, 4, 5]", "have at most the student's 5 ids, got 6"),
        ('{"5": 1}', "name ids of the student, 0 to 4, got 5"),
        ("[0, 9]", "lead to ids of the teacher, 0 to 8, or null, got 9"),
        ("[0, true]", "lead to ids of the teacher, 0 to 8, or null, got True"),
        ("[0, -1]", "lead to ids of the teacher, 0 to 8, or null, got -1"),
        ("[3, 3]", "lead to each of the teacher's ids once, got 3 twice"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises((UnfitError, UsageError)) as caught:
        read_vocab_map(str(path), 5, 9)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_may_leave_ids_out(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"0": 3, "4": null, "2": 0}')
    assert read_vocab_map(str(path), 5, 9).teacher_ids.tolist() == [3, -1, 0, -1, -1]
    path.write_text("[3, null, 0]")
    assert read_vocab_map(str(path), 5, 9).teacher_ids.tolist() == [3, -1, 0, -1, -1]


def test_a_file_that_is_wrong_by_one_pair_is_found_out(tmp_path: Path) -> None:
    ids = list(range(512))
    a, b = (tiny_tokenizer().get_vocab()[letter] for letter in "ae")
    ids[a], ids[b] = ids[b], ids[a]
    path = tmp_path / "map.json"
    path.write_text(json.dumps(ids))
    with pytest.raises(UnfitError, match="must encode text alike but for their ids, got the teach"):
        find_vocab_map(tiny_tokenizer(), tiny_tokenizer(), file=str(path))


# Runs


def settings(folder: Path, **keys: Any) -> dict[str, Any]:
    found = tiny_run(folder, tiny_llama(seed=2), tiny_llama(seed=1))
    found["data"] |= {"cache_dir": str(folder / "rows")}
    return found | {"max_steps": 2, "max_eval_rows": 16, "device": "cpu"} | keys


def permuted(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The same run with the same teacher, which has other ids."""
    order = permutation(512)
    model = permuted_model(tiny_llama(seed=1), order)
    teacher = save_tiny(folder / "permuted", model, permuted_tokenizer(order))
    return found | {"teacher": teacher, "output_dir": str(folder / "run-permuted")}


def trained(config: DistillConfig) -> dict[str, Any]:
    trainer = make_trainer(config)
    while trainer.counters.micro_step < trainer.run_length.micro_batches:
        trainer.micro_batch()
    found = everything(trainer)
    del found["state"]  # which names the teacher
    return found


@pytest.mark.parametrize("keys", [{}, {"feature": {"weight": 0.1}, "use_curriculum": False}])
def test_a_teacher_with_permuted_ids_teaches_the_same(tmp_path: Path, keys: dict) -> None:
    found = settings(tmp_path, **keys)
    ours = trained(DistillConfig(**found))
    theirs = trained(DistillConfig(**permuted(tmp_path, found)))
    assert_same_bits(ours, theirs)


def test_a_map_that_is_the_identity_changes_nothing(tmp_path: Path) -> None:
    found = settings(tmp_path)
    path = tmp_path / "map.json"
    path.write_text(json.dumps(list(range(512))))
    config = DistillConfig(**found)
    named = replace(config, vocab_map=str(path))
    assert load_inputs(named).vocabulary is None
    assert_same_bits(trained(config), trained(named))


def with_tools(folder: Path, *, every: int, **keys: Any) -> dict[str, Any]:
    """A run whose student has a token that its teacher lacks, in one of ``every`` documents."""
    student = tiny_llama(seed=2, vocab_size=520)
    found = settings(folder, **keys)
    found["student"] = save_tiny(folder / "student-tools", student, with_added(ADDED))
    lines = TEXT.strip().splitlines()
    texts = [" ".join(lines[i % 5 : i % 5 + 3]) for i in range(120)]
    texts[::every] = [f"{text[:-6]}{ADDED}{text[-6:]}" for text in texts[::every]]
    path = folder / "tools.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found["data"] = found["data"] | {"train": str(path)}
    return found


def test_a_token_that_the_teacher_lacks_ends_its_answers(tmp_path: Path) -> None:
    inputs = load_inputs(DistillConfig(**with_tools(tmp_path, every=40)))
    facts, teacher = inputs.vocabulary, inputs.teacher
    assert facts is not None and facts.missing == 1 and facts.masked > 0
    assert isinstance(teacher, FrozenTeacher) and teacher.is_mapped
    notes = "\n".join(inputs.tokenizer_notes)
    assert "stand behind a token that the teacher lacks: they learn from the text alone" in notes
    assert "of the teacher's probability is outside the student's vocabulary" in notes
    masked = 0
    for rows in (inputs.train_rows, inputs.eval_rows):
        for number in range(len(rows)):
            batch = rows.batch([number])
            weights = teacher.forward(batch).kd_weights
            assert weights is not None
            masked += int(((weights == 0) & (batch.labels >= 0)).sum())
    assert masked == facts.masked


def test_what_the_teacher_makes_of_masked_targets_does_not_count(tmp_path: Path) -> None:
    """Nor does cross-entropy change with the map: only the divergence is masked."""
    inputs = load_inputs(DistillConfig(**with_tools(tmp_path, every=40)))
    (number, *_) = inputs.train_rows.rows_with(np.arange(513) == 512)
    trainer = make_trainer(DistillConfig(**with_tools(tmp_path, every=40)), inputs)
    batch = inputs.train_rows.batch([number])
    output = trainer.policy.forward(batch)
    (target,) = output.targets
    assert isinstance(target, TeacherHidden) and output.kd_weights is not None
    spoilt = target.hidden.masked_fill((output.kd_weights == 0)[..., None], torch.nan)
    objective = trainer.config.objective()
    losses = [
        trainer.student(batch, output._replace(targets=(t,)), objective, batch.counts).distill
        for t in (target, TeacherHidden(spoilt, target.head))
    ]
    assert torch.equal(losses[0].loss, losses[1].loss) and losses[0].loss.isfinite()
    alone = trainer.student(batch, None, replace(objective, kd_weight=0.0), batch.counts)
    assert torch.equal(losses[0].ce, alone.distill.ce)
    assert losses[0].num_tokens == batch.counts.targets


def test_more_than_a_hundredth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnfitError, match=r"must be able to read 99% of the (training|held-out) te"):
        load_inputs(DistillConfig(**with_tools(tmp_path, every=2)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"divergence": "reverse_kl"}, "divergence must be finite where the teacher has no prob"),
        ({"divergence": "jeffreys"}, "divergence must be finite where the teacher has no prob"),
        ({"feature": {"weight": 0.1}}, "feature.weight must be 0 where the teacher cannot read"),
        ({"routing": {"mode": "student_aware"}}, "routing.mode must be teacher where its ids"),
    ],
    ids=["reverse_kl", "jeffreys", "feature", "routing"],
)
def test_what_a_teacher_that_lacks_ids_cannot_serve(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnfitError, match=message) as caught:
        load_inputs(DistillConfig(**with_tools(tmp_path, every=40, **keys)))
    assert "\n" not in str(caught.value)


def test_a_map_needs_a_teacher_of_its_own(tmp_path: Path) -> None:
    found = settings(tmp_path, vocab_map="map.json")
    with pytest.raises(UsageError, match="vocab_map must be left out without a teacher"):
        DistillConfig(**found | {"teacher": None, "kd_weight": 0})


def test_a_whole_run_and_its_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DistillConfig(**with_tools(tmp_path, every=40))
    result = distill(config)
    assert "they learn from the text alone" in capsys.readouterr().out
    teacher, student = evaluate_run(result.run_dir)
    assert np.isfinite([teacher["nll"], student["kl"], student["agreement"]]).all()
    assert student["kl"] == pytest.approx(result.metrics["eval_ema/kl"], rel=1e-5) or (
        student["kl"] == pytest.approx(result.metrics["eval/kl"], rel=1e-5)
    )


def test_another_map_is_another_run(tmp_path: Path) -> None:
    found = settings(tmp_path)
    one = load_inputs(DistillConfig(**permuted(tmp_path, found)))
    assert one.vocabulary is not None
    identity = one.identity(DistillConfig(**found))["teacher"]
    assert identity["vocab_map"] == one.vocabulary.hash
    same = load_inputs(DistillConfig(**found))
    assert "vocab_map" not in same.identity(DistillConfig(**found))["teacher"]


# Caches

KINDS = [("sampled", None), ("topk", None), ("hidden", "bf16"), ("hidden", "int8")]


def cached(config: DistillConfig, folder: Path, kind: Any, codec: Any) -> Path:
    options = CacheOptions(str(folder), kind, codec, top_k=16, all_rows=True)
    return cache_teacher(config, options)


@pytest.mark.few(2)
@pytest.mark.parametrize(("kind", "codec"), KINDS)
def test_a_cache_is_in_the_students_ids(tmp_path: Path, kind: Any, codec: Any) -> None:
    found = settings(tmp_path, temperature=1.0)
    plain = cached(DistillConfig(**found), tmp_path / "plain", kind, codec)
    mapped = cached(DistillConfig(**permuted(tmp_path, found)), tmp_path / "mapped", kind, codec)
    runs = [
        trained(DistillConfig(**found | {"teacher": None, "teacher_cache": str(folder)}))
        for folder in (plain, mapped)
    ]
    assert_same_bits(*runs)
    facts = read_facts(mapped)
    assert facts is not None and facts[0].vocab_map is not None


@pytest.mark.few(2)
@pytest.mark.parametrize(("kind", "codec"), KINDS)
def test_a_cache_masks_what_the_teacher_cannot_read(tmp_path: Path, kind: Any, codec: Any) -> None:
    config = DistillConfig(**with_tools(tmp_path, every=40, temperature=1.0))
    folder = cached(config, tmp_path / "cache", kind, codec)
    alone = replace(config, teacher=None, teacher_cache=str(folder))
    inputs, live = load_inputs(alone), load_inputs(config)
    assert "learn from the text alone" in "\n".join(inputs.tokenizer_notes)
    assert isinstance(inputs.teacher, CachedTeacher) and live.teacher is not None
    for number in inputs.train_rows.rows_with(np.arange(513) == 512):
        batch = inputs.train_rows.batch([number])
        ours, theirs = (t.forward(batch).kd_weights for t in (inputs.teacher, live.teacher))
        assert ours is not None and theirs is not None
        learned = batch.labels >= 0
        assert torch.equal(ours[learned], theirs[learned])
    trained(alone)
    if kind == "hidden":
        assert inputs.eval_teacher is not None and live.eval_teacher is not None
        now = evaluate_teacher(inputs.eval_teacher, inputs.eval_batches(alone))
        then = evaluate_teacher(live.eval_teacher, live.eval_batches(config))
        assert now == pytest.approx(then, rel=1e-3)
        with pytest.raises(UnfitError, match="divergence must be finite"):
            load_inputs(replace(alone, divergence="reverse_kl"))


def test_a_cache_of_another_map_is_refused(tmp_path: Path) -> None:
    found = permuted(tmp_path, settings(tmp_path, temperature=1.0))
    folder = cached(DistillConfig(**found), tmp_path / "cache", "sampled", None)
    run = found | {"teacher": None, "teacher_cache": str(folder)}
    path = tmp_path / "map.json"
    order = permutation(512).tolist()
    path.write_text(json.dumps(order))
    load_inputs(DistillConfig(**run, vocab_map=str(path)))
    path.write_text(json.dumps([*order[:-1], None]))
    with pytest.raises(SadError, match=r"made for this run's vocab_map \(hash\), got"):
        load_inputs(DistillConfig(**run, vocab_map=str(path)))
