"""``sad.integrations``: the gradient of the whole batch, whoever cuts it, averages it and saves it.

Eight rows with unequally many targets are one optimizer step, in one process or on two ranks, in
one micro-batch each or in four. The truth is the definition in float64, on whole logits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from sad_kernels import Objective, TeacherLogits, reference
from support.families import tiny_family
from support.ranks import run_ranks
from support.tiny import tiny_llama, tiny_tokenizer
from torch import Tensor, distributed, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from sad.ema import ModelEMA
from sad.errors import SadError, UnfitError, UsageError
from sad.integrations import DistillMixin, DistillModel, DistillSFTMixin

needs_accelerate = pytest.mark.skipif(
    not find_spec("accelerate"), reason="needs accelerate, which the extra integrations installs"
)
needs_trl = pytest.mark.skipif(
    not find_spec("trl"), reason="needs trl, which the extra integrations installs"
)
pytestmark = [
    # torch, of every Trainer on a machine without a GPU
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # torch's own compiler, when it is imported
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # trl 1.16 sets, and older releases of transformers only have, what 5.23 has renamed
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]

OBJECTIVE = Objective(ce_weight=0.3, kd_weight=0.7, label_smoothing=0.1, temperature=2.0)
ROWS, LENGTH, VOCAB = 8, 12, 97
TARGETS = [12, 3, 7, 5, 12, 2, 9, 4]
"""Tokens of each row; the others are padding, and the first is no target."""

Gradients = dict[str, Tensor]


def small(**overrides: Any) -> Any:
    return tiny_llama(vocab_size=VOCAB, **overrides)


def model(**options: Any) -> DistillModel:
    student, teacher = small(seed=0), small(seed=5, hidden_size=48).train()
    return DistillModel(student, teacher, options.pop("objective", OBJECTIVE), **options)


@cache
def batch() -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(LENGTH) < torch.tensor(TARGETS)[:, None]).long()
    return {"input_ids": ids, "labels": ids.where(mask.bool(), -100), "attention_mask": mask}


COUNT = sum(TARGETS) - ROWS


def gradients(student: nn.Module) -> Gradients:
    found = {name: p.grad for name, p in student.named_parameters()}
    return {name: g.clone() for name, g in found.items() if g is not None}


@cache
def truth() -> tuple[float, Gradients]:
    """Loss and gradients of the definition, on whole logits in float64."""
    student, teacher = (m.double() for m in (model().student, model().teacher))
    rows = batch()
    logits = [m(input_ids=rows["input_ids"]).logits[:, :-1] for m in (student, teacher)]
    labels = rows["labels"][:, 1:]
    target = TeacherLogits(logits[1].detach())
    out = reference.distill_loss(logits[0], labels, target, OBJECTIVE, num_items=COUNT)
    out.loss.backward()
    return out.loss.item(), gradients(student)


@cache
def in_one_piece() -> Gradients:
    """Of the whole batch in one process: its error is what rounding alone does."""
    whole = model()
    whole(**batch(), num_items_in_batch=COUNT)["loss"].backward()
    return gradients(whole.student)


def errors(found: Gradients) -> dict[str, float]:
    """|found - truth| / |truth| of each parameter."""
    exact = truth()[1]
    assert found.keys() == exact.keys()
    return {n: float((found[n] - x).norm() / x.norm()) for n, x in exact.items()}


def assert_is_the_whole_gradient(found: Gradients) -> None:
    """No parameter's error is over four times what rounding does in one process."""
    rounding = max(errors(in_one_piece()).values())
    assert rounding < 1e-6, rounding
    worst = max(errors(found).items(), key=lambda item: item[1])
    assert worst[1] <= 4 * rounding, (worst, rounding)


# --- The model ------------------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_the_definition() -> None:
    whole = model()
    out = whole(**batch(), num_items_in_batch=COUNT)
    assert set(out) == {"loss", "kd"} and not out["kd"].requires_grad
    assert abs(out["loss"].item() / truth()[0] - 1) < 1e-6
    assert_is_the_whole_gradient(in_one_piece())


