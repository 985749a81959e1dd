"""Student-aware routing against a definition in float64, and what it must leave alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import permutations
from typing import Any

import pytest
import torch
from sad_kernels import Head
from support.layouts import total
from support.tiny import tiny_llama
from support.tiny_moe import NUM_EXPERTS, tiny_moe
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.data.batch import Batch, LossCounts
from sad.errors import CheckpointError, UnfitError, UsageError
from sad.models.experts import all_experts, moe_layers
from sad.models.heads import split_head
from sad.teachers import routing
from sad.teachers.routing import StudentAwareRouter, augmented

CPU = torch.device("cpu")
VOCAB = 500  # fewer than the heads have rows
SIGMOID = ("deepseek_v3", "glm4_moe")


def make_batch(lengths: tuple[int, ...] = (12, 7), seed: int = 0, *, split: int = 5) -> Batch:
    """Rows of 12 positions, each of two documents, padded from its length on."""
    draw = torch.Generator().manual_seed(seed)
    shape = len(lengths), 12
    ids = torch.randint(0, VOCAB, shape, generator=draw)
    labels = torch.randint(0, VOCAB, shape, generator=draw)
    column = torch.arange(12)
    positions = torch.where(column < split, column, column - split).repeat(len(lengths), 1)
    lengths_ = torch.tensor(lengths)
    labels[(column >= lengths_[:, None]) | (column == split - 1)] = -100
    labels[:, 2] = -100
    targets = int((labels != -100).sum())
    counts = LossCounts(targets, sum(lengths) - 2 * len(lengths), 2 * len(lengths), 2)
    return Batch(ids, labels, positions, lengths_, counts, 0)


def student_states(student: PreTrainedModel, batch: Batch) -> tuple[Tensor, Head]:
    backbone, head = split_head(student)
    return backbone(batch.input_ids, batch.position_ids), head


def make_router(teacher: PreTrainedModel, **options: Any) -> StudentAwareRouter:
    options = {"learning_rate": 1e-3, "device": CPU} | options
    return StudentAwareRouter(teacher, VOCAB, **options)


def gradients(router: StudentAwareRouter) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in router.gate_parameters().items()}
    assert found and all(grad is not None for grad in found.values())
    return {name: grad for name, grad in found.items() if grad is not None}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# The definition: logits of a model configured with all experts, in float64


def twin(family: str, teacher: PreTrainedModel) -> PreTrainedModel:
    """The same weights in float64, in a model that knows nothing but all experts active."""
    groups = {"topk_group": 2} if family in SIGMOID else {}
    other = tiny_moe(family, num_experts_per_tok=NUM_EXPERTS, **groups)
    other.load_state_dict(teacher.state_dict())
    if hasattr(other.config, "_experts_implementation"):
        other.config._experts_implementation = "eager"
    return other.double()


def definition(
    family: str, model: PreTrainedModel, student: PreTrainedModel, batch: Batch
) -> tuple[Tensor, Tensor]:
    """KL(p_T || p_S) summed over targets, and cv^2; both differentiable by the model's weights."""
    loads: list[Tensor] = []
    counted = (batch.position_ids > 0) & (torch.arange(12) < batch.lengths[:, None])

    def gate(router: nn.Module, args: Any, _: Any) -> None:
        weight = next(p for p in router.parameters() if p.ndim == 2)
        bias = next((p for p in router.parameters() if p.ndim == 1), 0.0)
        z = args[0].reshape(-1, args[0].shape[-1]) @ weight.T + bias
        score = z.sigmoid() if family in SIGMOID else z.exp()
        loads.append((score / score.sum(-1, keepdim=True))[counted.flatten()].sum(0))

    hooks = [b.router.register_forward_hook(gate) for b in moe_layers(model).values()]
    given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    t = model(**given).logits[..., :VOCAB]
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        s = student(**given).logits[..., :VOCAB].double()
    valid = batch.labels != -100
    log_p, log_q = t[valid].log_softmax(-1), s[valid].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    cv2 = torch.stack([load.var(unbiased=False) / load.mean() ** 2 for load in loads]).mean()
    return kl, cv2


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_loss_and_gradient_are_those_of_the_definition(family: str) -> None:
    teacher, student, batch = tiny_moe(family), tiny_llama(seed=1), make_batch()
    totals = LossCounts(40, 50, 8, 2)
    router = make_router(teacher, balance_weight=3.0)  # large, so that both parts are seen
    loss = router.backward(batch, *student_states(student, batch), totals)

    reference = twin(family, teacher).requires_grad_(True)
    kl, cv2 = definition(family, reference, student, batch)
    (kl / 40 + 3.0 * cv2 * batch.counts.tokens / 50).backward()
    torch.testing.assert_close(loss.kl.double(), kl.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.balance.double(), cv2.detach(), rtol=1e-5, atol=1e-6)
    assert not loss.kl.requires_grad and not loss.balance.requires_grad
    for name, grad in gradients(router).items():
        expected = reference.get_parameter(name).grad
        assert expected is not None and expected.abs().max() > 1e-4
        scale = float(expected.abs().max())
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=2e-5 * scale)


