"""Structural losses in training: what is captured when, what checkpoints hold, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.allocations import peak_bytes
from support.runs import assert_same_bits, everything, make_trainer, run_log
from support.tiny import save_tiny, tiny_llama, tiny_qwen3, write_texts
from support.tiny_moe import tiny_moe
from torch import nn

from sad.checkpoint.run_directory import RunDirectory
from sad.checkpoint.store import load_checkpoint, save_checkpoint
from sad.config.schema import STRUCTURAL, DistillConfig
from sad.config.sections import RoutingConfig
from sad.errors import SadError, UnfitError
from sad.losses import contrastive, structural
from sad.losses.base import CaptureSpec, LossInputs, LossTerm, LossTerms, StructuralLoss
from sad.losses.structural import StructuralLosses
from sad.report.log import read_log
from sad.teachers.frozen import FrozenTeacher, TeacherOutput
from sad.teachers.routing import StudentAwareRouter
from sad.training.meters import ThroughputMeter
from sad.training.rescore import evaluate_run
from sad.training.run import distill

DENSE = tuple(name for name in STRUCTURAL if name != "router")
WEIGHTS: dict[str, Any] = {name: {"weight": 0.3} for name in DENSE}
ALL: dict[str, Any] = WEIGHTS | {
    "attention": {"weight": 0.3, "head_map": "learned", "query_block": 7},
    "contrastive": {"weight": 0.3, "queue_size": 5},
    "use_curriculum": False,
}

Make = Callable[..., DistillConfig]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A deeper and wider teacher with other numbers of heads, and unequal documents."""
    folder = tmp_path_factory.mktemp("sources")
    teacher = tiny_qwen3(seed=1, hidden_size=48, num_hidden_layers=3, num_attention_heads=6)
    student = tiny_llama(seed=2, attention_dropout=0.1)
    return {
        "teacher": save_tiny(folder / "teacher", teacher),
        "student": save_tiny(folder / "student", student),
        "data": {"train": write_texts(folder / "texts", count=12), "eval_fraction": 0.2},
    }


@pytest.fixture
def make_config(sources: dict[str, Any], tmp_path: Path) -> Make:
    def make(**overrides: Any) -> DistillConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_length": 32,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 14,
            "gradient_accumulation_steps": 3,
            "learning_rate": 1e-2,
            "max_eval_rows": 4,
            "logging_steps": 1,
        }
        return DistillConfig(**(sources | defaults | overrides))

    return make


# What is computed


def test_identical_models_have_nothing_to_learn(make_config: Make, sources: dict[str, Any]) -> None:
    config = make_config(**ALL, student=sources["teacher"], student_init="pretrained")
    trainer = make_trainer(config)
    trainer.student.eval()
    names = trainer.student.term_names
    assert set(names) == {*DENSE, "head_map"}
    result = first_micro_batch(trainer)
    for name in names:
        term = result.terms[name]
        mean = float(term.sum.detach()) / term.count
        if name == "contrastive":  # its floor is not 0: others look alike too
            assert 0 < mean < math.log(result.distill.num_tokens)
        elif name == "attention":  # a learned map begins near the identity, not at it
            assert 0 < mean < 0.2
        else:
            assert abs(mean) < 1e-5, name


def test_the_loss_is_the_weighted_sum_of_its_terms(make_config: Make) -> None:
    trainer = make_trainer(make_config(**ALL))
    trainer.student.eval()
    result = first_micro_batch(trainer)
    counts = window_units(trainer)
    parts = [float(result.distill.loss.detach())]
    for name in trainer.student.term_names:
        term = result.terms[name]
        count = counts.sequences if name == "contrastive" else counts.tokens
        parts.append(0.3 * float(term.sum.detach()) / count)
    assert float(result.loss.detach()) == pytest.approx(sum(parts), rel=1e-6)


