"""Text that the student writes: which micro-batches, which tokens, which targets, and resuming.

What losses and positions must be is computed here from whole logits of ``transformers``' own
forward pass, row by row.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import assert_same_bits, everything, make_trainer, run_log
from support.tiny import save_tiny, tiny_llama, tiny_run
from torch import Tensor

from sad.checkpoint.store import load_latest
from sad.config.schema import DistillConfig, ce_only
from sad.data.batch import IGNORE_INDEX
from sad.data.prompts import Prompt
from sad.distributed.world import World
from sad.errors import UnfitError, UsageError
from sad.models.adapters import without_adapters
from sad.models.load import enable_checkpointing
from sad.models.memory_plan import plan
from sad.models.rollout_memory import CACHE
from sad.report.log import read_log
from sad.teachers.frozen import FrozenTeacher
from sad.teachers.policy import TeacherPolicy
from sad.training.on_policy import OnPolicyBatches, answer_to, score_rollouts
from sad.training.ranks import check_ranks
from sad.training.rollouts import (
    Sampling,
    is_on_policy,
    on_policy_before,
    rollout_seed,
    write_rollouts,
)
from sad.training.run import distill
from sad.training.self_teacher import build_self_teacher
from sad.training.student import StudentWithLoss
from sad.training.trainer import Trainer

V = 512
ENDS = tuple(range(0, V, 8))
"""Ids that end a completion here: about one in eight that a random student draws."""

MakeConfig = Callable[..., DistillConfig]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    student = tiny_llama(seed=2, attention_dropout=0.1)
    return tiny_run(folder, student, tiny_llama(seed=1, hidden_size=48)) | {
        "lmbda": 0.5,
        "max_completion_length": 12,
        "prompt_length": 8,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "ema_decay": 0.5,
        "label_smoothing": 0.0,
        "temperature": 1.0,
    }


@pytest.fixture
def make_config(sources: dict[str, Any], tmp_path: Path) -> MakeConfig:
    def make(name: str = "run", **keys: Any) -> DistillConfig:
        settings: dict[str, Any] = sources | {"output_dir": str(tmp_path / name)} | keys
        return DistillConfig(**settings)

    return make


def a_student(**options: Any) -> StudentWithLoss:
    return StudentWithLoss(tiny_llama(seed=2, attention_dropout=0.1), V, **options)


def some_prompts(*sizes: int, seed: int = 0) -> list[Prompt]:
    draw = np.random.default_rng(seed)
    return [Prompt(draw.integers(1, V, size).astype(np.int32)) for size in sizes]


def sampling(**options: Any) -> Sampling:
    return Sampling(**{"end_tokens": ENDS, "max_new_tokens": 10} | options)


def completions(batch: Any) -> list[list[int]]:
    """The targets of each row, in order."""
    return [[int(x) for x in row if x != IGNORE_INDEX] for row in batch.labels]


# Which micro-batches


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.29, 1 / 3, 0.5, 0.7, 1.0])
def test_the_share_is_exact_and_evenly_spread(share: float) -> None:
    chosen = [is_on_policy(step, share) for step in range(1000)]
    for step in (1, 7, 100, 999):
        exact = int(step * Decimal(str(share)))
        assert sum(chosen[:step]) == on_policy_before(step, share) == exact
    gaps = np.diff(np.flatnonzero(chosen))
    if share:
        assert set(gaps) <= {math.floor(1 / share), math.ceil(1 / share)}


def test_the_seed_of_a_micro_batch_is_its_own() -> None:
    seeds = {rollout_seed(seed, step) for seed in (0, 1, 11) for step in range(100)}
    assert len(seeds) == 300 and all(0 <= seed < 2**63 for seed in seeds)
    assert rollout_seed(42, 7) == rollout_seed(42, 7)


# Which tokens


def test_the_same_seed_writes_the_same_and_leaves_everything_as_it_was() -> None:
    student, prompts = a_student(), some_prompts(5, 9, 2)
    model: Any = student.model
    enable_checkpointing(model)
    model.config.use_cache = False
    student.train()
    model.model.layers[0].eval()
    modes = [module.training for module in student.modules()]
    own, before = model.generation_config, model.generation_config.to_dict()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (write_rollouts(student, prompts, sampling(), seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state()), "the global generator must not move"
    assert [module.training for module in student.modules()] == modes
    assert model.generation_config is own and own.to_dict() == before
    assert model.is_activation_checkpointing and model.config.use_cache is False
    assert torch.equal(first.batch.input_ids, again.batch.input_ids)
    assert completions(first.batch) == completions(again.batch) != completions(other.batch)


def test_the_model_s_own_settings_do_not_choose_tokens() -> None:
    student, prompts = a_student(), some_prompts(5, 9)
    plain = write_rollouts(student, prompts, sampling(), 1)
    own: Any = student.model.generation_config
    own.suppress_tokens = sorted({token for row in completions(plain.batch) for token in row})
    own.top_k, own.temperature, own.min_new_tokens = 1, 0.01, 10
    own.repetition_penalty, own.eos_token_id = 9.0, 3
    bound = write_rollouts(student, prompts, sampling(), 1)
    assert completions(bound.batch) == completions(plain.batch)


def test_by_default_nothing_filters_and_each_key_does_as_it_says() -> None:
    """With all ids equally likely, 400 draws from 512 are many; ``top_k`` leaves its number."""
    student, prompts = a_student(), some_prompts(*[3] * 40)
    with torch.no_grad():
        student.model.lm_head.weight.zero_()

    def drawn(**options: Any) -> set[int]:
        options = {"end_tokens": (0,)} | options
        out = write_rollouts(student, prompts, sampling(**options), 1)
        return {token for row in completions(out.batch) for token in row}

    assert len(drawn()) > 200
    assert len(drawn(top_p=0.1)) < 100
    head = torch.linspace(0, 5, V)[:, None].expand(-1, 32)
    with torch.no_grad():
        student.model.lm_head.weight.copy_(head * torch.randn(32).sign())
    assert len(drawn(top_k=5)) <= 10, "the five largest, or the five smallest, by the state's sign"
    assert len(drawn(temperature=1e-3)) <= 2


def test_no_id_is_drawn_that_the_tokenizer_does_not_have() -> None:
    student = StudentWithLoss(tiny_llama(seed=2), 100)
    out = write_rollouts(student, some_prompts(*[3] * 20), sampling(end_tokens=(0,)), 1)
    assert max(token for row in completions(out.batch) for token in row) < 100


def test_padding_on_the_left_changes_no_token() -> None:
    student, prompts = a_student(), some_prompts(1, 4, 20, 11)
    greedy = sampling(greedy=True, end_tokens=(V - 1,))
    together = completions(write_rollouts(student, prompts, greedy, 0).batch)
    alone = [completions(write_rollouts(student, [p], greedy, 0).batch)[0] for p in prompts]
    assert together == alone
    for prompt, written in zip(prompts, together, strict=True):  # as without a cache
        ids = prompt.ids.tolist()
        for token in written:
            with torch.no_grad():
                logits: Tensor = student.model(torch.tensor([ids])).logits[0, -1]
            assert token == int(logits.argmax())
            ids.append(token)


def test_targets_are_the_completion_with_its_first_end_of_text() -> None:
    student, prompts = a_student(), some_prompts(5, 1, 9, 3, 3, 3)
    out = write_rollouts(student, prompts, sampling(), 4)
    batch, finished, total = out.batch, 0, 0
    for row, prompt in enumerate(prompts):
        written = completions(batch)[row]
        length, size = int(batch.lengths[row]), len(prompt.ids)
        whole = [*prompt.ids.tolist(), *written]
        assert batch.input_ids[row, :length].tolist() == whole[:-1]
        labels = [IGNORE_INDEX] * (size - 1) + written
        labels += [IGNORE_INDEX] * (batch.labels.shape[1] - len(labels))
        assert batch.labels[row].tolist() == labels
        assert not set(written[:-1]) & set(ENDS), "nothing comes after an end of text"
        assert written[-1] in ENDS or len(written) == 10
        finished += written[-1] in ENDS
        total += len(written)
    assert 0 < finished < len(prompts), "the test should have both kinds"
    assert (out.finished, out.completion_tokens) == (finished, total)
    assert batch.counts == (total, int(batch.lengths.sum()) - 6, 6, 1)
    assert batch.position_ids.tolist() == [list(range(batch.labels.shape[1]))] * 6


# What is learned


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    return model(ids[None]).logits[0].double().log_softmax(-1)  # [L, V]


def loss_of_window(trainer: Trainer, steps: Sequence[int]) -> Tensor:
    """The mean loss of a window's targets from whole logits, each row by itself."""
    config = trainer.config
    model, teacher = trainer.student.model, trainer.inputs.teacher
    assert teacher is not None
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for step in steps:
        batch = trainer.batches.batch(step)
        for row in range(len(batch.lengths)):
            n, starts = int(batch.lengths[row]), (batch.position_ids[row] == 0).nonzero()[:, 0]
            cuts = [s for s in starts.tolist() if s < n] + [n]
            for begin, end in pairwise(cuts):
                ids, labels = batch.input_ids[row, begin:end], batch.labels[row, begin:end]
                log_q = log_probabilities(model, ids)
                with torch.no_grad():
                    log_p = log_probabilities(teacher.model, ids)
                counted = labels != IGNORE_INDEX
                if is_on_policy(step, config.lmbda):
                    each = (log_q.exp() * (log_q - log_p)).sum(-1)
                else:
                    nll = -log_q.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
                    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
                    each = (1 - config.kd_weight) * nll + config.kd_weight * kl
                total = total + each[counted].sum()
                targets += int(counted.sum())
    return total / targets


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_window_is_the_mean_over_all_of_its_targets(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The divisor of a window counts what is written in it: gradients of two micro-batches of
    unequal lengths are those of one mean, whole logits of each row alone."""
    trainer = make_trainer(make_config(lmbda=share, max_grad_norm=0.0))
    trainer.student.train()
    for module in trainer.student.modules():  # no dropout, in modes that stay
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # pyright: ignore
    batches = trainer.batches
    assert isinstance(batches, OnPolicyBatches)
    monkeypatch.setattr(batches, "_sampling", replace(batches._sampling, end_tokens=ENDS))
    ours: dict[str, Tensor] = {}

    def keep(optimizer: Any, max_norm: float) -> Any:
        ours.update({n: p.grad.clone() for n, p in trainer.trained_parameters().items()})  # pyright: ignore
        return step(optimizer, max_norm)

    batches.begin(trainer._window(0))
    loss = loss_of_window(trainer, (0, 1))
    names = list(trainer.trained_parameters())
    grads = torch.autograd.grad(loss, list(trainer.trained_parameters().values()))
    step = trainer.precision.step
    monkeypatch.setattr(trainer.precision, "step", keep)
    assert not trainer.micro_batch() and trainer.micro_batch()
    assert ours.keys() == set(names)
    for name, grad in zip(names, grads, strict=True):
        assert (ours[name] - grad).abs().max() <= 1e-6 * max(float(grad.abs().max()), 1e-3), name
    if share == 1:
        sizes = [int((batches.batch(i).labels != IGNORE_INDEX).sum()) for i in (0, 1)]
        assert sizes[0] != sizes[1], "the test should have unequal micro-batches"


def test_the_teacher_s_own_prompt_is_aligned_to_the_student_s_positions() -> None:
    student = a_student()
    teacher = FrozenTeacher(tiny_llama(seed=1, hidden_size=48), V, device=torch.device("cpu"))
    prompts = some_prompts(5, 9, 2)
    longer, shorter, _ = some_prompts(12, 3, 1, seed=1)
    prompts[0] = prompts[0]._replace(teacher_ids=longer.ids)
    prompts[1] = prompts[1]._replace(teacher_ids=shorter.ids)
    written = write_rollouts(student, prompts, sampling(), 3)
    (target,) = answer_to(TeacherPolicy(teacher), written).targets
    hidden: Any = target
    for row, prompt in enumerate(prompts):
        theirs = prompt.ids if prompt.teacher_ids is None else prompt.teacher_ids
        tokens = completions(written.batch)[row]
        ids = torch.tensor([[*theirs.tolist(), *tokens]])
        with torch.no_grad():
            alone = teacher.model.base_model(ids).last_hidden_state[0]
        for i in range(len(tokens)):
            ours = hidden.hidden[row, len(prompt.ids) - 1 + i]
            assert torch.allclose(ours, alone[len(theirs) - 1 + i], atol=1e-5), (row, i)


def test_the_score_of_rollouts_is_the_reverse_kl_per_token() -> None:
    student = a_student()
    teacher = FrozenTeacher(tiny_llama(seed=1, hidden_size=48), V, device=torch.device("cpu"))
    prompts = some_prompts(5, 9, 2, 6)
    scores = score_rollouts(student, teacher, prompts, sampling(), seed=3, rows=2)
    total, tokens = 0.0, 0
    for turn in (0, 1):
        some = prompts[2 * turn : 2 * turn + 2]
        out = write_rollouts(student, some, sampling(), rollout_seed(3, turn))
        for row in range(2):
            ids = out.batch.input_ids[row, : int(out.batch.lengths[row])]
            counted = out.batch.labels[row, : len(ids)] != IGNORE_INDEX
            student.eval()
            with torch.no_grad():
                log_q, log_p = (log_probabilities(m, ids) for m in (student.model, teacher.model))
            total += float((log_q.exp() * (log_q - log_p)).sum(-1)[counted].sum())
            tokens += int(counted.sum())
    assert scores["reverse_kl"] == pytest.approx(total / tokens, rel=1e-5)
    assert scores["completion_length"] == tokens / 4


# The student as its own teacher


def test_the_average_teaches_and_the_weights_stay(make_config: MakeConfig) -> None:
    trainer = make_trainer(make_config(teacher=None, self_teacher="ema"))
    trainer.student.train()
    for _ in range(4):
        trainer.micro_batch()
    before = everything(trainer)
    assert trainer.ema is not None
    averaged = copy.deepcopy(trainer.student.model).eval()
    with torch.no_grad():
        for name, parameter in averaged.named_parameters():
            parameter.copy_(trainer.ema.tensors()[name])
    batch = trainer.inputs.eval_rows.batch([0])
    (target,) = trainer.policy.forward(batch).targets
    assert_same_bits(everything(trainer), before)
    answer: Any = target
    n = int(batch.lengths[0])
    first = next((i for i in range(1, n) if batch.position_ids[0, i] == 0), n)
    ours = answer.head(answer.hidden[0, :first]).double().log_softmax(-1)
    with torch.no_grad():
        theirs = log_probabilities(averaged, batch.input_ids[0, :first])
        own = log_probabilities(trainer.student.model.eval(), batch.input_ids[0, :first])
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, own, atol=1e-3), "the test should tell the two apart"


def test_the_base_under_the_adapters_teaches(make_config: MakeConfig) -> None:
    pytest.importorskip("peft")
    peft = {"r": 4, "init_lora_weights": "orthogonal", "lora_alpha": 64}
    keys = {"teacher": None, "self_teacher": "base", "peft": peft}
    trainer = make_trainer(make_config(**keys))
    trainer.student.train()
    for _ in range(4):
        trainer.micro_batch()
    before = everything(trainer)
    trained = {n for n, p in trainer.student.model.named_parameters() if p.requires_grad}
    batch = trainer.inputs.eval_rows.batch([0])
    (target,) = trainer.policy.forward(batch).targets
    answer: Any = target
    assert_same_bits(everything(trainer), before)
    assert trained == {n for n, p in trainer.student.model.named_parameters() if p.requires_grad}
    base = tiny_llama(seed=2)
    first = next((i for i in range(1, 32) if batch.position_ids[0, i] == 0), 32)
    ids = batch.input_ids[0, :first]
    ours = answer.head(answer.hidden[0, :first]).double().log_softmax(-1)
    with torch.no_grad():
        assert torch.allclose(ours, log_probabilities(base, ids), atol=1e-5)
        adapted = log_probabilities(trainer.student.model.eval(), ids)
        assert not torch.allclose(ours, adapted, atol=1e-3), "the test should tell them apart"
        with without_adapters(trainer.student.model):
            assert torch.equal(log_probabilities(trainer.student.model, ids).float(), ours.float())


def test_without_the_key_there_is_no_such_teacher(make_config: MakeConfig) -> None:
    assert build_self_teacher(make_config(), a_student(), None) is None


# Resuming


@pytest.mark.parametrize("stop, own", [(1, None), (2, None), (5, "ema")])
def test_a_run_that_ends_within_a_window_resumes_to_the_same_bits(
    make_config: MakeConfig, stop: int, own: str | None
) -> None:
    """Windows of three micro-batches, half of all on-policy: after 1, 2 and 5 of them some of a
    window's are left, and what was written for it is in no checkpoint."""
    keys = {"gradient_accumulation_steps": 3, "self_teacher": own}
    keys |= {"teacher": None} if own else {}
    whole = make_trainer(make_config("whole", **keys))
    whole.student.train()
    for _ in range(8):
        whole.micro_batch()
    first = make_trainer(make_config("ended", **keys))
    first.student.train()
    with run_log(first.config, first) as log:
        for _ in range(stop):
            first.micro_batch()
        assert first.accumulator.pending
        first.save(log, must=True)
    torch.rand(7)  # another process has another generator
    second = make_trainer(make_config("ended", **keys))
    second.batches.begin(second._window(stop))  # by weights that are about to be replaced
    checkpoint = load_latest(Path(second.config.output_dir), report=lambda _: None)
    assert checkpoint is not None
    second.restore(checkpoint, lambda warning: pytest.fail(warning))
    second.student.train()
    for _ in range(8 - stop):
        second.micro_batch()
    ours, theirs = everything(second), everything(whole)
    for state in (ours, theirs):
        state["state"].pop("identity")  # other folders
    assert_same_bits(ours, theirs)


def test_what_was_written_is_forgotten_with_the_weights_that_wrote_it(
    make_config: MakeConfig,
) -> None:
    trainer = make_trainer(make_config())
    batches = trainer.batches
    window = trainer._window(0)
    batches.begin(window)
    before = batches.rollouts(1)
    batches.begin(window)
    assert before is not None and batches.rollouts(1) is before, "once per window"
    with torch.no_grad():
        trainer.student.model.lm_head.weight.neg_()
    batches.forget()
    batches.begin(window)
    after = batches.rollouts(1)
    assert after is not None and not torch.equal(after.batch.labels, before.batch.labels)


# What a run says


@pytest.mark.slow
def test_a_run_says_how_long_and_how_fast_it_writes(make_config: MakeConfig) -> None:
    config = make_config(logging_steps=2, lmbda=0.5)
    distill(config)
    log = list(read_log(Path(config.output_dir)))
    header = dict(next(record for record in log if record["kind"] == "start")["header"])
    line = header["on-policy"]
    assert "0.5 of the micro-batches, reverse_kl: 3 prompts of" in line
    assert "up to 12 tokens after each" in line and "rollouts/s" in line
    records = [record for record in log if record["kind"] == "train"]
    assert len(records) == 2
    for record in records:
        assert record["weights"]["on_policy_kd"] == 1
        assert 1 <= record["completion_length"] <= 12 and 0 <= record["completed"] <= 1
        assert record["rollouts_per_second"] > 0 and 0 < record["rollout_time"] <= 1
        assert math.isfinite(record["on_policy_kd"]) and math.isfinite(record["ce"])


def test_a_run_of_nothing_else_has_a_loss(make_config: MakeConfig) -> None:
    trainer = make_trainer(make_config(lmbda=1.0, kd_weight=0.0))
    trainer.student.train()
    trainer.micro_batch()
    losses = trainer.meter.losses({})
    assert math.isfinite(losses["loss"]) and losses["loss"] == losses["on_policy_kd"]
    assert "ce" not in losses and "kd" not in losses, "nothing of the data has come up"


def test_the_loss_of_both_is_the_mean_over_all_targets(make_config: MakeConfig) -> None:
    trainer = make_trainer(make_config(lmbda=0.5))
    trainer.student.train()
    for _ in range(2):
        trainer.micro_batch()
    loss = float(trainer.meter.sums[0]) + trainer.meter.terms.total("on_policy_kd")[0]
    targets = trainer.counters.tokens
    assert trainer.meter.losses({})["loss"] == pytest.approx(loss / targets)


@pytest.mark.slow
def test_the_plan_knows_the_cache_of_keys_and_values(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    deep = tiny_llama(num_hidden_layers=16, num_key_value_heads=4, head_dim=64)
    keys: dict[str, Any] = {
        "student": save_tiny(tmp_path / "deep", deep),
        "max_length": 200,
        "max_completion_length": 190,
        "gradient_checkpointing": True,
        "per_device_eval_batch_size": 1,
    }
    off, on = (plan(make_config(lmbda=f, **keys), eval_rows=1) for f in (0.0, 1.0))
    assert CACHE not in dict(off.items)
    assert on.moment == "while the student writes"
    # 16 layers and one that grows, keys and values, 4 heads of 64 numbers in fp32, 3 rows.
    assert dict(on.items)[CACHE] == 17 * 2 * 4 * 64 * 4 * 3 * 199


# What is refused

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"teacher": None, "kd_weight": 0}, "teacher must be given with lmbda above 0"),
    ({"max_completion_length": 32}, r"max_completion_length must be below max_length \(32\)"),
    ({"teacher_cache": "x"}, "teacher_cache must be left out with lmbda above 0"),
    ({"torch_compile": True}, "torch_compile must be false with lmbda above 0"),
    ({"teacher_prefetch": 1}, "teacher_prefetch must be 0 with lmbda above 0"),
    ({"cross_tokenizer": "prefix"}, "cross_tokenizer must be left out with lmbda above 0"),
    ({"taid": {"enabled": True}}, "taid.enabled must be false with lmbda above 0"),
    ({"routing": {"mode": "student_aware"}}, "routing.mode must be teacher with lmbda above 0"),
    ({"lmbda": 1.5}, r"lmbda must lie in \[0, 1\]"),
    ({"top_p": 0}, r"top_p must lie in \(0, 1\]"),
    ({"self_teacher": "ema"}, "teacher must be left out with self_teacher ema"),
    (
        {"teacher": None, "self_teacher": "ema", "use_ema": False},
        "use_ema must be true with self_teacher ema",
    ),
    ({"teacher": None, "self_teacher": "base"}, "self_teacher must be ema for a student without"),
    (
        {"teacher": None, "self_teacher": "base", "peft": {"r": 4, "bias": "all"}},
        "self_teacher must be ema for a student without adapters, or with trained biases",
    ),
    (
        {"teacher": None, "self_teacher": "ema", "feature": {"weight": 1}},
        "teacher must be given for feature.weight above 0",
    ),
]