def test_a_student_that_says_the_same_leaves_no_divergence() -> None:
    teacher, batch = tiny_moe("mixtral"), make_batch()
    router = make_router(teacher, balance_weight=0.0)
    with all_experts(teacher), torch.no_grad():
        same = student_states(teacher, batch)
    loss = router.backward(batch, *same, batch.counts)
    assert abs(float(loss.kl)) < 1e-5
    assert all(grad.abs().max() < 1e-6 for grad in gradients(router).values())


def test_gradients_of_micro_batches_add_up_to_that_of_the_window() -> None:
    student = tiny_llama(seed=1)
    batches = [make_batch((12,), seed=1), make_batch((7,), seed=2), make_batch((12,), seed=3)]
    joint = Batch(
        *(torch.cat([getattr(b, field) for b in batches]) for field in Batch._fields[:4]),
        counts=total(b.counts for b in batches),
        target_bytes=0,
    )
    split, whole = (make_router(tiny_moe("mixtral"), balance_weight=0.0) for _ in range(2))
    losses = [split.backward(b, *student_states(student, b), joint.counts) for b in batches]
    loss = whole.backward(joint, *student_states(student, joint), joint.counts)
    torch.testing.assert_close(sum(part.kl for part in losses), loss.kl, rtol=1e-5, atol=1e-6)
    for name, grad in gradients(split).items():
        scale = float(gradients(whole)[name].abs().max())
        torch.testing.assert_close(grad, gradients(whole)[name], rtol=1e-4, atol=1e-5 * scale)


def test_what_padding_holds_changes_nothing() -> None:
    student, batch = tiny_llama(seed=1), make_batch((12, 7))
    hidden, head = student_states(student, batch)
    padding = torch.arange(12) >= batch.lengths[:, None]
    other = batch._replace(input_ids=torch.where(padding, 3, batch.input_ids))
    nothing = hidden.masked_fill(padding[..., None], torch.nan)
    one, two = (make_router(tiny_moe("mixtral")) for _ in range(2))
    before = one.backward(batch, hidden, head, batch.counts)
    after = two.backward(other, nothing, head, batch.counts)
    assert torch.equal(before.kl, after.kl) and torch.equal(before.balance, after.balance)
    assert same_bits(gradients(one), gradients(two))


def test_a_micro_batch_of_padding_alone_adds_zeros() -> None:
    student, batch = tiny_llama(seed=1), make_batch((12, 7))
    empty = batch._replace(
        labels=torch.full_like(batch.labels, -100),
        lengths=torch.zeros_like(batch.lengths),
        counts=LossCounts(0, 0, 0, 1),
    )
    router = make_router(tiny_moe("mixtral"))
    loss = router.backward(empty, *student_states(student, empty), batch.counts)
    assert float(loss.kl) == 0 and float(loss.balance) == 0
    assert all(not grad.any() for grad in gradients(router).values())


# What it leaves alone


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "granitemoe"])
def test_only_gates_are_trained(family: str) -> None:
    teacher, student, batch = tiny_moe(family), tiny_llama(seed=1), make_batch()
    before, student_before = bits(teacher), bits(student)
    router = make_router(teacher)
    gates = set(router.gate_parameters())
    assert gates == {
        name
        for name, _ in teacher.named_parameters()
        if any(part in name for part in (".gate.", "router."))
    }
    hidden, head = student_states(student, batch)
    assert hidden.requires_grad and head.weight.requires_grad
    hidden.retain_grad()
    for _ in range(3):
        router.backward(batch, hidden, head, batch.counts)
        assert {n for n, p in teacher.named_parameters() if p.grad is not None} == gates
        assert all(p.grad is None for p in student.parameters()) and hidden.grad is None
        router.step()
        assert all(p.grad is None for p in teacher.parameters())
    after = bits(teacher)
    assert {name for name in after if not torch.equal(after[name], before[name])} == gates
    assert same_bits(bits(student), student_before)
    assert not any(module.training for module in teacher.modules())
    assert {n for n, p in teacher.named_parameters() if p.requires_grad} == gates


