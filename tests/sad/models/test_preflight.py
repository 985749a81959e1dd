"""The start-up self-check passes what is right, refuses what is wrong, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sad_kernels import Head, Objective, TeacherHidden
from support.families import tiny_family
from support.tiny import overflowing_llama, tiny_gpt2, tiny_llama, tiny_qwen3
from transformers import PreTrainedModel

import sad.models.preflight
from sad.errors import UnfitError
from sad.models.heads import Backbone, eval_no_grad
from sad.models.preflight import check_loss, check_model, check_models_and_loss, require_isolation

IDS = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
MIXED = Objective(ce_weight=0.3, kd_weight=0.7, temperature=2.0, label_smoothing=0.1)
NAMES = {f"{role}/{name}" for role in ("student", "teacher") for name in ("causality", "head")}


def run(
    student: Any, teacher: Any, objective: Objective = MIXED, **options: Any
) -> dict[str, float]:
    settings: dict[str, Any] = {"valid_vocab": 500, "packing": True} | options
    return check_models_and_loss(student, teacher, IDS, objective, **settings)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_fp32_errors_are_tiny_and_named(divergence: Any) -> None:
    objective = Objective(ce_weight=0.3, kd_weight=0.7, temperature=2.0, divergence=divergence)
    errors = run(tiny_llama(seed=1), tiny_qwen3(seed=2).requires_grad_(False), objective)
    packing = {"student/packing", "teacher/packing"}
    assert errors.keys() == NAMES | packing | {"loss", "loss_gradient"}
    assert all(0 <= error <= 1e-5 for error in errors.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_and_computation_pass(dtype: torch.dtype) -> None:
    teacher = tiny_qwen3(seed=2).to(dtype)  # pyright: ignore[reportArgumentType]
    errors = run(tiny_llama(seed=1), teacher, compute_dtype=dtype)
    assert 0 < errors["loss_gradient"] <= torch.finfo(dtype).eps


def test_without_teacher_and_packing_there_is_less_to_check() -> None:
    objective = Objective(ce_weight=1.0, kd_weight=0.0)
    errors = run(tiny_llama(), None, objective, packing=False)
    assert errors.keys() == {"student/causality", "student/head", "loss", "loss_gradient"}


def test_equal_models_pass_although_their_divergence_has_no_gradient() -> None:
    errors = run(tiny_llama(), tiny_llama(), Objective(kd_weight=1.0))
    assert errors["loss_gradient"] <= 1e-5


@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_rows_are_enough(length: int) -> None:
    ids = IDS[:, :length]
    check_models_and_loss(
        tiny_llama(), None, ids, Objective(ce_weight=1, kd_weight=0), valid_vocab=500, packing=True
    )


def test_a_row_is_never_longer_than_the_models_positions() -> None:
    model = tiny_gpt2(n_positions=8)
    ids = IDS[:, :8].repeat(4, 1)
    objective = Objective(ce_weight=1, kd_weight=0)
    check_models_and_loss(model, None, ids, objective, valid_vocab=500, packing=True)


def test_computed_positions_may_exceed_what_the_model_was_made_for() -> None:
    ids = IDS[:, :8].repeat(1, 8)
    assert check_model(tiny_llama(max_position_embeddings=32), ids, packing=True)


# What it refuses


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj"])
def test_rows_longer_than_a_table_of_positions_are_refused(family: str) -> None:
    model = tiny_family(family)  # with 128 positions
    ids = (IDS % 100 + 3).reshape(1, -1).repeat(1, 2)[:, :150]
    with pytest.raises(UnfitError, match=r"max_length must be at most .* 128\), got 150") as caught:
        check_model(model, ids, packing=False)
    assert "\n" not in str(caught.value)
    assert check_model(model, ids[:, :128], packing=False)


def test_running_out_of_memory_on_a_long_row_is_not_the_models_fault() -> None:
    model = tiny_llama(max_position_embeddings=8)

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")

    model.model.layers[0].forward = full
    with pytest.raises(RuntimeError, match="can't allocate"):
        check_model(model, IDS, packing=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_called_by_their_name(value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = value
    with pytest.raises(UnfitError, match="must give finite hidden states"):
        run(model, None, Objective(ce_weight=1, kd_weight=0))


@pytest.mark.parametrize(("table", "name"), [("embed", "input embedding"), ("head", "head")])
def test_a_damaged_row_is_called_by_its_name_though_no_token_is_in_it(
    table: str, name: str
) -> None:
    model = tiny_llama()
    module = model.get_input_embeddings() if table == "embed" else model.get_output_embeddings()
    with torch.no_grad():
        module.weight[501, 3] = float("nan")  # pyright: ignore
        module.weight[505] = float("inf")  # pyright: ignore
    message = (
        rf"^the {name} of LlamaForCausalLM must hold finite numbers, got NaN in 2 of its 512 rows, "
        r"first in that of id 501; the weights are damaged"
    )
    with pytest.raises(UnfitError, match=message):
        check_model(model, IDS, packing=True)


def test_a_damaged_weight_is_told_from_an_overflow() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(
        UnfitError,
        match=r"got NaN in float32: its weight model\.layers\.1\.mlp\.up_proj\.weight is",
    ):
        check_model(model, IDS, packing=False)


def test_a_teacher_that_overflows_its_dtype_is_told_so() -> None:
    assert check_model(overflowing_llama(), IDS, packing=True)
    message = "must give finite hidden states, got .* in float16, which its finite weights overflow"
    with pytest.raises(UnfitError, match=message):
        check_model(overflowing_llama().half(), IDS, packing=True)


def test_a_student_that_overflows_under_autocast_is_told_so() -> None:
    objective = Objective(ce_weight=1, kd_weight=0)
    model = overflowing_llama()
    assert run(model, None, objective)
    fp16 = partial(torch.autocast, "cpu", dtype=torch.float16)
    message = "in float16, which its finite weights overflow; compute in a wider dtype"
    with pytest.raises(UnfitError, match=message):
        run(model, None, objective, compute_dtype=torch.float16, autocast=fp16)
    bf16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    assert run(model, None, objective, compute_dtype=torch.bfloat16, autocast=bf16)


def test_logits_that_overflow_are_told_so() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 1e5
    message = (
        "the logits of LlamaForCausalLM must be finite, got .* in float16, which they overflow"
    )
    with pytest.raises(UnfitError, match=message):
        check_model(model.half(), IDS, packing=False)


def alter_logits(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = type(model).forward(model, *args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = forward
    return model


def test_a_softcap_that_no_table_knows_is_caught() -> None:
    model = alter_logits(tiny_llama(), lambda logits: 30 * torch.tanh(logits / 30))
    with pytest.raises(
        UnfitError, match=r"the head of LlamaForCausalLM .* must reproduce"
    ) as caught:
        run(model, None, Objective(ce_weight=1, kd_weight=0))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65


def test_a_teacher_is_checked_like_the_student() -> None:
    teacher = alter_logits(tiny_qwen3(seed=3), lambda logits: logits * 1.001)
    with pytest.raises(UnfitError, match="the head of Qwen3ForCausalLM"):
        run(tiny_llama(), teacher)


@pytest.mark.parametrize("family", ["opt", "bloom", "gpt_oss", "falcon", "mamba", "jamba", "mpt"])
def test_families_that_leak_between_packed_documents_are_refused(family: str) -> None:
    model = tiny_family(family)
    row = IDS[:1] % 100 + 3
    with pytest.raises(UnfitError, match="set packing: false"):
        check_model(model, row, packing=True)
    assert "packing" not in check_model(model, row, packing=False)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gptj", "gemma3_text", "mixtral", "qwen3"])
def test_families_that_keep_documents_apart_pass(family: str) -> None:
    assert check_model(tiny_family(family), IDS[:1] % 100 + 3, packing=True)["packing"] <= 1e-5


def test_positions_that_do_not_restart_would_leak() -> None:
    """The check depends on the positions it passes: a backbone that drops them fails it."""
    model = tiny_llama()
    backbone = Backbone(model)
    with eval_no_grad(model):
        assert require_isolation(model, backbone, IDS[:1]) <= 1e-5
        backbone.takes_positions = False
        with pytest.raises(UnfitError, match="must keep the documents packed into one row apart"):
            require_isolation(model, backbone, IDS[:1])


def test_a_bidirectional_model_of_a_known_family_is_refused() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # pyright: ignore
    model.config.is_causal = False
    with pytest.raises(UnfitError, match="LlamaForCausalLM must be causal"):
        check_model(model, IDS[:1], packing=False)


def test_a_loss_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sad.models.preflight.linear_distill_loss

    def wrong_loss(*args: Any, **kwargs: Any) -> Any:
        out = right(*args, **kwargs)
        return out._replace(loss=out.loss * (1 + 1e-4))

    monkeypatch.setattr(sad.models.preflight, "linear_distill_loss", wrong_loss)
    with pytest.raises(UnfitError, match=r"must agree with its definition.* in loss "):
        run(tiny_llama(), tiny_qwen3())


def test_a_gradient_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sad.models.preflight.linear_distill_loss

    def wrong_gradient(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        bent = hidden + (hidden - hidden.detach()) * 1e-3  # the same values, another slope
        return right(bent, *args, **kwargs)

    monkeypatch.setattr(sad.models.preflight, "linear_distill_loss", wrong_gradient)
    with pytest.raises(UnfitError, match="in loss_gradient"):
        run(tiny_llama(), tiny_qwen3())


def test_a_tokenizer_too_large_for_a_head_is_refused() -> None:
    with pytest.raises(UnfitError, match="for each of the tokenizer's 600 ids, got 512"):
        run(tiny_llama(), None, Objective(ce_weight=1, kd_weight=0), valid_vocab=600)


def test_the_reference_reads_the_head_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(5, 8)
    head = Head(torch.randn(33, 8), torch.randn(33), logit_scale=0.5, softcap=3.0, valid_vocab=31)
    teacher = TeacherHidden(torch.randn(5, 4), Head(torch.randn(31, 4)))
    labels = torch.arange(5)
    for width in (4, 31, 100):
        monkeypatch.setattr(sad.models.preflight, "SLICE", width)
        errors = check_loss(hidden, head, labels, teacher, MIXED)
        assert max(errors.values()) <= 1e-5


# No trace


def snapshot(model: PreTrainedModel) -> list[Any]:
    tensors = [t.clone() for t in (*model.parameters(), *model.buffers())]
    return [*tensors, *(p.grad for p in model.parameters()), *(m.training for m in model.modules())]


def test_weights_gradients_modes_hooks_and_random_state_are_left_alone() -> None:
    student, teacher = tiny_gpt2(attn_pdrop=0.5, resid_pdrop=0.5).train(), tiny_llama()
    student.transformer.h[0].eval()
    student.lm_head.weight.grad = torch.ones_like(student.lm_head.weight)
    torch.rand(3)
    random_state = torch.get_rng_state()
    before = snapshot(student)
    run(student, teacher)
    after = snapshot(student)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old is new
    assert not any(m._forward_pre_hooks for m in student.modules())


def test_a_model_that_draws_random_numbers_even_in_eval_mode_moves_no_random_state() -> None:
    model = tiny_llama()
    model.model.norm.register_forward_hook(lambda *_: torch.rand(1) and None)
    random_state = torch.get_rng_state()
    run(model, None, Objective(ce_weight=1, kd_weight=0))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_modes_are_restored_after_a_refusal() -> None:
    model = tiny_family("opt").train()
    with pytest.raises(UnfitError):
        check_model(model, IDS[:1] % 100 + 3, packing=True)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