@pytest.mark.parametrize("keys, message", REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_be_is_one_line(
    make_config: MakeConfig, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        make_config(**keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keys", [{}, {"lmbda": 0, "teacher": None, "self_teacher": "ema"}])
def test_several_processes_are_refused(make_config: MakeConfig, keys: dict[str, Any]) -> None:
    key = "lmbda must be 0" if not keys else "self_teacher must be left out"
    with pytest.raises(UsageError, match=f"{key} on several processes"):
        check_ranks(make_config(**keys), World(rank=0, size=2))


def test_what_the_records_exclude_is_one_line(make_config: MakeConfig, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    record = {"prompt": "a student", "completion": " learns", "teacher_prompt": "a teacher"}
    file.write_text("\n".join([json.dumps(record)] * 8))
    data = {"train": str(file), "eval": str(file), "cache_dir": str(tmp_path)}
    with pytest.raises(UnfitError, match="structural losses must be off where records have a teac"):
        make_trainer(make_config(data=data, feature={"weight": 1.0}))
    own = {"teacher": None, "self_teacher": "ema", "lmbda": 1}
    make_trainer(make_config(data=data, **own))
    with pytest.raises(UnfitError, match="records must have a teacher_prompt with self_teacher"):
        make_trainer(make_config(**own))


def test_a_baseline_learns_from_the_text_alone(make_config: MakeConfig) -> None:
    own = make_config(teacher=None, self_teacher="ema")
    for config in (make_config(), own):
        alone = replace(config, **ce_only())
        assert (alone.lmbda, alone.self_teacher, alone.kd_weight) == (0, None, 0)
        assert not alone.is_distilled and config.is_distilled
