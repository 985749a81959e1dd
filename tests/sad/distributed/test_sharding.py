"""Gradients of split models, their averages, and what a rank without rows adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.rank_runs import Material
from support.ranks import run_ranks
from support.runs import make_trainer
from support.tiny import VOCAB_SIZE, tiny_llama
from torch import Tensor
from torch.nn import functional as F

from sad.config.schema import DistillConfig
from sad.distributed.sharding import set_last_backward, shard_trained
from sad.distributed.tensors import is_split, local_part, whole
from sad.distributed.world import whole_world
from sad.models.heads import decoder_layers
from sad.training.inputs import load_inputs
from sad.training.trainer import Trainer


def gradients_of(config: DistillConfig) -> tuple[dict[str, Tensor], float]:
    """The gradient of every parameter in the first window, unclipped, and whether it is split."""
    found: dict[str, Tensor] = {}

    def close(self: Trainer, *, empty: bool) -> None:
        for name, parameter in self.trained_parameters().items():
            if parameter.grad is not None:
                found[name] = whole(parameter.grad).clone()

    with whole_world("cpu", timeout_seconds=30, replicas=config.dp_replicate_size) as world:
        trainer = make_trainer(config, load_inputs(config, world=world))
        trainer._close_window = close.__get__(trainer)  # type: ignore[method-assign]
        trainer.student.train()
        while not trainer.micro_batch():
            pass
        split = sum(map(is_split, trainer.student.parameters()))
        return found, split / len(list(trainer.student.parameters()))


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {
        name: float((ours[name] - exact).norm() / exact.norm().clamp_min(1e-12))
        for name, exact in theirs.items()
    }


TINY = {"max_length": 4, "global_batch_size": 2, "gradient_accumulation_steps": 1}
"""Two rows of four tokens: what Triton's interpreter ends in seconds."""

FEW = [
    pytest.param(2, {}, id="2 ranks"),
    pytest.param(3, {"sync_each_batch": False}, id="3 ranks, summed once"),
    pytest.param(2, {"reshard_after_forward": False}, id="layers stay whole"),
    pytest.param(2, {"dp_replicate_size": 2}, id="replicas"),
    pytest.param(4, {"dp_replicate_size": 2}, id="hybrid"),
    pytest.param(2, {"gradient_checkpointing": True}, id="checkpointing"),
    pytest.param(2, {"cpu_offload": True}, id="offloaded"),
    pytest.param(4, {"global_batch_size": 4}, id="ranks without rows"),
    pytest.param(2, {"feature": {"weight": 0.5}, "use_curriculum": False}, id="projectors"),
    pytest.param(2, TINY | {"impl": "triton"}, id="triton", marks=pytest.mark.slow),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("ranks", "keys"), FEW)
def test_every_gradient_is_that_of_one_process(
    material: Material, tmp_path: Path, ranks: int, keys: dict[str, Any]
) -> None:
    config = material.config("kd", tmp_path / "run", **keys)
    (alone, _), *_ = run_ranks(1, gradients_of, material.config("kd", tmp_path, **one(keys)))
    (found, share), *others = run_ranks(ranks, gradients_of, config)
    assert share == 1.0
    assert max(error(found, alone).values()) < 2e-6
    assert all(torch.equal(found[n], other[n]) for other, _ in others for n in found)


def one(keys: dict[str, Any]) -> dict[str, Any]:
    """The same for one process, which has no copies."""
    return {key: value for key, value in keys.items() if key != "dp_replicate_size"}


# A model of which little is trained