def test_the_split_of_a_window_does_not_matter(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the contrastive loss, whose negatives are those of the micro-batch."""
    weights = {name: section for name, section in WEIGHTS.items() if name != "contrastive"}
    shared: dict[str, Any] = weights | {"use_curriculum": False, "max_steps": 1, "use_ema": False}
    gradients = []
    for size, steps in ((12, 1), (4, 3), (2, 6)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make_trainer(make_config(**shared, **sizes))
        trainer.student.model.double().eval()
        trainer.student.compute_dtype = torch.float64
        assert trainer.student.structural is not None
        teacher = trainer.policy.teacher
        assert isinstance(teacher, FrozenTeacher)
        teacher.model.double()
        teacher._head = replace(teacher._head, weight=teacher._head.weight.double())
        trainer.student.structural.double()
        monkeypatch.setattr(trainer, "_close_window", lambda *, empty: None)
        for _ in range(steps):
            trainer.micro_batch()
        trained = trainer.trained_parameters().items()
        gradients.append({n: p.grad for n, p in trained if p.grad is not None})
    whole = gradients[0]
    assert any(name.startswith("structure/") for name in whole)
    for others in gradients[1:]:
        assert others.keys() == whole.keys()
        for name, gradient in others.items():
            scale = float(whole[name].abs().max())
            assert float((gradient - whole[name]).abs().max()) < 1e-11 * max(scale, 1e-6), name


def test_a_loss_that_is_off_is_not_computed(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default phases: nothing before 0.3, no layerwise and contrastive loss before 0.6."""
    config = make_config(**WEIGHTS, gradient_accumulation_steps=1, per_device_train_batch_size=4)
    trainer = make_trainer(config)
    structural = trainer.student.structural
    assert structural is not None
    computed: list[tuple[str, ...]] = []
    terms = StructuralLosses.terms

    def noted(self: StructuralLosses, names: Any, inputs: Any) -> Any:
        computed.append(tuple(names))
        return terms(self, names, inputs)

    monkeypatch.setattr(StructuralLosses, "terms", noted)
    steps = trainer.run_length.micro_batches
    for step in range(steps):
        computed.clear()
        before = {n: p.detach().clone() for n, p in structural.named_parameters()}
        trainer.micro_batch()
        x = step / steps
        expected = [
            n for n in DENSE if x > 0.6 or (x > 0.3 and n not in ("layerwise", "contrastive"))
        ]
        assert computed == ([tuple(expected)] if expected else []), x
        moved = {n for n, p in structural.named_parameters() if not torch.equal(p, before[n])}
        assert all(any(f"losses.{on}." in name for on in expected) for name in moved)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in all_modules(trainer))


def test_without_weights_nothing_is_kept(make_config: Make) -> None:
    """No hook, and no byte more at the peak of a step."""
    peaks = []
    for overrides in ({}, {name: {"weight": 0.0} for name in STRUCTURAL}):
        trainer = make_trainer(make_config(**overrides))
        assert trainer.student.structural is None
        trainer.micro_batch()
        peaks.append(peak_bytes(trainer.micro_batch))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in all_modules(trainer))
    config = make_config(**WEIGHTS)  # and with them, while the curriculum holds them back
    trainer = make_trainer(config)
    trainer.micro_batch()
    peaks.append(peak_bytes(trainer.micro_batch))
    assert peaks[0] == peaks[1] == peaks[2]


def test_checkpointed_activations_give_the_same_gradient(make_config: Make) -> None:
    gradients = []
    for checkpointing in (False, True):
        trainer = make_trainer(make_config(**ALL, gradient_checkpointing=checkpointing))
        trainer.micro_batch()
        trained = trainer.trained_parameters().items()
        gradients.append({n: p.grad for n, p in trained if p.grad is not None})
    assert_same_bits(*gradients)


def test_a_student_starts_as_one_without_structure(make_config: Make) -> None:
    plain = make_trainer(make_config(student_init="random"))
    full = make_trainer(make_config(**ALL, student_init="random"))
    assert_same_bits(
        dict(plain.student.model.named_parameters()), dict(full.student.model.named_parameters())
    )
    other = make_trainer(make_config(**ALL, student_init="random", seed=7))
    assert other.student.structural is not None and full.student.structural is not None
    changed = zip(
        other.student.structural.parameters(), full.student.structural.parameters(), strict=True
    )
    assert any(not torch.equal(a, b) for a, b in changed), "projectors follow the seed"


# Checkpoints, logs, evaluation


def test_a_stop_after_any_micro_batch_changes_no_bit(make_config: Make) -> None:
    config = make_config(**ALL, taid={"enabled": True, "alpha": 0.5}, projector_lr_ratio=3.0)
    ends = stop_anywhere(config)
    assert "structure/losses.contrastive.queue.embeddings" in ends[0]
    assert ends[-1]["state"]["taid"]["momentum"] != 0


