"""Auxiliary losses of mixture-of-experts students: that of the family, or said to be missing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import make_trainer
from support.tiny import save_tiny, tiny_llama, write_texts
from support.tiny_moe import tiny_moe

from sad.config.schema import DistillConfig
from sad.data.batch import Batch, LossCounts
from sad.errors import UnfitError
from sad.losses.balance import FamilyBalanceLoss, build_balance_loss, run_with_routers
from sad.models.heads import split_head
from sad.report.log import read_log
from sad.training.run import distill

Make = Callable[..., DistillConfig]

COEF = 0.25
IDS = torch.randint(1, 500, (2, 12), generator=torch.Generator().manual_seed(0))
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe"]


def config(**overrides: Any) -> DistillConfig:
    return DistillConfig(student="-", kd_weight=0.0, **overrides)


def batch(lengths: list[int]) -> Batch:
    positions = torch.arange(IDS.shape[1]).expand(len(IDS), -1)
    counts = LossCounts(sum(lengths), sum(lengths) - len(lengths), len(lengths))
    return Batch(IDS, IDS, positions, torch.tensor(lengths), counts, 0)


def own_loss(model: Any, lengths: list[int]) -> torch.Tensor:
    mask = torch.arange(IDS.shape[1]) < torch.tensor(lengths)[:, None]
    return model(
        input_ids=IDS, attention_mask=mask.long(), output_router_logits=True, use_cache=False
    ).aux_loss


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_transformers_adds_to_the_familys_own_loss(family: str) -> None:
    model = tiny_moe(family, router_aux_loss_coef=COEF)
    loss, note = build_balance_loss(config(), model)
    assert isinstance(loss, FamilyBalanceLoss) and loss.coef == COEF
    assert note == f"0.25 of the auxiliary loss of {type(model).__name__}"
    whole = batch([12, 12])
    _, routers = run_with_routers(split_head(model)[0], IDS, None)
    term = loss.term(routers, whole)
    assert term.count == whole.counts.tokens
    expected = own_loss(model, [12, 12])
    torch.testing.assert_close(term.sum / term.count, expected)
    gradients = [
        torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
        for value in (term.sum / term.count, expected)
    ]
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if b is not None]
    assert pairs
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_padding_does_not_count() -> None:
    model = tiny_moe("mixtral", router_aux_loss_coef=COEF)
    loss, _ = build_balance_loss(config(), model)
    assert loss is not None
    part = batch([12, 5])
    _, routers = run_with_routers(split_head(model)[0], IDS, None)
    term = loss.term(routers, part)
    torch.testing.assert_close(term.sum / term.count, own_loss(model, [12, 5]))
    other = loss.term(routers, batch([12, 12]))
    change = other.sum.detach() / other.count - term.sum.detach() / term.count
    assert change.abs() > 1e-4


def test_a_dense_student_has_none_and_is_told_nothing() -> None:
    assert build_balance_loss(config(), tiny_llama()) == (None, "")
    with pytest.raises(UnfitError, match="must be 0 for a student without experts"):
        build_balance_loss(config(router_aux_loss_coef=0.1), tiny_llama())


def test_a_family_of_which_transformers_has_none_is_said() -> None:
    llama4 = tiny_moe("llama4_text", router_aux_loss_coef=COEF)
    loss, note = build_balance_loss(config(), llama4)
    assert loss is None
    assert note == (
        "the auxiliary loss of Llama4ForCausalLM (weight 0.25) is left out: transformers has no "
        "such loss for it"
    )
    with pytest.raises(UnfitError, match="router_aux_loss_coef must be 0 for Llama4"):
        build_balance_loss(config(router_aux_loss_coef=0.1), llama4)


def test_the_key_wins_over_the_configuration_and_turns_it_off() -> None:
    model = tiny_moe("mixtral", router_aux_loss_coef=COEF)
    loss, _ = build_balance_loss(config(router_aux_loss_coef=2.0), model)
    assert loss is not None and loss.coef == 2.0
    assert build_balance_loss(config(router_aux_loss_coef=0), model) == (None, "no auxiliary loss")
    own = tiny_moe("mixtral", router_aux_loss_coef=0.0)
    assert build_balance_loss(config(), own) == (None, "")


def test_a_student_with_adapters_has_that_of_the_model_inside() -> None:
    peft: Any = pytest.importorskip("peft")
    model = tiny_moe("mixtral", router_aux_loss_coef=COEF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls what transformers has renamed
        targets = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
        adapted = peft.get_peft_model(model, targets)
    loss, note = build_balance_loss(config(), adapted)
    assert loss is not None and note == "0.25 of the auxiliary loss of MixtralForCausalLM"
    _, routers = run_with_routers(split_head(adapted)[0], IDS, None)
    term = loss.term(routers, batch([12, 12]))
    torch.testing.assert_close(term.sum / term.count, own_loss(model, [12, 12]))


def test_the_balance_of_the_router_loss_stands_for_it() -> None:
    model = tiny_moe("mixtral", router_aux_loss_coef=COEF)
    both = DistillConfig(student="-", teacher="-", router={"weight": 0.1})  # pyright: ignore
    loss, note = build_balance_loss(both, model)
    assert loss is None and "router.balance_weight stands for it" in note
    loss, _ = build_balance_loss(replace(both, router_aux_loss_coef=0.5), model)
    assert loss is not None and loss.coef == 0.5


@pytest.fixture
def make_config(tmp_path: Path) -> Make:
    student = tiny_moe("qwen3_moe", seed=2, router_aux_loss_coef=COEF)

    def make(**overrides: Any) -> DistillConfig:
        defaults: dict[str, Any] = {
            "teacher": save_tiny(tmp_path / "teacher", tiny_llama(seed=1)),
            "student": save_tiny(tmp_path / "student", student),
            "data": {"train": write_texts(tmp_path / "texts", count=8), "eval_fraction": 0.3},
            "output_dir": str(tmp_path / "run"),
            "max_length": 32,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "max_eval_rows": 2,
        }
        return DistillConfig(**(defaults | overrides))

    return make


def test_a_run_adds_it_and_reports_it(make_config: Make) -> None:
    result = distill(make_config(baseline=True))
    for folder in (result.run_dir, result.run_dir / "baseline"):
        records = read_log(folder)
        (start,) = (r for r in records if r["kind"] == "start")
        assert dict(start["header"])["experts"] == (
            "0.25 of the auxiliary loss of Qwen3MoeForCausalLM"
        )
        for record in (r for r in records if r["kind"] == "train"):
            assert record["weights"]["router_aux"] == COEF and record["router_aux"] > 1
            weights = record["weights"]
            parts = sum(weights[name] * record[name] for name in weights)
            assert record["loss"] == pytest.approx(parts, rel=1e-5)
        assert all("eval/router_aux" in r for r in records if r["kind"] == "eval")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_a_window_has_it(make_config: Make, checkpointing: bool) -> None:
    """The mean of the micro-batches' values by their tokens, whatever else is in the loss."""
    with_it = make_trainer(make_config(gradient_checkpointing=checkpointing))
    without = make_trainer(make_config(router_aux_loss_coef=0))
    window = with_it.run_length.window(0)
    counts = with_it.batches.counts(window)
    batches = list(with_it.batches.window(window))
    grads = []
    for trainer in (with_it, without):
        for part in batches:
            weights = trainer.weights(0)
            trainer._forward(part, weights, counts).loss.backward()
        grads.append([p.grad for p in trainer.student.model.parameters()])
    model: Any = without.student.model
    model.zero_grad()
    for part in batches:
        loss, _ = build_balance_loss(make_config(), model)
        assert loss is not None
        _, routers = run_with_routers(split_head(model)[0], part.input_ids, part.position_ids)
        (COEF * loss.term(routers, part).sum / counts.tokens).backward()
    for ours, base, parameter in zip(*grads, model.parameters(), strict=True):
        expected = base if parameter.grad is None else base + parameter.grad
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