def test_kd_is_the_mean_divergence_over_the_batch() -> None:
    alone = model(objective=Objective(kd_weight=1.0, temperature=2.0))
    out = alone(**batch(), num_items_in_batch=10 * COUNT)
    torch.testing.assert_close(out["kd"], 10 * out["loss"].detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [torch.tensor(COUNT), torch.tensor(float(COUNT)), None])
def test_the_count_may_be_a_number_a_tensor_or_left_out(count: Any) -> None:
    """Trainer divides its count by the ranks with the same rows, which makes it floating."""
    expected = model()(**batch(), num_items_in_batch=COUNT)["loss"]
    assert torch.equal(model()(**batch(), num_items_in_batch=count)["loss"], expected)


def test_a_batch_without_targets_has_no_loss() -> None:
    rows = batch() | {"labels": torch.full((ROWS, LENGTH), -100)}
    whole = model()
    out = whole(**rows)
    out["loss"].backward()
    assert out["loss"] == 0 and out["kd"] == 0
    assert all(not g.any() for g in gradients(whole.student).values())


def test_without_a_divergence_the_teacher_does_not_run() -> None:
    alone = model(objective=Objective(ce_weight=1.0, kd_weight=0.0))
    calls: list[object] = []
    alone.teacher.register_forward_hook(lambda *_: calls.append(1))
    alone.teacher.model.register_forward_hook(lambda *_: calls.append(1))
    assert alone(**batch())["loss"] > 0 and not calls


def test_the_teacher_is_frozen_and_outside_the_tree() -> None:
    whole = model()
    whole.train()
    assert not whole.teacher.training and whole.student.training
    assert not any(p.requires_grad for p in whole.teacher.parameters())
    of_student = {id(p) for p in whole.student.parameters()}
    assert {id(p) for p in whole.parameters()} == of_student
    assert {name.split(".")[0] for name in whole.state_dict()} == {"student"}