def test_projectors_have_a_rate_of_their_own(make_config: Make) -> None:
    trainer = make_trainer(make_config(**ALL, projector_lr_ratio=0.25))
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert sorted(set(rates)) == [2.5e-3, 1e-2]
    assert len(trainer.optimizer.param_groups) == len(rates) and rates[0] == 1e-2
    assert trainer.student.structural is not None
    count = sum(len(g["params"]) for g in trainer.optimizer.param_groups if g["initial_lr"] < 1e-2)
    assert count == len(list(trainer.student.structural.parameters())) > 3


def test_whole_run(make_config: Make) -> None:
    """Every term in the log and in evaluations, a total that adds up, a student without extras."""
    config = make_config(**ALL, ema_decay=0.5)
    result = distill(config)
    names = {*DENSE, "head_map"}
    records = read_log(config.output_dir)
    header = dict(RunDirectory(config.output_dir).read_run()["header"])
    assert header["objective"].endswith(" + ".join(f"0.3 {name}" for name in DENSE))
    trained = [r for r in records if r["kind"] == "train"]
    assert all(names <= r.keys() and names <= r["weights"].keys() for r in trained)
    for record in trained:
        parts = sum(w * record[name] for name, w in record["weights"].items())
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
    metrics = result.metrics
    for prefix in ("eval", "eval_ema"):
        weights = {"nll": 0.3, "kl": 0.7} | {name: 0.3 for name in names}
        parts = sum(w * metrics[f"{prefix}/{name}"] for name, w in weights.items())
        assert metrics[f"{prefix}/loss"] == pytest.approx(parts, rel=1e-6)
    assert trained[-1]["feature"] < trained[0]["feature"]
    assert evaluate_run(config.output_dir)[1]["nll"] == pytest.approx(metrics["eval_ema/nll"])
    exported = load_file(result.final / "model.safetensors")
    assert exported.keys() <= tiny_llama().state_dict().keys()