def test_recomputing_activations_changes_no_bit_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, batch = tiny_llama(seed=1), make_batch()
    states = student_states(student, batch)
    calls = {"recomputed": 0, "kept": 0}

    def counted(kind: str) -> StudentAwareRouter:
        teacher = tiny_moe("deepseek_v3", attention_dropout=0.5)  # off, or gradients would differ
        experts: Any = moe_layers(teacher)[1].experts

        def count(*_: Any) -> None:
            calls[kind] += 1

        experts.register_forward_pre_hook(count)
        return make_router(teacher)

    one, two = counted("recomputed"), counted("kept")
    modes = [dict(vars(m)) for m in one.model.modules()]
    first = one.backward(batch, *states, batch.counts)
    assert [dict(vars(m)) for m in one.model.modules()] == modes
    monkeypatch.setattr(routing, "_activation_checkpointing", lambda _: nullcontext())
    second = two.backward(batch, *states, batch.counts)
    assert calls == {"recomputed": 2, "kept": 1}
    assert torch.equal(first.kl, second.kl) and same_bits(gradients(one), gradients(two))


@pytest.mark.parametrize("bad", ["gradient", "learning rate"])
def test_an_update_that_is_not_finite_changes_nothing(bad: str) -> None:
    teacher, student, batch = tiny_moe("mixtral"), tiny_llama(seed=1), make_batch()
    router = make_router(teacher)
    states = student_states(student, batch)

    def everything() -> dict[str, Tensor]:
        state = router.state_dict()
        return {n: t.detach().clone() for n, t in state["tensors"].items()} | bits(teacher)

    router.backward(batch, *states, batch.counts)
    assert bool(router.step().ok)
    before = everything()
    broken = states[0].detach().clone()
    (group,) = router.optimizer.param_groups
    lr = group["lr"]
    if bad == "gradient":
        broken[0, 0, 0] = torch.nan
    else:
        group["lr"] = 1e38
    router.backward(batch, broken, states[1], batch.counts)
    update = router.step()
    assert not bool(update.ok) and bool(update.skipped)
    assert same_bits(everything(), before)
    group["lr"] = lr
    router.backward(batch, *states, batch.counts)
    assert bool(router.step().ok)
    assert not same_bits(everything(), before)


# Learning


def kl_of(teacher: PreTrainedModel, student: PreTrainedModel, batches: list[Batch]) -> float:
    with all_experts(teacher), torch.no_grad():
        parts = [definition("mixtral", teacher, student, batch)[0] for batch in batches]
    return float(sum(parts))


def test_alternating_each_gate_step_brings_the_teacher_closer() -> None:
    teacher, student = tiny_moe("mixtral"), tiny_llama(seed=1)
    batches = [make_batch((12, 7), seed=1), make_batch((9, 12), seed=2)]
    totals = total(b.counts for b in batches)
    router = make_router(teacher, learning_rate=3e-3)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(6):
        before = kl_of(teacher, student, batches)
        for batch in batches:
            with torch.no_grad():
                states = student_states(student, batch)
            router.backward(batch, *states, totals)
        router.step()
        assert kl_of(teacher, student, batches) < before

        for batch in batches:  # then the student learns what the teacher says now
            with all_experts(teacher), torch.no_grad():
                hidden, head = student_states(teacher, batch)
                p = head(hidden)[..., :VOCAB].log_softmax(-1)
            hidden, head = student_states(student, batch)
            q = head(hidden)[..., :VOCAB].log_softmax(-1)
            (q.exp() * (q - p)).sum(-1)[batch.labels != -100].mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_balance_alone_evens_out_the_use_of_experts() -> None:
    teacher, batch = tiny_moe("mixtral"), make_batch()
    router = make_router(teacher, balance_weight=100.0, learning_rate=1e-2)
    states = student_states(tiny_llama(seed=1), batch)
    values = []
    for _ in range(20):
        values.append(float(router.backward(batch, *states, batch.counts).balance))
        router.step()
    assert values[-1] < 0.5 * values[0]


def test_the_first_step_is_one_of_adam_without_decay() -> None:
    student, batch = tiny_llama(seed=1), make_batch()
    router = make_router(tiny_moe("mixtral"), learning_rate=1e-2)
    router.backward(batch, *student_states(student, batch), batch.counts)
    grads, before = gradients(router), bits(router.model)
    norm = router.step().norm
    for name, gate in router.gate_parameters().items():
        expected = -1e-2 * grads[name] / (grads[name].abs() + 1e-8)
        torch.testing.assert_close(gate.detach() - before[name], expected, rtol=1e-4, atol=1e-7)
    everything = torch.cat([grad.flatten() for grad in grads.values()])
    torch.testing.assert_close(norm, everything.norm())