def test_the_teacher_follows_its_inputs_to_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the device ``meta``, which is everywhere, though no layers run there."""

    def stop(*_: object) -> None:
        raise Seen

    whole = model()
    monkeypatch.setattr(DistillModel, "_hidden", stop)
    with pytest.raises(Seen):
        whole(batch()["input_ids"].to("meta"), batch()["labels"].to("meta"))
    assert whole.teacher.device.type == "meta"


def test_other_attributes_are_those_of_the_student() -> None:
    whole = model()
    assert whole.config is whole.student.config
    assert whole.get_input_embeddings() is whole.student.get_input_embeddings()
    assert whole.accepts_loss_kwargs and whole.loss_type == "ForCausalLM"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = whole.no_such_name
    with pytest.raises(AttributeError, match="student"):  # not a search without end
        _ = DistillModel.__new__(DistillModel).student


def test_gradient_checkpointing_changes_nothing() -> None:
    whole = model()
    whole.gradient_checkpointing_enable()
    whole.train()
    runs: list[object] = []
    whole.student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    whole(**batch(), num_items_in_batch=COUNT)["loss"].backward()
    assert len(runs) == 2, "the layer did not run again in backward"
    assert_is_the_whole_gradient(gradients(whole.student))


def test_padding_on_the_right_changes_nothing() -> None:
    """Row by row without its padding, the losses add up to that of the padded batch."""
    rows, whole = batch(), model()
    for i, length in enumerate(TARGETS):
        cut = {name: rows[name][i : i + 1, :length] for name in ("input_ids", "labels")}
        whole(**cut, num_items_in_batch=COUNT)["loss"].backward()
    assert_is_the_whole_gradient(gradients(whole.student))


def test_padding_on_the_left_is_refused() -> None:
    rows = {name: x.flip(1) for name, x in batch().items()}
    with pytest.raises(UsageError, match=one_line("padding on the right, .* padding_side")):
        model()(**rows)


def test_positions_that_restart_separate_documents() -> None:
    """All rows in one, as padding-free collators lay them out."""
    rows, whole = batch(), model()
    kept = rows["attention_mask"].bool()
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    packed = {"input_ids": rows["input_ids"][kept], "position_ids": positions[kept]}
    labels = rows["labels"].where(positions > 0, -100)  # no first token follows another document
    packed = {name: x[None] for name, x in (packed | {"labels": labels[kept]}).items()}
    whole(**packed, num_items_in_batch=COUNT)["loss"].backward()
    assert_is_the_whole_gradient(gradients(whole.student))


def test_positions_are_refused_where_layers_take_none() -> None:
    bloom = tiny_family("bloom")
    whole = DistillModel(bloom, tiny_llama(vocab_size=128), OBJECTIVE)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert whole(ids, ids)["loss"].isfinite()
    with pytest.raises(UnfitError, match=one_line("position_ids must be left out for Bloom")):
        whole(ids, ids, position_ids=torch.arange(4)[None])


def test_under_autocast_products_are_made_in_its_dtype() -> None:
    whole = model()
    seen: list[torch.dtype] = []

    def spy(hidden: Tensor, *_: Any) -> Any:
        seen.append(hidden.dtype)
        raise Seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sad.integrations.TeacherHidden", spy)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(Seen):
            whole(**batch())
    assert seen == [torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        loss = whole(**batch(), num_items_in_batch=COUNT)["loss"]
    assert 1e-6 < abs(loss.item() / truth()[0] - 1) < 2**-7


class Seen(Exception):
    """A spy has seen what it wanted."""


# --- Models that do not fit -----------------------------------------------------------------------


def one_line(pattern: str) -> str:
    """A pattern for a message of one line that ends in a remedy."""
    return rf"(?s)\A(?!.*\n).*{pattern}.*"


def test_heads_of_different_widths_need_the_number_of_ids() -> None:
    student, teacher = small(), tiny_llama(vocab_size=128, seed=5)
    with pytest.raises(UnfitError, match=one_line("equally wide, got 97 and 128; pass")):
        DistillModel(student, teacher, OBJECTIVE)
    with pytest.raises(UnfitError, match=one_line("100 ids, got 97; choose")):
        DistillModel(student, teacher, OBJECTIVE, valid_vocab=100)
    rows = {name: x.clamp(max=89) for name, x in batch().items()}
    out = DistillModel(student, teacher, OBJECTIVE, valid_vocab=90)(**rows)
    logits = [m(input_ids=rows["input_ids"]).logits[:, :-1, :90] for m in (student, teacher)]
    target = TeacherLogits(logits[1].detach())
    expected = reference.distill_loss(logits[0], rows["labels"][:, 1:], target, OBJECTIVE)
    torch.testing.assert_close(out["loss"], expected.loss, rtol=1e-6, atol=0)


def test_the_student_is_not_its_own_teacher() -> None:
    student = small()
    with pytest.raises(UnfitError, match=one_line("another model than the student")):
        DistillModel(student, student, OBJECTIVE)


# --- The gradient of an optimizer step, by each trainer -------------------------------------------


class FirstStep(Exception):
    """The optimizer was about to take its first step."""


def first_gradient(train: Callable[[], object], whole: DistillModel) -> Gradients:
    """The gradients with which the optimizer takes its first step."""

    def stop(*_: object) -> None:
        raise FirstStep

    handle = register_optimizer_step_pre_hook(stop)
    try:
        train()
    except FirstStep:
        return gradients(whole.student)
    finally:
        handle.remove()
    raise AssertionError("the optimizer took no step")


def examples() -> list[dict[str, Tensor]]:
    rows = batch()
    return [{name: x[i] for name, x in rows.items()} for i in range(ROWS)]


def micro_batches(steps: int) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of this rank."""
    rank, world = world_now()
    size = ROWS // (steps * world)
    for step in range(steps):
        start = (step * world + rank) * size
        yield {name: x[start : start + size] for name, x in batch().items()}


def world_now() -> tuple[int, int]:
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def in_a_plain_loop(steps: int, folder: str) -> Gradients:
    whole = model()
    world = world_now()[1]
    wrapped = nn.parallel.DistributedDataParallel(whole) if world > 1 else whole
    for rows in micro_batches(steps):
        loss = wrapped(**rows, num_items_in_batch=COUNT)["loss"]
        (loss * world).backward()  # DDP averages over the ranks
    return gradients(whole.student)