def test_the_contrastive_loss_is_logged_with_what_it_is_read_against(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy and chance, as means over the sequences since the last record; no part of a loss."""
    config = make_config(contrastive={"weight": 0.3, "queue_size": 5}, use_curriculum=False)
    results: list[contrastive.ContrastiveResult] = []

    def noted(*tensors: Any, **options: Any) -> contrastive.ContrastiveResult:
        results.append(contrastive_loss(*tensors, **options))
        return results[-1]

    contrastive_loss = contrastive.contrastive_loss
    monkeypatch.setattr(contrastive, "contrastive_loss", noted)
    record = first_record(make_trainer(config))
    counts = [result.term.count for result in results]
    assert len(counts) == 3 and len(set(counts)) > 1
    for name in ("accuracy", "chance"):
        values = [float(getattr(result, name)) for result in results]
        mean = sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)
        assert record[f"contrastive_{name}"] == pytest.approx(mean, rel=1e-6)
        assert f"contrastive_{name}" not in record["weights"]
    assert 0 < record["contrastive_accuracy"] < 1 < record["contrastive_chance"]


def test_taid_moves_the_target(make_config: Make) -> None:
    config = make_config(taid={"enabled": True, "start": 0.5, "alpha": 0.0})
    trainer = make_trainer(config)
    shares = []
    while trainer.counters.micro_step < trainer.run_length.micro_batches:
        shares.append(trainer.objective(trainer.weights(0)).teacher_share)
        trainer.micro_batch()
    steps, size = len(shares), config.gradient_accumulation_steps
    assert shares == pytest.approx([0.5 + 0.5 * (i // size * size) / steps for i in range(steps)])


# Mixture-of-experts students


@pytest.fixture
def moe_config(make_config: Make, sources: dict[str, Any], tmp_path: Path) -> Make:
    def make(**overrides: Any) -> DistillConfig:
        models = {
            "teacher": save_tiny(tmp_path / "moe-teacher", tiny_moe("qwen3_moe", seed=1)),
            "student": save_tiny(tmp_path / "moe-student", tiny_moe("qwen3_moe", seed=2)),
        }
        router = {"router": {"weight": 0.2}, "use_curriculum": False}
        return make_config(**(models | router | overrides))

    return make


@pytest.mark.slow
def test_routers_learn(moe_config: Make) -> None:
    config = moe_config(num_train_epochs=3)
    result = distill(config)
    trained = [r for r in read_log(config.output_dir) if r["kind"] == "train"]
    assert trained[-1]["router"] < trained[0]["router"]
    assert {"router_balance", "router_z"} <= trained[0].keys()
    assert trained[0]["weights"]["router_z"] == pytest.approx(0.001)
    assert "eval/router" in result.metrics


@pytest.mark.slow
def test_gates_of_the_teacher_learn_first(moe_config: Make, tmp_path: Path) -> None:
    """With every loss of a window seen, the student's target is new, and evaluation knows it."""
    routing = {"mode": "student_aware", "learning_rate": 1e-2}
    config = moe_config(router={"weight": 0}, routing=routing, temperature=1.0, num_train_epochs=2)
    result = distill(config)
    kl = [r["kd"] for r in read_log(config.output_dir) if r["kind"] == "train"]
    plain = distill(replace(config, routing=RoutingConfig(), output_dir=str(tmp_path / "plain")))
    plain_kl = [r["kd"] for r in read_log(plain.run_dir) if r["kind"] == "train"]
    assert kl[-1] < plain_kl[-1] and result.metrics["eval/kl"] < plain.metrics["eval/kl"]


def test_what_the_gates_learn_is_logged(moe_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The divergence per target and the balance per token, of the window that they learned from."""
    routing = {"mode": "student_aware", "learning_rate": 1e-2}
    trainer = make_trainer(moe_config(router={"weight": 0}, routing=routing))
    losses: list[tuple[float, float]] = []
    backward = StudentAwareRouter.backward

    def noted(self: StudentAwareRouter, batch: Any, *others: Any) -> Any:
        loss = backward(self, batch, *others)
        losses.append((float(loss.kl), float(loss.balance) * batch.counts.tokens))
        return loss

    monkeypatch.setattr(StudentAwareRouter, "backward", noted)
    counts = window_units(trainer)
    record = first_record(trainer)
    kl, balance = (sum(values) for values in zip(*losses, strict=True))
    assert len(losses) == 3 and kl > 0 < balance
    assert record["routing_loss"] == pytest.approx(kl / counts.targets, rel=1e-6)
    assert record["routing_balance"] == pytest.approx(balance / counts.tokens, rel=1e-6)


def test_several_passes_are_averaged(moe_config: Make) -> None:
    routing = {"mode": "knowledge_augmentation", "passes": 3, "explore": 0.9}
    trainer = make_trainer(moe_config(router={"weight": 0}, routing=routing))
    trainer.student.eval()
    batch, counts = trainer.batches.batch(0), window_units(trainer)
    objective = trainer.objective(trainer.weights(0))
    state = trainer.policy.generator.get_state()  # pyright: ignore[reportAttributeAccessIssue]
    output = trainer.policy.forward(batch)
    assert len(output.targets) == 3
    assert not torch.equal(output.targets[0].hidden, output.targets[1].hidden)
    one_by_one = [
        trainer.student(batch, TeacherOutput((target,)), objective, counts).distill
        for target in output.targets
    ]
    trainer.policy.generator.set_state(state)  # pyright: ignore[reportAttributeAccessIssue]
    together = trainer._forward(batch, trainer.weights(0), counts)
    for name in ("loss", "kd", "agree", "ce"):
        mean = torch.stack([getattr(out, name) for out in one_by_one]).mean()
        torch.testing.assert_close(getattr(together.distill, name), mean)


@pytest.mark.parametrize("mode", ["student_aware", "knowledge_augmentation"])
def test_routing_survives_a_stop(moe_config: Make, mode: str) -> None:
    routing = {"mode": mode, "learning_rate": 1e-2, "explore": 0.5}
    config = moe_config(routing=routing)
    stop_anywhere(config)


# A loss of one's own


class Toy(StructuralLoss):
    """A loss with everything that one can have: two terms, a diagnostic, a parameter, a buffer."""

    name = "feature"
    unit = "sequences"
    diagnostics = ("toy_seen",)
    student_spec = CaptureSpec(hidden=(0,))
    seen: torch.Tensor

    def __init__(self, config: DistillConfig, student: Any, teacher: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: LossInputs) -> LossTerms:
        self.seen += self.training
        count = inputs.layout.units.sequences
        hidden = inputs.student.hidden[0][inputs.layout.tokens].square().mean()
        return {
            "toy": LossTerm(hidden * self.scale * count, count),
            "toy_scale": LossTerm(self.scale.square() * count, count),
            "toy_seen": LossTerm(self.seen.clone(), 1),
        }

    def weights(self, weight: float) -> dict[str, float]:
        return {"toy": weight, "toy_scale": weight / 2}


def test_a_loss_is_a_class_and_a_row(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, logged, evaluated, saved and restored, without a word of it anywhere else."""
    monkeypatch.setitem(structural.LOSSES, "feature", Toy)
    config = make_config(feature={"weight": 0.5}, use_curriculum=False)
    result = distill(config)
    first, *_, last = (r for r in read_log(config.output_dir) if r["kind"] == "train")
    weights = {"ce": 0.3, "kd": 0.7, "toy": 0.5, "toy_scale": 0.25}
    assert first["weights"] == pytest.approx(weights)
    assert first["toy_scale"] == 1 > last["toy_scale"]
    assert first["toy_seen"] == 2 < last["toy_seen"]  # of 1, 2 and 3 in the first window
    parts = sum(weight * last[name] for name, weight in last["weights"].items())
    assert last["loss"] == pytest.approx(parts, rel=1e-5)
    assert {"eval/toy", "eval_ema/toy_scale"} <= result.metrics.keys()
    assert "eval/toy_seen" not in result.metrics
    ends = stop_anywhere(replace(config, output_dir=config.output_dir + "-stopped"))
    assert float(ends[-1]["structure/losses.feature.seen"]) == 6


def test_a_loss_without_its_row_is_refused(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(structural.LOSSES, "relations")
    with pytest.raises(LookupError, match="got none for 'relations'; add it to"):
        make_trainer(make_config(relations={"weight": 1}))


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"attention": {"weight": 1, "layers": [[5, -1]]}},
            "attention.layers must name layers that the student LlamaForCausalLM has, -2 to 1, "
            "got 5; choose one of these",
        ),
        (
            {"layerwise": {"weight": 1, "layers": [[0, 1], [1, 7]]}},
            "layerwise.layers must name layers that the teacher Qwen3ForCausalLM has, -3 to 2, "
            "got 7",
        ),
        ({"layerwise": {"weight": 1, "layers": [[0, 0], [1, 1]]}}, "layerwise.layers: .*last"),
        ({"router": {"weight": 1}}, "router.weight must have a model with experts, got LlamaFor"),
    ],
)
def test_what_models_cannot_supply(make_config: Make, keys: dict[str, Any], message: str) -> None:
    """One line, before anything is trained, the baseline included."""
    config = make_config(**keys, baseline=True)
    with pytest.raises(SadError, match=message) as refusal:
        distill(config)
    assert "\n" not in str(refusal.value)
    assert not any(r["kind"] == "train" for r in read_log(config.output_dir))
    assert not (Path(config.output_dir) / "baseline").exists()


