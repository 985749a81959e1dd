"""A teacher with another tokenizer: ordinary distillation for equal ones, right by definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.chat import say, write_records
from support.other_tokenizer import settings, with_bytes
from support.runs import assert_same_bits, everything, make_trainer
from support.tiny import TEXT, save_tiny, tiny_llama, tiny_tokenizer
from support.vocabularies import permutation, permuted_model, permuted_tokenizer
from torch import Tensor

from sad.checkpoint.store import load_checkpoint, save_checkpoint
from sad.config.schema import DistillConfig
from sad.data.alignment import AlignedRows
from sad.data.batch import Batch
from sad.distributed.world import ALONE
from sad.errors import UnfitError, UsageError
from sad.losses.cross_tokenizer import binary_kl
from sad.models.heads import split_head, with_valid_vocab
from sad.models.load import build_model, build_student_model
from sad.models.memory_plan import AT_BOUNDARIES, forward_items
from sad.training.cross_tokenizer import require_one_process
from sad.training.inputs import RunInputs, load_inputs
from sad.training.rescore import evaluate_run
from sad.training.run import distill
from sad.training.trainer import Trainer


def trained(config: DistillConfig) -> tuple[dict[str, Any], Trainer]:
    trainer = make_trainer(config)
    while trainer.counters.micro_step < trainer.run_length.micro_batches:
        trainer.micro_batch()
    found = everything(trainer)
    del found["state"]  # which names the teacher
    return found, trainer


@pytest.mark.parametrize("keys", [{}, {"temperature": 2.0, "packing": False}])
@pytest.mark.parametrize("permuted", [False, True])
def test_equal_and_permuted_tokenizers_give_ordinary_distillation(
    tmp_path: Path, permuted: bool, keys: dict[str, Any]
) -> None:
    found = settings(tmp_path, **keys)
    ordinary, _ = trained(DistillConfig(**found))
    if permuted:
        found["teacher"] = permuted_teacher(tmp_path)
    crossed, _ = trained(DistillConfig(**found, cross_tokenizer="prefix"))
    start = {n: p.detach() for n, p in tiny_llama(seed=2).named_parameters()}
    assert ordinary.keys() == crossed.keys()
    for name, value in ordinary.items():
        if name.removeprefix("student/") in start:  # AdamW divides small differences by small roots
            moved = (value - start[name.removeprefix("student/")]).abs().max()
            assert (value - crossed[name]).abs().max() < 1e-3 * moved, name


@pytest.mark.parametrize("permuted", [False, True])
def test_the_loss_of_equal_tokenizers_is_the_ordinary_one(tmp_path: Path, permuted: bool) -> None:
    found = settings(tmp_path)
    found_loss, found_grad = first_loss(DistillConfig(**found))
    if permuted:
        found["teacher"] = permuted_teacher(tmp_path)
    loss, grad = first_loss(DistillConfig(**found, cross_tokenizer="prefix"))
    assert abs(loss - found_loss) < 1e-6
    for name, value in found_grad.items():
        assert (value - grad[name]).abs().max() < 1e-6 * max(1.0, float(value.abs().max())), name


def permuted_teacher(folder: Path) -> str:
    """The teacher of ``settings``, by other ids."""
    order = permutation(512)
    model = permuted_model(tiny_llama(seed=1), order)
    return save_tiny(folder / "permuted", model, permuted_tokenizer(order))


def first_loss(config: DistillConfig) -> tuple[float, dict[str, Tensor]]:
    trainer = make_trainer(config)
    trainer.student.train()
    window = trainer._window(0)
    counts, weights = trainer.batches.counts(window), trainer.weights(0)
    result = trainer._forward(trainer.batches.batch(0), weights, counts)
    result.loss.backward()
    grads = {n: p.grad for n, p in trainer.student.named_parameters() if p.grad is not None}
    return float(result.loss.detach()), grads


def logits_of(model: Any, batch: Batch, vocab: int) -> Tensor:
    """Logits [B, L, V] in float64, of the model's own tables."""
    backbone, head = split_head(model)
    head = with_valid_vocab(head, vocab)
    return head(backbone(batch.input_ids, batch.position_ids)).double()


def whole_batch(inputs: RunInputs) -> Batch:
    rows = inputs.train_rows
    assert isinstance(rows, AlignedRows)
    return rows.batch(range(min(len(rows), 6)))