def with_accelerate(steps: int, folder: str) -> Gradients:
    from accelerate import Accelerator

    whole = model()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    optimizer = torch.optim.SGD(whole.student.parameters(), lr=0.1)
    wrapped, optimizer = accelerator.prepare(whole, optimizer)

    def train() -> None:
        for rows in micro_batches(steps):
            with accelerator.accumulate(wrapped):
                loss = wrapped(**rows, num_items_in_batch=COUNT)["loss"]
                factor = accelerator.gradient_accumulation_steps * accelerator.num_processes
                accelerator.backward(loss * factor)
                optimizer.step()

    return first_gradient(train, whole)


def options(folder: str, steps: int = 1, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": ROWS // (steps * world_now()[1]),
        "gradient_accumulation_steps": steps,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    } | others


class Distiller(DistillMixin, Trainer):
    pass


def with_transformers(steps: int, folder: str) -> Gradients:
    whole = model()
    arguments = TrainingArguments(**options(folder, steps))
    trainer = Distiller(whole, arguments, train_dataset=examples())
    return first_gradient(trainer.train, whole)


def sft_trainer(folder: str, steps: int = 1, student: Any = None, **others: Any) -> Any:
    """TRL's trainer on prepared rows without padding, as its own preparation leaves them."""
    from datasets import Dataset

    trl: Any = import_module("trl")

    class SFTDistiller(DistillSFTMixin, trl.SFTTrainer):
        pass

    ids = [row["input_ids"][row["attention_mask"].bool()].tolist() for row in examples()]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments: dict[str, Any] = {"bf16": False} | options(folder, steps, **others)
    return SFTDistiller(
        student or small(seed=0),
        trl.SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **arguments),
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
        teacher=small(seed=5, hidden_size=48),
        objective=OBJECTIVE,
    )


def with_trl(steps: int, folder: str) -> Gradients:
    trainer = sft_trainer(folder, steps)
    return first_gradient(trainer.train, trainer.model)


TRAINERS = [
    pytest.param(in_a_plain_loop, id="plain"),
    pytest.param(with_accelerate, id="accelerate", marks=needs_accelerate),
    pytest.param(with_transformers, id="transformers", marks=needs_accelerate),
    pytest.param(with_trl, id="trl", marks=[needs_trl, pytest.mark.slow]),
]


@pytest.fixture(autouse=True)
def no_accelerator_left() -> Iterator[None]:
    """A process remembers the first ``Accelerator`` that it makes."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def on_a_rank(gradient: Callable[[int, str], Gradients], steps: int, folder: str) -> Gradients:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "1"}
    return gradient(steps, folder)


@pytest.mark.few(7)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("gradient", TRAINERS)
def test_gradients_are_those_of_the_whole_batch(
    gradient: Callable[[int, str], Gradients], steps: int, ranks: int, tmp_path: Path
) -> None:
    truth()  # once, before ranks are forked, as the next
    in_one_piece()
    if ranks == 1:
        assert_is_the_whole_gradient(gradient(steps, str(tmp_path)))
        return
    found = run_ranks(ranks, on_a_rank, gradient, steps, str(tmp_path))
    for of_rank in found:
        assert_is_the_whole_gradient(of_rank)


@needs_trl
def test_trl_on_two_ranks_has_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    """Of the grid above, which is slow for TRL, the case that needs every factor."""
    truth()
    in_one_piece()
    import_module("trl")  # once, not on each rank
    for of_rank in run_ranks(2, on_a_rank, with_trl, 4, str(tmp_path)):
        assert_is_the_whole_gradient(of_rank)


# --- Files, averages, evaluation ------------------------------------------------------------------


def weights(module: nn.Module) -> Gradients:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(found: Gradients, expected: Gradients) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], x) for name, x in expected.items()
    )


def distiller(folder: Path, whole: DistillModel, **others: Any) -> Distiller:
    arguments = options(str(folder), 2, learning_rate=1e-2) | others
    arguments["per_device_train_batch_size"] = 2
    return Distiller(
        whole,
        TrainingArguments(**arguments),
        train_dataset=examples(),
        eval_dataset=examples(),
        processing_class=tiny_tokenizer(),
    )


@needs_accelerate
def test_a_saved_folder_is_the_student(tmp_path: Path) -> None:
    whole = model()
    trainer = distiller(tmp_path, whole, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert trainer.model is whole
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(weights(loaded), weights(whole.student))
    assert not same(weights(loaded), weights(model().student)), "nothing was trained"
    assert (tmp_path / "saved" / "tokenizer.json").exists()


@needs_accelerate
def test_a_resumed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Its weights are found, though the names in the files are those of the student."""
    saves = {"save_strategy": "steps", "save_steps": 2}
    unbroken = model()
    distiller(tmp_path / "unbroken", unbroken, max_steps=4, **saves).train()
    resumed = model()
    run = distiller(tmp_path / "resumed", resumed, max_steps=4, **saves)
    run.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-2"))
    assert same(weights(resumed.student), weights(unbroken.student))


