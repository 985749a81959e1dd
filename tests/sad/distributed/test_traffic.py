"""Bytes that collectives move in an optimizer step, counted on forked ranks, against the plan's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.tiny import tiny_llama
from torch import distributed as dist

from sad.config.schema import DistillConfig
from sad.data.batch import Batch, LossCounts
from sad.distributed.sharding import set_last_backward, shard_trained
from sad.distributed.world import whole_world
from sad.models.heads import decoder_layers
from sad.models.load import compute_dtype
from sad.models.rank_plan import Cluster, transfers
from sad.teachers.sharded import ShardedTeacher
from sad.training.student import StudentWithLoss

VOCAB = 121
"""No multiple of the ranks: what is split is padded."""

GATHERS = ("all_gather_single", "all_gather_into_tensor")
"""As FSDP2 calls it: the name depends on torch's version. The first argument is the whole."""
REDUCTIONS = ("reduce_scatter_single", "reduce_scatter_tensor")
"""The second argument is the whole."""


@contextmanager
def counted_bytes() -> Iterator[Counter[str]]:
    """Bytes of whole tensors by the kind of collective, over groups of more than one rank."""
    moved: Counter[str] = Counter()
    before = {}

    def watch(name: str, kind: str, whole: Callable[..., torch.Tensor], weight: int) -> None:
        function = before[name] = getattr(dist, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if dist.get_world_size(kwargs.get("group")) > 1:
                moved[kind] += weight * whole(*args, **kwargs).nbytes
            return function(*args, **kwargs)

        setattr(dist, name, watched)

    def first(output_tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return output_tensor

    def second(output: torch.Tensor, input: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return input

    def only(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    for name in GATHERS:
        if hasattr(dist, name):
            watch(name, "gathered", first, 1)
    for name in REDUCTIONS:
        if hasattr(dist, name):
            watch(name, "summed", second, 1)
    watch("all_reduce", "between", only, 2)
    try:
        yield moved
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def models(tied: bool) -> tuple[Any, Any]:
    student = tiny_llama(seed=1, vocab_size=VOCAB, tie_word_embeddings=tied)
    teacher = tiny_llama(
        seed=2, vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, tie_word_embeddings=tied
    )
    return student, teacher.requires_grad_(False).eval()


def one_step(config: DistillConfig, tied: bool) -> Counter[str]:
    """What this rank moves in the second of two optimizer steps."""
    student, teacher = models(tied)
    ids = torch.randint(VOCAB, (1, 8), generator=torch.Generator().manual_seed(3))
    counts = LossCounts(targets=8, tokens=7, sequences=1)
    positions = torch.arange(8)[None]
    batch = Batch(ids, ids, positions, torch.tensor([8]), counts, target_bytes=8)
    with whole_world("cpu", timeout_seconds=60, replicas=config.dp_replicate_size) as world:
        mesh = world.mesh
        if mesh is None:  # as a run of one process: nothing is split
            return Counter()
        root = StudentWithLoss(student, VOCAB, compute_dtype=compute_dtype(config))
        shard_trained(
            root,
            decoder_layers(student),
            mesh,
            compute_dtype=compute_dtype(config),
            reshard_after_forward=config.reshard_after_forward,
        )
        frozen = ShardedTeacher(teacher, VOCAB, device=torch.device("cpu"), mesh=mesh)
        optimizer = torch.optim.SGD(root.parameters(), lr=0.01)

        def step() -> None:
            steps = config.gradient_accumulation_steps
            for i in range(steps):
                last = i == steps - 1
                set_last_backward(root, last=last, sync_each=config.sync_each_batch)
                targets = frozen.forward(batch)
                root(batch, targets, config.objective(), counts).loss.backward()
                frozen.release()
            optimizer.step()
            optimizer.zero_grad()

        step()
        with counted_bytes() as moved:
            step()
        return moved


def planned(config: DistillConfig, ranks: int, tied: bool) -> Counter[str]:
    kinds = {"gathered": "gathered", "summed in fp32": "summed", "between replicas": "between"}
    found: Counter[str] = Counter()
    for transfer in transfers(config, *models(tied), Cluster(ranks)):
        _, _, what = transfer.label.rpartition(", ")
        found[kinds[what]] += transfer.size * transfer.times
    return found


CASES = {
    "A=1": {},
    "A=2": {"gradient_accumulation_steps": 2},
    "A=2, summed last": {"gradient_accumulation_steps": 2, "sync_each_batch": False},
    "layers stay": {"reshard_after_forward": False},
    "layers stay, A=2, summed last": {
        "reshard_after_forward": False,
        "gradient_accumulation_steps": 2,
        "sync_each_batch": False,
    },
    "bf16": {"bf16": True},
}


@pytest.mark.few(3)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_a_step_moves_what_is_planned(case: str, ranks: int) -> None:
    config = DistillConfig(student="s", teacher="t", teacher_dtype="float32", **CASES[case])
    tied = case == "A=2"
    for moved in run_ranks(ranks, one_step, config, tied):
        assert moved == planned(config, ranks, tied)


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 2), (4, 2)])
def test_replicas_move_what_is_planned(ranks: int, replicas: int) -> None:
    config = DistillConfig(
        student="s", teacher="t", dp_replicate_size=replicas, gradient_accumulation_steps=2
    )
    found = run_ranks(ranks, one_step, config, False)
    expected = planned(config, ranks, False)
    assert bool(expected) == (ranks > 1)
    assert all(moved == expected for moved in found)