def gradients_of_few(trained: str, keys: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients that two backward passes leave in a model whose parameters are frozen but for
    those with ``trained`` in their names; of every other parameter there must be none."""
    model: Any = tiny_llama(seed=2, tie_word_embeddings=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    ids = torch.randint(VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(3))
    with whole_world("cpu", timeout_seconds=60) as world:
        sync_each = keys.pop("sync_each", True)
        if world.mesh is not None:
            shard_trained(model, decoder_layers(model), world.mesh, **keys)
        for last, rows in enumerate(ids.split(4)):
            own = rows[world.share(4)]
            if world.mesh is not None:
                set_last_backward(model, last=bool(last), sync_each=sync_each)
            logits = model(input_ids=own).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, own[:, 1:].flatten(), reduction="sum")
            (loss / ids[:, 1:].numel()).backward()
        named = dict(model.named_parameters())
        assert all((p.grad is not None) == (trained in name) for name, p in named.items())
        return {name: whole(p.grad) for name, p in named.items() if p.grad is not None}


@pytest.mark.parametrize(
    ("trained", "keys"),
    [
        ("layers.1.", {}),  # the backward pass ends above a layer that has nothing to sum
        ("layers.0.self_attn.q_proj", {}),  # it goes through one
        ("layers.0.self_attn.q_proj", {"reshard_after_forward": False}),
        ("norm", {"sync_each": False}),
    ],
)
def test_gradients_are_right_where_most_parameters_are_frozen(
    trained: str, keys: dict[str, Any]
) -> None:
    (alone,) = run_ranks(1, gradients_of_few, trained, keys)
    assert alone and all(gradient.any() for gradient in alone.values())
    for found in run_ranks(2, gradients_of_few, trained, keys):
        assert max(error(found, alone).values()) < 2e-6


# A teacher's head that is read again by the backward pass

FREED = "storage of size 0"
"""torch, of a tensor whose memory FSDP2 has given back."""


def gradients_without_a_head(config: DistillConfig) -> str:
    """What the backward pass raises if the teacher is released before it."""
    with whole_world("cpu", timeout_seconds=30) as world:
        trainer = make_trainer(config, load_inputs(config, world=world))
        trainer.student.train()
        forward = trainer._forward

        def released(*args: Any) -> Any:
            result = forward(*args)
            trainer.policy.release()
            return result

        trainer._forward = released  # type: ignore[method-assign]
        try:
            trainer.micro_batch()
        except RuntimeError as error:
            return str(error)
        return "nothing"


@pytest.mark.few(1)
@pytest.mark.parametrize("teacher", ["teacher", "student"], ids=["own head", "tied head"])
def test_a_teacher_is_released_after_the_backward_pass_and_not_before(
    material: Material, tmp_path: Path, teacher: str
) -> None:
    # In so little memory the gradients of the loss are made in the backward pass.
    config = material.config("kd", tmp_path, teacher=teacher, chunk_bytes=4096, **TINY)
    (alone, _), *_ = run_ranks(1, gradients_of, config)
    (found, _), _ = run_ranks(2, gradients_of, config)
    assert max(error(found, alone).values()) < 2e-6
    assert all(FREED in said for said in run_ranks(2, gradients_without_a_head, config))


def test_in_bf16_the_error_is_that_of_autocast(material: Material, tmp_path: Path) -> None:
    exact = material.config("kd", tmp_path)
    halves = [
        material.config("kd", tmp_path, bf16=True),
        material.config("kd", tmp_path, bf16=True, param_dtype="bfloat16"),
    ]
    (alone, _), *_ = run_ranks(1, gradients_of, exact)
    (cast, _), *_ = run_ranks(1, gradients_of, halves[0])
    allowed = error(cast, alone)
    for config in halves:
        (found, _), *_ = run_ranks(2, gradients_of, config)
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        for name, err in error(found, alone).items():
            assert err < 3 * allowed[name] + 1e-3, name


def window_with_a_nan(config: DistillConfig) -> tuple[bool, float, list[Tensor], list[Tensor]]:
    """Close a window in whose gradient one rank has a NaN: whether it was skipped, the loss scale
    after it, and this rank's parts of the weights and of their average, before and after."""
    with whole_world("cpu", timeout_seconds=30) as world:
        trainer = make_trainer(config, load_inputs(config, world=world))
        trainer.student.train()
        assert trainer.ema is not None
        before = [local_part(p.detach()).clone() for p in trainer.student.parameters()]
        closing = trainer._close_window

        def close(*, empty: bool) -> None:
            if world.rank == 1:
                parameter = next(trainer.student.parameters())
                assert parameter.grad is not None
                local_part(parameter.grad).fill_(float("nan"))
            closing(empty=empty)

        trainer._close_window = close  # type: ignore[method-assign]
        while not trainer.micro_batch():
            pass
        after = [local_part(p.detach()).clone() for p in trainer.student.parameters()]
        skipped = trainer.ema.num_updates == 0
        return skipped, trainer.precision.loss_scale, before, after


@pytest.mark.parametrize("keys", [{}, {"fp16": True}], ids=["fp32", "fp16"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(
    material: Material, tmp_path: Path, keys: dict[str, Any]
) -> None:
    config = material.config("kd", tmp_path, warmup_steps=0, **keys)
    for skipped, scale, before, after in run_ranks(2, window_with_a_nan, config):
        assert skipped
        assert scale == (2.0**15 if keys else 1.0)  # halved on both
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