def test_experts_must_be_equally_many(moe_config: Make, tmp_path: Path) -> None:
    fewer = save_tiny(tmp_path / "fewer", tiny_moe("qwen3_moe", seed=3, num_experts=3))
    with pytest.raises(UnfitError, match=r"router\.weight must be 0 unless paired layers have"):
        make_trainer(moe_config(student=fewer))


# Helpers


def stop_anywhere(config: DistillConfig) -> list[dict[str, Any]]:
    """Stop after each of two windows' micro-batches and go on in new objects, the teacher's too;
    return the states passed through."""
    config = replace(config, max_steps=2)
    whole = make_trainer(config)
    steps = whole.run_length.micro_batches
    ends: list[dict[str, Any]] = []
    for _ in range(steps):
        whole.micro_batch()
        ends.append(everything(whole))
    for stop in range(1, steps):
        first = make_trainer(config)
        for _ in range(stop):
            first.micro_batch()
        state, tensors = first.capture()
        path = save_checkpoint(config.output_dir, stop, state, tensors, save_total_limit=2)
        second = make_trainer(config)
        second.restore(load_checkpoint(path), warn=pytest.fail)
        assert_same_bits(everything(second), ends[stop - 1])
        while second.counters.micro_step < steps:
            second.micro_batch()
        assert_same_bits(everything(second), ends[-1])
    return ends


def first_record(trainer: Any) -> dict[str, Any]:
    """The train record after the first window."""
    with run_log(trainer.config, trainer) as log:
        while not trainer.micro_batch():
            pass
        trainer.log_progress(log, ThroughputMeter(0))
    (record,) = (r for r in read_log(trainer.config.output_dir) if r["kind"] == "train")
    return record


def first_micro_batch(trainer: Any) -> Any:
    return trainer._forward(trainer.batches.batch(0), trainer.weights(0), window_units(trainer))


def window_units(trainer: Any) -> Any:
    return trainer.batches.counts(trainer.run_length.window(0))


def all_modules(trainer: Any) -> list[nn.Module]:
    return [*trainer.student.modules(), *trainer.policy.teacher.model.modules()]