@needs_accelerate
def test_the_best_student_is_loaded_at_the_end(tmp_path: Path) -> None:
    """Its weights after the first step: the second is ruined."""
    whole, kept = model(), []

    class Ruin(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kept.append(weights(whole.student))
            with torch.no_grad():
                whole.student.lm_head.weight.mul_(-3.0 if state.global_step == 2 else 1.0)

    each = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = distiller(tmp_path, whole, max_steps=2, load_best_model_at_end=True, **each)
    run.add_callback(Ruin())
    run.train()
    assert same(weights(whole.student), kept[0])


@needs_accelerate
def test_evaluation_gives_the_mean_loss(tmp_path: Path) -> None:
    whole = model()
    found = distiller(tmp_path, whole, per_device_eval_batch_size=ROWS).evaluate()["eval_loss"]
    assert abs(found / truth()[0] - 1) < 1e-6


@needs_accelerate
def test_a_step_hook_keeps_the_average(tmp_path: Path) -> None:
    """The same bits as a call after each of Trainer's steps, of two micro-batches each."""
    whole = model()
    by_hook, by_hand = ModelEMA(whole.student), ModelEMA(whole.student)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: by_hook.update())

    class ByHand(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            by_hand.update()

    run = distiller(tmp_path, whole, max_steps=3)
    run.optimizer = optimizer
    run.add_callback(ByHand())
    run.train()
    assert by_hook.num_updates == by_hand.num_updates == 3
    assert same(by_hook.tensors(), by_hand.tensors())
    assert not same(by_hook.tensors(), weights(whole.student))


@needs_trl
def test_trl_trains_evaluates_and_saves_the_student(tmp_path: Path) -> None:
    """Of a family whose loss transformers knows by another name: its targets are counted right."""
    student = small(seed=0)
    student.loss_type = "another"
    trainer = sft_trainer(str(tmp_path), student=student, max_steps=2, logging_steps=1)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] / truth()[0] - 1) < 1e-5
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < truth()[0]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(weights(loaded), weights(student))


@needs_trl
@pytest.mark.slow
def test_trl_s_padding_free_batches_have_the_same_gradient(tmp_path: Path) -> None:
    """One row, with positions that restart, and lengths that the model does not take."""
    trainer = sft_trainer(str(tmp_path), padding_free=True, max_length=None)
    assert_is_the_whole_gradient(first_gradient(trainer.train, trainer.model))


@needs_accelerate
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1; set"),
        ({"compute_metrics": len}, "compute_metrics must be None, got a function; logits"),
        ({"compute_loss_func": len}, "compute_loss_func must be None, got a function; logits"),
        ({"n_gpu": 2}, "a process must see one GPU, got 2; start one for each with torchrun"),
    ],
)
def test_options_that_need_logits_are_refused(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, rest = options(str(tmp_path)), dict(given)
    if "label_smoothing_factor" in given:
        arguments |= {"label_smoothing_factor": rest.pop("label_smoothing_factor")}
    made = TrainingArguments(**arguments)
    if "n_gpu" in given:
        made._n_gpu = rest.pop("n_gpu")
    with pytest.raises(SadError, match=one_line(message)):
        Distiller(model(), made, train_dataset=examples(), **rest)