def test_small_steps_are_kept_in_masters_of_bf16_gates() -> None:
    teacher = tiny_moe("mixtral").to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    student, batch = tiny_llama(seed=1), make_batch()
    router = make_router(teacher, learning_rate=1e-6)
    before = {n: p.detach().clone() for n, p in router.gate_parameters().items()}
    masters = {
        name.removeprefix("gate/"): tensor
        for name, tensor in router.state_dict()["tensors"].items()
        if name.startswith("gate/")
    }
    assert all(tensor.dtype == torch.float32 for tensor in masters.values())
    for _ in range(20):
        router.backward(batch, *student_states(student, batch), batch.counts)
        assert {grad.dtype for grad in gradients(router).values()} == {torch.float32}
        router.step()
    for name, gate in router.gate_parameters().items():
        moved = (masters[name] - before[name].float()).abs()
        assert 1e-5 < moved.mean() < 2.1e-5  # twenty steps of 1e-6, most in one direction
        assert gate.dtype == torch.bfloat16 and torch.equal(gate, masters[name].bfloat16())
        assert (gate == before[name]).float().mean() > 0.5  # where each step would have been lost


# Resuming


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_router_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    student, batches = tiny_llama(seed=1), [make_batch(seed=i) for i in range(4)]

    def start() -> StudentAwareRouter:
        return make_router(tiny_moe("gpt_oss").to(dtype))  # pyright: ignore[reportArgumentType]

    def train(router: StudentAwareRouter, part: list[Batch]) -> None:
        for batch in part:
            router.backward(batch, *student_states(student, batch), batch.counts)
            router.step()

    straight, first, second = start(), start(), start()
    train(straight, batches)
    train(first, batches[:2])
    state = first.state_dict()
    tensors = {name: tensor.detach().clone() for name, tensor in state.pop("tensors").items()}
    train(second, batches[3:])  # whatever it held before
    second.load_state_dict(json.loads(json.dumps(state)) | {"tensors": tensors})
    assert same_bits(bits(second.model), bits(first.model))
    train(second, batches[2:])
    assert same_bits(bits(second.model), bits(straight.model))
    assert same_bits(second.state_dict()["tensors"], straight.state_dict()["tensors"])


def test_state_is_whole_or_refused() -> None:
    batch = make_batch()
    router = make_router(tiny_moe("mixtral"))
    router.backward(batch, *student_states(tiny_llama(seed=1), batch), batch.counts)
    with pytest.raises(RuntimeError, match="call step first"):
        router.state_dict()
    router.step()
    with pytest.raises(CheckpointError, match="gate"):
        make_router(tiny_moe("gpt_oss")).load_state_dict(router.state_dict())


# Refusals


def test_teachers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnfitError, match=r"student-aware routing must have .* LlamaForCausalLM"):
        make_router(tiny_llama())
    with pytest.raises(UnfitError, match="'phimoe'"):
        make_router(tiny_moe("phimoe"))
    half = tiny_moe("mixtral").to(torch.float16)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="teacher_dtype: bfloat16"):
        make_router(half)
    with (
        pytest.raises(UnfitError, match="knowledge augmentation must have"),
        augmented(tiny_llama(), torch.Generator()),
    ):
        pass


# Knowledge augmentation


