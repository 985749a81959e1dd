"""Compiled layers: the same numbers on packed rows, in training alone, and to the bit on resuming.

The compiler itself (inductor) runs in one slow test; else graphs are traced and run as they are.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import assert_same_bits, everything, make_trainer
from support.tiny import tiny_llama, tiny_run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from sad.checkpoint.store import load_checkpoint, save_checkpoint
from sad.config.schema import DistillConfig
from sad.errors import UsageError
from sad.models import compiled
from sad.models.compiled import compile_and_check
from sad.models.heads import Backbone, decoder_layers
from sad.models.load import enable_checkpointing
from sad.training.inputs import load_inputs
from sad.training.run import distill
from sad.training.trainer import Trainer

# Tracing reads .grad of tensors in the middle of a graph, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

IDS = torch.arange(64).view(2, 32) * 7 % 512
POSITIONS = (torch.arange(32) % 13)[None].repeat(2, 1)  # three documents to a row


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    return tiny_run(tmp_path) | {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "torch_compile": True,
    }


def windows() -> PreTrainedModel:
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
        )
    )


def checkpointed() -> PreTrainedModel:
    model = tiny_llama(num_hidden_layers=6)
    enable_checkpointing(model)
    return model


def with_dropout() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=6, attention_dropout=0.2)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "build", [windows, pytest.param(checkpointed, marks=pytest.mark.slow), with_dropout]
)
def test_packed_rows_are_the_same_and_alike_layers_share_a_graph(build: Any) -> None:
    torch.manual_seed(0)
    model = build().train()
    backbone = Backbone(model)
    names = list(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    assert compile_and_check(model, IDS, POSITIONS, backend=counter) <= 1e-6  # pyright: ignore
    assert counter.frame_count <= 2, "six layers of one kind, or of two"
    assert list(model.state_dict()) == names and model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    together = backbone(IDS, POSITIONS)[:, 13:26]
    alone = backbone(IDS[:, 13:26], POSITIONS[:, 13:26])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_graphs_that_compute_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: PreTrainedModel, _: str) -> None:
        """Let documents see each other, as a graph would that drops the mask."""
        for layer in decoder_layers(model):
            forward: Any = layer.forward
            monkeypatch.setattr(layer, "forward", partial(call_without_mask, forward))

    def call_without_mask(forward: Any, hidden: Tensor, attention_mask: Any, **options: Any) -> Any:
        assert attention_mask is not None
        return forward(hidden, attention_mask=None, **options)

    monkeypatch.setattr(compiled, "compile_layers", wrong)
    with pytest.raises(UsageError, match=r"torch_compile must be false for .* packed rows"):
        compile_and_check(tiny_llama().train(), IDS, POSITIONS)


def test_a_compiler_that_fails_is_one_line() -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler\nwas found")

    with pytest.raises(UsageError, match=r"torch_compile must be false .*; leave") as caught:
        compile_and_check(tiny_llama().train(), IDS, POSITIONS, backend=fails)  # pyright: ignore
    assert "\n" not in str(caught.value)


def test_structural_losses_are_refused_with_it() -> None:
    with pytest.raises(UsageError, match="torch_compile must be false with structural losses"):
        DistillConfig(student="s", teacher="t", torch_compile=True, relations={"weight": 0.1})  # pyright: ignore


def compiled_trainer(config: DistillConfig, inputs: Any, backend: Any = "aot_eager") -> Trainer:
    trainer = make_trainer(config, inputs)
    trainer.student.train().compile_layers(trainer.batches.batch(0), backend)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"peft": {"r": 4}, "bf16": True}, marks=pytest.mark.slow)],
    ids=lambda options: ",".join(options),
)
def test_a_run_is_the_same_and_resumes_to_the_same_bits(
    keys: dict[str, Any], options: dict[str, Any]
) -> None:
    config = DistillConfig(**keys, **options)
    inputs = load_inputs(config)
    plain, whole = make_trainer(config, inputs), compiled_trainer(config, inputs)
    total = whole.run_length.micro_batches
    assert len(inputs.train_rows) % 5, "the last micro-batch should have another shape"
    for _ in range(total):
        plain.micro_batch()
        whole.micro_batch()
    for name, parameter in plain.student.model.named_parameters():
        ours = dict(whole.student.model.named_parameters())[name]
        torch.testing.assert_close(ours, parameter, rtol=1e-2, atol=1e-3)

    first = compiled_trainer(config, inputs)
    for _ in range(3):
        first.micro_batch()
    path = save_checkpoint(config.output_dir, 3, *first.capture(), save_total_limit=2)
    torch._dynamo.reset()
    second = compiled_trainer(config, inputs)
    second.restore(load_checkpoint(path), warn=pytest.fail)
    while second.counters.micro_step < total:
        second.micro_batch()
    assert_same_bits(everything(second), everything(whole))


def test_evaluation_runs_layers_as_they_are(keys: dict[str, Any]) -> None:
    config = DistillConfig(**keys)
    inputs = load_inputs(config)
    counter = CompileCounterWithBackend("aot_eager")
    trainer = compiled_trainer(config, inputs, counter)
    graphs = counter.frame_count
    assert graphs > 0
    batch = inputs.eval_rows.batch([0])
    plain = make_trainer(config, inputs).student.eval().hidden(batch)
    assert torch.equal(trainer.student.eval().hidden(batch), plain)
    assert counter.frame_count == graphs
    trainer.student.train().hidden(batch)
    assert counter.frame_count > graphs, "a shape of its own"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_whole_run_by_the_compiler(keys: dict[str, Any]) -> None:
    result = distill(DistillConfig(**keys, max_steps=2))
    layers = decoder_layers(tiny_llama())
    assert len(layers) == 2 and result.metrics["eval_ema/nll"] > 0
    assert "student/compiled" in (result.run_dir / "run.json").read_text()