def test_prefix_is_its_definition(tmp_path: Path) -> None:
    config = with_bytes(tmp_path)
    inputs = load_inputs(config)
    trainer = make_trainer(config, inputs)
    batch = whole_batch(inputs)
    theirs, comparison = batch.theirs, inputs.comparison
    assert theirs is not None and comparison is not None and inputs.teacher is not None
    student = trainer.student.train()
    weights = {"kd": 0.7}
    output = inputs.teacher.forward(batch)
    result = student(batch, output, config.objective(), batch.counts, weights)

    q = logits_of(student.model, batch, 300).softmax(-1)
    p = logits_of(inputs.teacher.model, theirs.batch, 512).softmax(-1)
    of_student, of_teacher = (
        F.one_hot(torch.from_numpy(table).long(), comparison.tables.count).double()
        for table in (comparison.tables.student, comparison.tables.teacher)
    )
    loss, kd = torch.zeros((), dtype=torch.float64), 0.0
    for row, at in (batch.labels >= 0).nonzero().tolist():
        ce = -q[row, at, batch.labels[row, at]].log()
        there = int(theirs.positions[row, at])
        if there < 0:
            loss = loss + ce
            continue
        P, Q = p[row, there] @ of_teacher, q[row, at] @ of_student
        divergence = torch.where(P > 0, P * (P.clamp(min=1e-300).log() - Q.log()), 0).sum()
        kd += float(divergence.detach())
        loss = loss + 0.3 * ce + 0.7 * divergence
    loss = loss / batch.counts.targets
    assert float((result.loss.detach() - loss.detach()).abs()) < 1e-6
    assert float(result.distill.kd) == pytest.approx(kd, rel=1e-5)
    (ours,) = torch.autograd.grad(result.loss, student.model.lm_head.weight, retain_graph=True)
    (true,) = torch.autograd.grad(loss, student.model.lm_head.weight)
    assert (ours - true).abs().max() < 1e-6


def test_inside_the_teachers_tokens_it_is_its_definition(tmp_path: Path) -> None:
    plain, config = (with_bytes(tmp_path, prefix_inside=inside) for inside in (False, True))
    inputs = load_inputs(config)
    batch, comparison = whole_batch(inputs), inputs.comparison
    theirs = batch.theirs
    assert theirs is not None and comparison is not None and inputs.teacher is not None
    results = []
    for of_run in (load_inputs(plain), inputs):
        student = make_trainer(config, of_run).student.train()
        answer = inputs.teacher.forward(batch)
        results.append(student(batch, answer, config.objective(), batch.counts, {"kd": 0.7}))
    q = logits_of(student.model, batch, 300).log_softmax(-1)
    p = logits_of(inputs.teacher.model, theirs.batch, 512).softmax(-1)
    ours, teachers = (
        [strings(t, i) for i in range(len(t))] for t in (tiny_tokenizer(300), tiny_tokenizer())
    )
    number = {text: int(o) for text, o in zip(ours, comparison.tables.student, strict=True)
              if teachers.count(text) and len(text) == comparison.tables.sizes[o]}  # fmt: skip
    gain, kd, found = torch.zeros((), dtype=torch.float64), 0.0, 0
    for row in range(len(batch.labels)):
        last = None
        for at in range(32):
            if batch.labels[row, at] < 0:
                last = None
                continue
            if int(theirs.positions[row, at]) >= 0:
                last = at
                continue
            if last is None:
                continue
            read = "".join(ours[i] for i in batch.input_ids[row, last + 1 : at + 1].tolist())
            there = int(theirs.positions[row, last])
            token = teachers[int(theirs.batch.input_ids[row, there + 1])]
            while read.startswith(token):
                read, there = read[len(token) :], there + 1
                token = teachers[int(theirs.batch.input_ids[row, there + 1])]
            assert read and token.startswith(read) and token != read
            P = torch.zeros(comparison.tables.count, dtype=torch.float64)
            for text, mass in zip(teachers, p[row, there], strict=True):
                if text.startswith(read) and text != read:
                    more = text[len(read) :]
                    P[
                        next(
                            number[more[:n]] for n in range(len(more), 0, -1) if more[:n] in number
                        )
                    ] += mass
            P = P / P.sum()
            of_student = torch.from_numpy(comparison.tables.student).long()
            Q = torch.zeros(comparison.tables.count, dtype=torch.float64)
            Q = Q.index_add(0, of_student, q[row, at].exp())
            divergence = torch.where(P > 0, P * (P.clamp(min=1e-300).log() - Q.log()), 0).sum()
            gain = gain + 0.7 * (divergence + q[row, at, batch.labels[row, at]])
            kd, found = kd + float(divergence.detach()), found + 1
    assert found > 5
    before, after = results
    expected = float(before.loss.detach() + gain.detach() / batch.counts.targets)
    assert float(after.loss.detach()) == pytest.approx(expected, abs=1e-6)
    assert float(after.distill.kd) == pytest.approx(float(before.distill.kd) + kd, rel=1e-5)
    weight = student.model.lm_head.weight
    (ours_grad,) = torch.autograd.grad(after.loss, weight)
    (true,) = torch.autograd.grad(gain / batch.counts.targets, weight, retain_graph=True)
    student = make_trainer(config, load_inputs(plain)).student.train()
    again = student(batch, answer, config.objective(), batch.counts, {"kd": 0.7})
    (plain_grad,) = torch.autograd.grad(again.loss, student.model.lm_head.weight)
    assert (ours_grad - plain_grad - true).abs().max() < 1e-6