def logits_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Ids and weights that experts are called with."""
    calls: list[tuple[Tensor, Tensor]] = []
    experts = [block.experts for block in moe_layers(model).values()]
    hooks = [
        e.register_forward_pre_hook(lambda _, args: calls.append((args[1], args[2])))
        for e in experts
        if e is not None
    ]
    yield calls
    for hook in hooks:
        hook.remove()


# Families whose weights add up to the same for every choice; groups would limit the own choice.
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3", "glm4_moe"]
)
def test_without_draws_the_gate_chooses_as_ever(family: str) -> None:
    """A model whose own gate chooses all experts but one."""
    groups = {"n_group": 1} if family in SIGMOID else {}
    model = tiny_moe(family, num_experts_per_tok=NUM_EXPERTS - 1, **groups)
    batch, generator = make_batch(), torch.Generator()
    expected = logits_of(model, batch)
    with augmented(model, generator, probability=0.0):
        torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-5, atol=1e-5)
    with augmented(model, generator, probability=1.0):
        assert not torch.allclose(logits_of(model, batch), expected)
    assert torch.equal(logits_of(model, batch), expected)


def test_all_experts_but_one_see_a_token() -> None:
    model, batch = tiny_moe("qwen3_moe"), make_batch()
    with augmented(model, torch.Generator().manual_seed(0)), recorded(model) as calls:
        logits_of(model, batch)
    assert len(calls) == 2
    for ids, weights in calls:
        assert ids.shape == weights.shape == (24, NUM_EXPERTS - 1)
        assert all(len(set(row)) == NUM_EXPERTS - 1 for row in ids.tolist())
        torch.testing.assert_close(weights.sum(-1), torch.ones(24))


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "deepseek_v3"])
def test_draws_are_a_function_of_the_generator(family: str) -> None:
    model, batch = tiny_moe(family), make_batch()
    generator = torch.Generator().manual_seed(7)

    def once() -> Tensor:
        torch.rand(3)  # the global generator has no say
        with augmented(model, generator, probability=0.5):
            return logits_of(model, batch)

    first = once()
    state = generator.get_state()
    second, third = once(), once()
    generator.set_state(state)
    assert torch.equal(once(), second) and torch.equal(once(), third)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_experts_are_drawn_from_the_gate_without_replacement() -> None:
    block = moe_layers(tiny_moe("mixtral"))[0]
    logits = torch.tensor([0.0, 1.5, -1.0, 0.5])
    g = (logits.double().exp() / logits.double().exp().sum()).tolist()
    draws = 40_000
    table = logits.expand(draws, 4)
    ids = routing._draw_experts(block, table, 2, 1.0, torch.Generator().manual_seed(0))
    for a, b in permutations(range(4), 2):
        expected = g[a] * g[b] / (1 - g[a])  # first a, then b of what is left
        seen = ((ids[:, 0] == a) & (ids[:, 1] == b)).double().mean()
        assert abs(float(seen) - expected) < 4.5 * (expected / draws) ** 0.5, (a, b)

    ids = routing._draw_experts(block, table, 2, 0.05, torch.Generator().manual_seed(0))
    top = ((ids[:, 0] == 1) & (ids[:, 1] == 3)).double().mean()
    expected = 0.95 + 0.05 * g[1] * g[3] / (1 - g[1])
    assert abs(float(top) - expected) < 4.5 * (0.05 / draws) ** 0.5


def test_a_correction_of_the_choice_is_heeded_but_not_drawn_from() -> None:
    """DeepSeek chooses by scores plus a correction, which is no part of the gate."""
    block = moe_layers(tiny_moe("deepseek_v3"))[1]
    router: Any = block.router
    router.e_score_correction_bias = torch.tensor([0.0, 0.0, 0, 0, 0, 0, 0, 5.0])
    logits = torch.linspace(2, -6, NUM_EXPERTS).expand(4000, NUM_EXPERTS)
    generator = torch.Generator().manual_seed(0)
    assert routing._draw_experts(block, logits, 1, 0.0, generator).eq(7).all()
    assert routing._draw_experts(block, logits, 1, 1.0, generator).eq(7).double().mean() < 0.01


def test_tokens_and_layers_draw_independently() -> None:
    model, batch = tiny_moe("mixtral"), make_batch((12, 12))
    batch = batch._replace(input_ids=torch.full_like(batch.input_ids, 3))
    batch = batch._replace(position_ids=torch.zeros_like(batch.position_ids))  # all alike
    for block in moe_layers(model).values():
        torch.nn.init.zeros_(next(block.router.parameters()))  # every expert alike
    generator = torch.Generator().manual_seed(0)
    with augmented(model, generator, probability=1.0), recorded(model) as calls:
        logits_of(model, batch)
    left_out = [sum(range(NUM_EXPERTS)) - ids.sum(-1) for ids, _ in calls]
    assert all(len(experts.unique()) > 4 for experts in left_out)
    assert not torch.equal(*left_out)


def test_augmented_forwards_must_not_build_a_graph() -> None:
    model, batch = tiny_moe("mixtral"), make_batch()
    with augmented(model, torch.Generator()), pytest.raises(ValueError, match="no_grad"):
        model(input_ids=batch.input_ids, use_cache=False)


@pytest.mark.parametrize("probability", [-0.1, 1.5])
def test_a_probability_out_of_range_is_refused(probability: float) -> None:
    with (
        pytest.raises(ValueError, match="must lie in"),
        augmented(tiny_moe("mixtral"), torch.Generator(), probability=probability),
    ):
        pass