def strings(tokenizer: Any, token_id: int) -> str:
    """A byte-level token as written, end-of-text as nothing that begins like text."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    return "\0" if token_id == tokenizer.eos_token_id else token


def test_likelihood_is_its_definition(tmp_path: Path) -> None:
    config = with_bytes(tmp_path, cross_tokenizer="likelihood", ce_weight=0.8)
    inputs = load_inputs(config)
    trainer = make_trainer(config, inputs)
    batch = whole_batch(inputs)
    theirs = batch.theirs
    assert theirs is not None and inputs.teacher is not None
    student = trainer.student.train()
    output = inputs.teacher.forward(batch)
    result = student(batch, output, config.objective(), batch.counts, {"kd": 0.7})
    q = logits_of(student.model, batch, 300).log_softmax(-1)
    p = logits_of(inputs.teacher.model, theirs.batch, 512).log_softmax(-1)

    def summed(log_probs: Tensor, labels: Tensor, groups: Tensor, group: int) -> Tensor:
        own = groups == group
        return log_probs[own].gather(1, labels[own][:, None]).sum()

    alm = torch.zeros((), dtype=torch.float64)
    for group in theirs.groups[theirs.groups >= 0].unique().tolist():
        s = summed(q, batch.labels, theirs.groups, group).exp()
        t = summed(p, theirs.batch.labels, theirs.teacher_groups, group).exp()
        alm = alm + t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
    valid = batch.labels >= 0
    ce = -q[valid].gather(1, batch.labels[valid][:, None]).sum()
    loss = (0.8 * ce + 0.7 * alm) / batch.counts.targets
    assert float((result.loss.detach() - loss.detach()).abs()) < 1e-6
    assert float(result.distill.kd) == pytest.approx(float(alm.detach()), rel=1e-4)
    (ours,) = torch.autograd.grad(result.loss, student.model.lm_head.weight, retain_graph=True)
    (true,) = torch.autograd.grad(loss, student.model.lm_head.weight)
    assert (ours - true).abs().max() < 1e-6


def test_likelihood_is_a_further_term(tmp_path: Path) -> None:
    losses = []
    for keys in (
        {"cross_tokenizer": "prefix"},
        {"cross_tokenizer": "prefix", "likelihood_weight": 0.5},
        {"cross_tokenizer": "likelihood", "ce_weight": 0.0},
    ):
        config = with_bytes(tmp_path, **keys)
        inputs = load_inputs(config)
        student, batch = make_trainer(config, inputs).student.train(), whole_batch(inputs)
        assert inputs.teacher is not None
        output = inputs.teacher.forward(batch)
        losses.append(student(batch, output, config.objective(), batch.counts, {"kd": 0.7}).loss)
    prefix, both, alone = (loss.item() for loss in losses)
    assert both == pytest.approx(prefix + 0.5 * alone, rel=1e-6) and alone > 0


def test_a_sure_group_has_a_finite_gradient() -> None:
    known = torch.tensor([0.0, -1e-9, -2.0, -100.0])
    ours = torch.tensor([0.0, -3.0, -1e-9, -100.0], requires_grad=True)
    value = binary_kl(known, ours)
    value.sum().backward()
    assert value.isfinite().all() and ours.grad is not None and ours.grad.isfinite().all()
    assert value[0] == 0 and value[3] == 0 and (value[1:3] > 1).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["prefix", "likelihood"])
def test_a_run_learns_and_is_scored_again(tmp_path: Path, mode: Any) -> None:
    config = with_bytes(
        tmp_path, cross_tokenizer=mode, max_steps=2, baseline=True, use_ema=False, max_eval_rows=4
    )
    result = distill(config)
    assert set(result.metrics) >= {"eval/kl", "eval/nll", "eval_teacher/bits_per_byte"}
    assert result.metrics["eval/kl"] > 0
    names = [row["name"] for row in result.results]
    assert names[0] == "teacher" and len(names) == 3
    log = (result.run_dir / "log.jsonl").read_text()
    assert "the teacher has another tokenizer: 512 ids" in log and "labels disagree at" in log
    teacher, student = evaluate_run(result.run_dir)
    assert teacher["bits_per_byte"] == pytest.approx(result.metrics["eval_teacher/bits_per_byte"])
    best = min(result.metrics["eval/nll"], student["nll"])
    assert student["nll"] == pytest.approx(best) and student["kl"] > 0


@pytest.mark.parametrize("mode", ["prefix", "likelihood"])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, mode: Any) -> None:
    config = with_bytes(tmp_path, cross_tokenizer=mode, gradient_accumulation_steps=2, max_steps=3)
    whole, _ = trained(config)
    first = make_trainer(config)
    for _ in range(3):  # in the middle of a window
        first.micro_batch()
    state, tensors = first.capture()
    path = save_checkpoint(config.output_dir, 3, state, tensors, save_total_limit=2)
    second = make_trainer(config)
    second.restore(load_checkpoint(path), warn=pytest.fail)
    while second.counters.micro_step < second.run_length.micro_batches:
        second.micro_batch()
    found = everything(second)
    del found["state"]
    assert_same_bits(found, whole)


def test_a_teacher_that_works_ahead_teaches_the_same(tmp_path: Path) -> None:
    config = with_bytes(tmp_path)
    ahead, _ = trained(replace(config, teacher_prefetch=1))
    assert_same_bits(ahead, trained(config)[0])


def test_the_divergence_may_fall_over_training(tmp_path: Path) -> None:
    config = with_bytes(tmp_path, curriculum={"kd": [[0, 1], [1, 0]]}, max_steps=3)
    trainer = make_trainer(config)
    weights = [trainer.weights(step)["kd"] for step in range(3)]
    assert weights[0] == 0.7 > weights[1] > weights[2] > 0
    while trainer.counters.micro_step < 3:
        trainer.micro_batch()


def test_another_tokenizer_may_be_named(tmp_path: Path) -> None:
    config = with_bytes(tmp_path)
    alone = save_tiny(tmp_path / "no-tokenizer", tiny_llama(seed=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(alone) / name).unlink()
    named = replace(config, teacher=alone, teacher_tokenizer=config.teacher)
    assert (
        load_inputs(named).identity(named)["train_rows"]
        == load_inputs(config).train_rows.fingerprint
    )


def test_the_refusal_of_another_tokenizer_names_the_key(tmp_path: Path) -> None:
    config = replace(with_bytes(tmp_path), cross_tokenizer=None)
    save_tiny(Path(config.student), tiny_llama(seed=2), tiny_tokenizer(text=TEXT[::-1]))
    with pytest.raises(UnfitError, match="cross_tokenizer: prefix") as caught:
        load_inputs(config)
    assert "\n" not in str(caught.value)


def test_conversations_are_learned_with_the_template_of_each(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}"
    talks = [say(f"user: {line[:9]}", f"assistant: {line[9:19]}") for line in TEXT.splitlines()]
    records = [{"messages": talk} for talk in talks if len(talk[1]["content"]) > 5] * 5
    config = with_bytes(tmp_path, max_length=96)
    other = template.replace(">", "::")
    for path, vocab, written in ((config.student, 300, template), (config.teacher, 512, other)):
        tokenizer = tiny_tokenizer(vocab)
        tokenizer.chat_template = written  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.save_pretrained(str(path))
    data = replace(config.data, train=(write_records(tmp_path / "talks.jsonl", *records),))
    trainer = make_trainer(replace(config, data=data))
    batch = trainer.batches.batch(0)
    assert batch.theirs is not None and 0 < int(batch.theirs.boundaries.sum()) < batch.num_targets
    weights = trainer.weights(0)
    result = trainer._forward(batch, weights, batch.counts)
    assert result.loss.isfinite() and result.distill.kd > 0


def test_several_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cross_tokenizer must be left out on several processes"):
        require_one_process(replace(ALONE, size=2))


def test_the_plan_counts_the_states_at_boundaries(tmp_path: Path) -> None:
    config = with_bytes(tmp_path)
    items = dict(forward_items_of(config))
    assert items[AT_BOUNDARIES] == items["teacher hidden states"] == 2 * 32 * 32 * 4
    other = replace(config, cross_tokenizer="likelihood")
    assert AT_BOUNDARIES not in dict(forward_items_of(other))


def forward_items_of(config: DistillConfig) -> list[tuple[str, int]]:
    student, teacher = build_student_model(config), build_model(config, "teacher", torch.float32)
    return forward_items(config, torch.device("cpu"), student, teacher)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cross_tokenizer": None, "teacher_tokenizer": "x"}, "teacher_tokenizer must be left out"),
        ({"cross_tokenizer": "likelihood", "prefix_inside": True}, "prefix_inside must be false"),
        (
            {"cross_tokenizer": "likelihood", "likelihood_weight": 1.0},
            "likelihood_weight must be 0 unless cross_tokenizer is prefix",
        ),
        ({"teacher": None, "kd_weight": 0.0}, "teacher must be given with cross_tokenizer"),
        ({"teacher_cache": "c", "likelihood_weight": 0.5}, "likelihood_weight must be 0 with a t"),
        (
            {
                "cross_tokenizer": "likelihood",
                "teacher_cache": "c",
                "metric_for_best_model": "eval/kl",
            },
            "metric_for_best_model must be one of eval/nll",
        ),
        ({"teacher_cache": "c", "prefix_inside": True}, "prefix_inside must be false with a te"),
        ({"teacher_cache": "c", "teacher": None}, "teacher must be given with cross_tokenizer"),
        ({"vocab_map": "map.json"}, "vocab_map must be left out with cross_tokenizer"),
        (
            {"student_init": "layers", "student": "", "student_layers": 1},
            "student_init must be ran",
        ),
        ({"routing": {"mode": "student_aware"}}, "routing.mode must be teacher"),
        ({"taid": {"enabled": True}}, "taid.enabled must be false"),
        ({"feature": {"weight": 0.1}}, "cross_tokenizer must be left out with structural losses"),
        ({"divergence": "reverse_kl"}, "divergence must be forward_kl with cross_tokenizer"),
        ({"z_loss": 0.1}, "z_loss must be 0 with cross_tokenizer prefix"),
        ({"cross_tokenizer": "uld"}, "cross_tokenizer must be"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: dict[str, Any], message: str) -> None:
    given = {"student": "s", "teacher": "t", "cross_tokenizer": "prefix", "label_smoothing": 0.0}
    with pytest.raises(UsageError) as caught:
        DistillConfig(**given | keys)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_ce_the_divergence_stands_alone_at_boundaries(tmp_path: Path) -> None:
    config = with_bytes(tmp_path, kd_weight=1.0)
    inputs = load_inputs(config)
    trainer = make_trainer(config, inputs)
    batch = whole_batch(inputs)
    assert batch.theirs is not None and inputs.teacher is not None
    result = trainer.student.train()(
        batch, inputs.teacher.forward(batch), config.objective(), batch.counts, {"kd": 1.0}
    )
    q = logits_of(trainer.student.model, batch, 300).log_softmax(-1)
    inside = (batch.labels >= 0) & ~batch.theirs.boundaries
    assert inside.any()
    ce = -q[inside].gather(1, batch.labels[inside][:, None]).sum()
    loss = (float(ce.detach()) + float(result.distill.kd)) / batch.counts.targets
    assert float(result.loss.detach()) == pytest.approx(loss, rel=1e-5)
