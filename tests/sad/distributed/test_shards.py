"""Checkpoints of several ranks: resharding, faults on one rank, deaths, crafted files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.faulty_disk import Died, FaultyDisk
from support.ranks import RankFailedError, run_ranks
from support.shards import save_shards
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sad.checkpoint import atomic_files as files
from sad.checkpoint.parts import (
    Gradients,
    ModuleTensors,
    OptimizerState,
    RandomGenerators,
    capture_parts,
    per_rank_names,
    restore_parts,
)
from sad.checkpoint.snapshot import HostBuffers, in_thread, snapshot
from sad.checkpoint.store import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    set_aside,
    sweep_stale,
)
from sad.distributed.shards import (
    ShardWriter,
    background_world,
    load_shards,
    write_shards,
)
from sad.distributed.world import World, whole_world
from sad.errors import CheckpointError, RankLostError
from sad.training.ranks import SharedRunDirectory

Whole = dict[str, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether fsync is called is for the tests of ``sad.checkpoint`` to ask."""
    monkeypatch.setattr(files, "OPERATIONS", files.FileOperations(fsync=lambda fd: None))


# What is saved


def whole(seed: int) -> Whole:
    """All groups of a run, as one process has them; the same on every rank."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    model = {
        "embed": random(7, 4),
        "three rows": random(3, 2),
        "one": random(1),
        "half": random(5, 2, 2).bfloat16(),
        "none": torch.empty(0, 3),
    }
    optimizer = {}
    for name, parameter in model.items():
        optimizer[f"{name}/exp_avg"] = random(*parameter.shape)
        optimizer[f"{name}/step"] = torch.tensor(float(seed))
    return {
        "model": model | {"counts": torch.arange(4) + seed},
        "optimizer": optimizer,
        "ema": {name: random(*parameter.shape) for name, parameter in model.items()},
        "grads": {"embed": random(7, 4), "three rows": random(3, 2)},
        "masters": {},
    }


def placed(tensors: Whole, world: World) -> dict[str, dict[str, Any]]:
    """The same, split over the ranks as FSDP splits parameters; counters are whole on each."""
    if world.mesh is None:
        return {group: dict(named) for group, named in tensors.items()}
    mesh = world.mesh

    def split(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or name.endswith("/step"):
            return tensor
        return distribute_tensor(tensor, mesh, [Replicate(), Shard(0)], src_data_rank=None)

    return {g: {n: split(n, t) for n, t in named.items()} for g, named in tensors.items()}


def values(seed: int, rank: int) -> dict[str, Any]:
    return {"counters": {"step": seed, "lr": seed / 3}, "rng": {"words": [rank, seed]}}


def generators(seed: int, rank: int) -> dict[str, Tensor]:
    return {"torch": torch.full((6,), 16 * seed % 240 + rank, dtype=torch.uint8)}


def save(run_dir: Path, step: int, world: World, *, limit: int = 2) -> Path:
    tensors = placed(whole(step), world) | {"rng": generators(step, world.rank)}
    state = values(step, world.rank)
    return save_shards(run_dir, step, state, tensors, world, save_total_limit=limit)


def saved_on(ranks: int, run_dir: Path, step: int, *, shard_size: int | None = None) -> Path:
    """A checkpoint of ``ranks`` ranks; of one rank it is of schema 1."""
    if ranks == 1:
        return save(run_dir, step, World())

    def on_rank() -> Path:
        with whole_world("cpu", timeout_seconds=60, shard_size=shard_size) as world:
            return save(run_dir, step, world)

    return run_ranks(ranks, on_rank)[0]


def bits(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_equal(found: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Any]) -> None:
    """Names, and of every tensor dtype, shape and bits of this rank's part."""
    assert found.keys() == expected.keys()
    for group, named in expected.items():
        assert found[group].keys() == named.keys(), group
        for name, tensor in named.items():
            assert found[group][name].shape == tensor.shape, f"{group}/{name}"
            assert bits(local(found[group][name])) == bits(local(tensor)), f"{group}/{name}"


def assert_holds(checkpoint: Checkpoint, step: int, world: World, ranks: int) -> None:
    """A checkpoint is what was saved from ``step``: whole, and as like a live one."""
    expected = whole(step)
    as_many = world.size == ranks
    state = values(step, world.rank)
    if not as_many:
        del state["rng"]
    assert (checkpoint.state, checkpoint.ranks, checkpoint.micro_step) == (state, ranks, step)
    tensors = dict(checkpoint.tensors)
    if as_many:
        own = tensors.pop("rng")
        assert_equal({"rng": own}, {"rng": generators(step, world.rank)})
    assert_equal(tensors, expected)
    if world.size == 1:
        return
    live, goal = placed(whole(step + 1), world), placed(expected, world)
    for group, named in live.items():
        for name, tensor in named.items():
            if isinstance(tensor, DTensor):
                like = checkpoint.tensors[group].like(name, tensor)  # pyright: ignore
                assert_equal({"": {"": like}}, {"": {"": goal[group][name]}})


# Resharding


DEFAULT = [(1, None, 2, None), (2, None, 1, None), (2, None, 3, None), (4, 2, 2, None)]
REST = [
    (2, None, 2, None),
    (2, None, 4, None),
    (4, None, 1, None),
    (4, None, 2, None),
    (4, 2, 4, 2),
    (4, 2, 1, None),
    (2, 1, 3, None),
    (1, None, 3, None),
]


@pytest.mark.parametrize(
    ("ranks", "shards", "readers", "reader_shards"),
    [*DEFAULT, *[pytest.param(*case, marks=pytest.mark.slow) for case in REST]],
)
def test_any_number_of_ranks_reads_what_another_saved(
    tmp_path: Path, ranks: int, shards: int | None, readers: int, reader_shards: int | None
) -> None:
    """Bits of weights, moments, steps, average and gradients; three rows lie on up to four ranks;
    hybrid meshes have every shard twice."""
    path = saved_on(ranks, tmp_path, 7, shard_size=shards)
    if readers == 1:
        assert_holds(load_checkpoint(path), 7, World(), ranks)
        return

    def on_rank() -> None:
        with whole_world("cpu", timeout_seconds=60, shard_size=reader_shards) as world:
            if ranks == 1 and world.size > 1:  # what schema 1 has for its one rank is left to it
                checkpoint = load_shards(path, world)
                assert checkpoint.state.pop("rng") and checkpoint.tensors.pop("rng")
                assert_holds(checkpoint, 7, world, ranks)
                return
            assert_holds(load_shards(path, world), 7, world, ranks)

    run_ranks(readers, on_rank)


def test_layout(tmp_path: Path) -> None:
    path = saved_on(2, tmp_path, 12345)
    assert path == tmp_path / "checkpoints" / "batch-000012345"
    shards = [f"{g}.0000{r}" for g in ("ema", "grads", "model", "optimizer", "rng") for r in "01"]
    expected = sorted([*(f"{s}.safetensors" for s in shards), "state.json", "tensors.json"])
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["schema"] == 2 and sorted(manifest["files"]) == expected
    assert sorted(os.listdir(path)) == sorted([*expected, "manifest.json"])
    embed = json.loads((path / "tensors.json").read_text())["model"]["embed"]
    assert embed == {
        "dtype": "F32",
        "shape": [7, 4],
        "chunks": [
            [[0, 0], [4, 4], "model.00000.safetensors", "embed(0,0)"],
            [[4, 0], [3, 4], "model.00001.safetensors", "embed(4,0)"],
        ],
    }
    state = json.loads((path / "state.json").read_text())
    assert state["ranks"] == [{"rng": {"words": [rank, 12345]}} for rank in (0, 1)]


def test_what_several_ranks_hold_is_written_once(tmp_path: Path) -> None:
    path = saved_on(4, tmp_path, 3, shard_size=2)
    expected = sum(t.nbytes for named in whole(3).values() for t in named.values())
    expected += 4 * generators(3, 0)["torch"].nbytes
    index = json.loads((path / "tensors.json").read_text())
    chunks = [c for named in index.values() for t in named.values() for c in t["chunks"]]
    assert len({(c[2], c[3]) for c in chunks}) == len(chunks)
    written = 0
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        written += len(content) - 8 - int.from_bytes(content[:8], "little")
    assert written == expected


def test_one_rank_writes_schema_1_to_the_bit(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    tensors = whole(5) | {"rng": generators(5, 0)}
    path = save_checkpoint(one, 5, values(5, 0), tensors, save_total_limit=2)
    other = save(two, 5, World())
    names = sorted(os.listdir(path))
    assert names == sorted(os.listdir(other))
    assert all((path / name).read_bytes() == (other / name).read_bytes() for name in names)


# A run's own objects


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 3)
        self.second = nn.Linear(3, 7, bias=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def trained(world: World, *, seed: int, steps: int) -> tuple[Net, torch.optim.Optimizer, list[Any]]:
    """A small model after some steps of AdamW, with gradients of the next, and its parts."""
    torch.manual_seed(seed)
    net: Any = Net()
    if world.mesh is not None:
        fully_shard(net, mesh=world.mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        net(torch.randn(4, 5)).square().mean().backward()  # the same rows on every rank
        if step < steps - 1:
            optimizer.step()
    named = dict(net.named_parameters())
    parts = [
        ModuleTensors("model", net),
        OptimizerState("optimizer", optimizer, named),
        Gradients("grads", named),
        RandomGenerators("rng"),
    ]
    return net, optimizer, parts


def whole_parts(parts: list[Any]) -> dict[str, Tensor]:
    """Weights, moments and gradients, put together from all ranks."""
    _, tensors = capture_parts(parts)
    named = {f"{g}/{n}": t for g, group in tensors.items() if g != "rng" for n, t in group.items()}
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in named.items()}


@pytest.mark.parametrize("readers", [1, 3])
def test_parts_of_a_sharded_run_are_restored_in_place(tmp_path: Path, readers: int) -> None:
    """Parameters, moments and gradients that were never there before come back as shards."""

    def write() -> Path:
        with whole_world("cpu", timeout_seconds=60) as world:
            _, optimizer, parts = trained(world, seed=1, steps=3)
            state, tensors = capture_parts(parts)
            assert per_rank_names(parts) == {"rng"}
            live = {id(moment) for of_one in optimizer.state.values() for moment in of_one.values()}
            assert {id(tensor) for tensor in tensors["optimizer"].values()} == live, "copied"
            return save_shards(tmp_path, 1, state, tensors, world, save_total_limit=2)

    path = run_ranks(2, write)[0]

    def restored(world: World) -> dict[str, Tensor]:
        _, optimizer, parts = trained(world, seed=2, steps=0)
        checkpoint = load_checkpoint(path) if world.size == 1 else load_shards(path, world)
        before = torch.get_rng_state()
        restore_parts(parts, checkpoint, ranks=world.size)
        assert torch.equal(torch.get_rng_state(), before)  # of another number of ranks
        optimizer.step()  # with the restored gradients and moments
        return whole_parts(parts)

    def read() -> dict[str, Tensor]:
        with whole_world("cpu", timeout_seconds=60) as world:
            return restored(world)

    def unbroken() -> dict[str, Tensor]:
        with whole_world("cpu", timeout_seconds=60) as world:
            _, optimizer, parts = trained(world, seed=1, steps=3)
            optimizer.step()
            return whole_parts(parts)

    goal = run_ranks(2, unbroken)[0]
    found = restored(World()) if readers == 1 else run_ranks(readers, read)[-1]
    assert found.keys() == goal.keys()
    for name, tensor in goal.items():
        assert torch.equal(found[name], tensor), name


def test_generators_come_back_on_as_many_ranks(tmp_path: Path) -> None:
    def on_rank() -> tuple[Tensor, Tensor]:
        with whole_world("cpu", timeout_seconds=60) as world:
            parts = [RandomGenerators("rng")]
            torch.manual_seed(world.rank)
            state, tensors = capture_parts(parts)
            path = save_shards(tmp_path, 1, state, tensors, world, save_total_limit=2)
            first = torch.rand(3)
            torch.manual_seed(99)
            restore_parts(parts, load_shards(path, world), ranks=world.size)
            return first, torch.rand(3)

    (one, one_again), (two, two_again) = run_ranks(2, on_rank)
    assert torch.equal(one, one_again) and torch.equal(two, two_again)
    assert not torch.equal(one, two)


# Faults


def refused_on(ranks: int, function: Callable[[World], Any]) -> list[str]:
    """The messages of the ``CheckpointError``s that every rank must raise."""

    def on_rank() -> str:
        with whole_world("cpu", timeout_seconds=60) as world:
            try:
                function(world)
            except CheckpointError as error:
                return str(error)
            raise AssertionError(f"rank {world.rank} did not raise")

    return run_ranks(ranks, on_rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_stops_all_and_costs_nothing(tmp_path: Path, rank: int) -> None:
    saved_on(2, tmp_path, 10)

    def function(world: World) -> None:
        disk = FaultyDisk("ENOSPC", at=6).mounted() if world.rank == rank else nullcontext()
        with disk:
            save(tmp_path, 20, world)

    messages = refused_on(2, function)
    assert messages[0] == messages[1]
    assert f"ENOSPC (No space left on device) on rank {rank}; free space" in messages[0]
    assert os.listdir(tmp_path / "checkpoints") == ["batch-000000010"]
    assert_holds(load_checkpoint(tmp_path / "checkpoints" / "batch-000000010"), 10, World(), 2)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_refusal_of_any_operation_costs_no_checkpoint(tmp_path: Path, rank: int) -> None:
    saved_on(2, tmp_path, 10)

    def function(world: World) -> None:
        at = 0
        while True:
            mine = FaultyDisk("EIO" if world.rank == rank else "none", at=at)
            try:
                with mine.mounted():
                    save(tmp_path, 20, world, limit=9)
            except CheckpointError:
                pass
            if world.main:
                found = load_latest(tmp_path)
                assert found is not None and found.micro_step in (10, 20)
                assert_holds(found, found.micro_step, World(), 2)
                shutil.rmtree(tmp_path / "checkpoints" / "batch-000000020", ignore_errors=True)
            done = not world.any(world.rank == rank and len(mine.trace) >= at)
            at += 1
            if done:
                raise CheckpointError(f"{at}")

    assert int(refused_on(2, function)[0]) > 20


@pytest.mark.parametrize("group", ["ema", "model"])
@pytest.mark.parametrize("shard", [0, 1])
def test_one_flipped_byte_is_refused_on_all_ranks(tmp_path: Path, group: str, shard: int) -> None:
    path = saved_on(2, tmp_path, 10)
    file = path / f"{group}.0000{shard}.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    messages = refused_on(2, lambda world: load_shards(path, world))
    assert all(f"checkpoint {file} must have SHA-256" in message for message in messages)
    with pytest.raises(CheckpointError, match=file.name):
        load_checkpoint(path)


def test_a_damaged_one_is_passed_over_on_all_ranks(tmp_path: Path) -> None:
    saved_on(2, tmp_path, 10)
    (saved_on(2, tmp_path, 20) / "ema.00001.safetensors").unlink()

    def on_rank() -> tuple[int, list[str]]:
        heard: list[str] = []
        with whole_world("cpu", timeout_seconds=60) as world:
            shared = SharedRunDirectory(tmp_path, world)
            found = shared._on_main(lambda: load_latest(tmp_path, heard.append))
            assert found is not None
            return found.micro_step, heard

    (one, heard), (two, nothing) = run_ranks(2, on_rank)
    assert one == two == 10 and len(heard) == 1 and not nothing
    assert "ema.00001.safetensors must exist" in heard[0]


@pytest.mark.parametrize(
    ("exists", "words"), [(False, "on rank 1; choose"), (True, "got nothing as")]
)
def test_a_directory_that_is_not_shared_is_refused(
    tmp_path: Path, exists: bool, words: str
) -> None:
    """The same path is another directory on another machine: it is not there, or not seen."""

    def elsewhere(world: World) -> None:
        write_data = ShardWriter.write_data

        def beside(self: ShardWriter, *args: Any) -> Any:
            if self.rank == 1:
                self.tmp = tmp_path / "other machine"
                if exists:
                    self.tmp.mkdir()
            return write_data(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShardWriter, "write_data", beside)
            save(tmp_path / "run", 10, world)

    messages = refused_on(2, elsewhere)
    assert messages[0] == messages[1] and words in messages[0]
    assert "output_dir must be shared by all ranks" in messages[0]
    assert os.listdir(tmp_path / "run" / "checkpoints") == []


def test_ranks_that_see_other_checkpoints_are_refused(tmp_path: Path) -> None:
    for step, name in ((10, "0"), (11, "1")):
        path = saved_on(2, tmp_path / name, step)
        path.rename(tmp_path / name / "it")
    (tmp_path / "0" / "it").rename(tmp_path / "it0")
    (tmp_path / "1" / "it").rename(tmp_path / "it1")
    messages = refused_on(2, lambda world: load_shards(tmp_path / f"it{world.rank}", world))
    assert all("different manifests" in message for message in messages)


def test_a_value_that_cannot_be_restored_is_the_callers_mistake(tmp_path: Path) -> None:
    def on_rank() -> str:
        with whole_world("cpu", timeout_seconds=60) as world:
            state = {"loss": np.float64(1.0) if world.rank else 1.0}
            error = TypeError if world.rank else RankLostError
            with pytest.raises(error, match=r"numpy\.float64"):
                save_shards(tmp_path, 1, state, {}, world, save_total_limit=2)
            return ""

    run_ranks(2, on_rank)
    assert not (tmp_path / "checkpoints").exists()


# In the background


def test_a_save_in_the_background_holds_the_state_of_the_call(tmp_path: Path) -> None:
    """Parameters change, and the ranks go on talking, while the writer waits for its disk."""

    def on_rank() -> Path:
        with whole_world("cpu", timeout_seconds=60) as world:
            background = background_world(world)
            live = placed(whole(7), world) | {"rng": generators(7, world.rank)}
            begin = torch.zeros(1)
            state = values(7, world.rank)
            taken = snapshot(7, state, live, HostBuffers())
            saving = in_thread(
                lambda: write_shards(tmp_path, taken, background, save_total_limit=2)
            )
            state["counters"]["step"] = -1
            for named in live.values():
                for tensor in named.values():
                    local(tensor).zero_()
            for _ in range(50):
                dist.all_reduce(begin)
                world.gather(None)
            return saving.result(timeout=60)

    path = run_ranks(2, on_rank)[0]
    assert_holds(load_checkpoint(path), 7, World(), 2)


# Deaths


class DeadlyDisk(FaultyDisk):
    """Here dying is dying."""

    def _do(self, name: str, *args: Any) -> Any:
        try:
            return super()._do(name, *args)
        except Died:
            os.kill(os.getpid(), signal.SIGKILL)


def tiny_save(run_dir: Path, step: int, world: World) -> None:
    tensors = {"model": {"w": torch.full((2,), float(step))}, "rng": generators(step, world.rank)}
    tensors = placed({"model": tensors["model"]}, world) | {"rng": tensors["rng"]}
    save_shards(run_dir, step, values(step, world.rank), tensors, world, save_total_limit=2)


def two_before(run_dir: Path) -> None:
    def on_rank() -> None:
        with whole_world("cpu", timeout_seconds=60) as world:
            tiny_save(run_dir, 10, world)
            tiny_save(run_dir, 20, world)

    run_ranks(2, on_rank)


def operations(run_dir: Path) -> list[int]:
    """The file operations of a save, by rank."""

    def on_rank() -> int:
        with whole_world("cpu", timeout_seconds=60) as world, FaultyDisk().mounted() as disk:
            tiny_save(run_dir, 30, world)
            return len(disk.trace)

    return run_ranks(2, on_rank)


def assert_survives(run_dir: Path, rank: int, fault: str, at: int) -> None:
    """A rank dies at an operation: the newest checkpoint loads and nothing else stays."""

    def on_rank() -> None:
        with whole_world("cpu", timeout_seconds=60) as world:
            disk = DeadlyDisk(fault, at) if world.rank == rank else FaultyDisk()
            with disk.mounted():
                tiny_save(run_dir, 30, world)

    with pytest.raises(RankFailedError):
        run_ranks(2, on_rank)
    found = load_latest(run_dir, pytest.fail)
    assert found is not None and found.micro_step in (20, 30)
    assert bits(found.tensors["model"]["w"]) == bits(torch.full((2,), float(found.micro_step)))
    sweep_stale(run_dir)
    assert all(name.startswith("batch-") for name in os.listdir(run_dir / "checkpoints"))


def test_the_death_of_a_rank_costs_no_checkpoint(tmp_path: Path) -> None:
    two_before(tmp_path / "whole")
    counts = operations(shutil.copytree(tmp_path / "whole", tmp_path / "counted"))
    assert counts[0] > counts[1] > 5
    cases = [(0, counts[0] // 2), (0, counts[0] - 8), (1, 2), (1, counts[1] - 1)]
    for rank, at in cases:
        run_dir = shutil.copytree(tmp_path / "whole", tmp_path / f"{rank}-{at}")
        assert_survives(run_dir, rank, "exit after", at)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["exit before", "exit after", "exit within"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_at_any_operation_costs_no_checkpoint(
    tmp_path: Path, rank: int, fault: str
) -> None:
    two_before(tmp_path / "whole")
    traced = shutil.copytree(tmp_path / "whole", tmp_path / "counted")

    def names() -> list[str]:
        with whole_world("cpu", timeout_seconds=60) as world, FaultyDisk().mounted() as disk:
            tiny_save(traced, 30, world)
            return [name for name, _, _ in disk.trace]

    done = run_ranks(2, names)[rank]
    for at, name in enumerate(done):
        if fault == "exit within" and name != "write":
            continue
        run_dir = shutil.copytree(tmp_path / "whole", tmp_path / f"{at}")
        assert_survives(run_dir, rank, fault, at)


# Beside checkpoints of one process


def test_a_run_may_hold_checkpoints_of_both_kinds(tmp_path: Path) -> None:
    save(tmp_path, 10, World())
    saved_on(2, tmp_path, 20)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "batch-000000020"
    save(tmp_path, 30, World())
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["batch-000000020", "batch-000000030"]
    set_aside([tmp_path / "checkpoints" / "batch-000000030"], report=pytest.fail)
    assert_holds(load_checkpoint(latest_checkpoint(tmp_path) or ""), 20, World(), 2)
    # The same position of one rank replaces that of two, and the other way round.
    save(tmp_path, 20, World())
    assert load_checkpoint(tmp_path / "checkpoints" / "batch-000000020").ranks == 1
    saved_on(2, tmp_path, 20)
    assert load_checkpoint(tmp_path / "checkpoints" / "batch-000000020").ranks == 2


def test_an_equal_checkpoint_is_kept(tmp_path: Path) -> None:
    path = saved_on(2, tmp_path, 10)
    inode = path.stat().st_ino
    saved_on(2, tmp_path, 10)
    assert path.stat().st_ino == inode
    assert os.listdir(tmp_path / "checkpoints") == ["batch-000000010"]


def test_one_process_reads_one_chunk_at_a_time(tmp_path: Path) -> None:
    """No tensor is read before it is asked for, and of one that is, one chunk at a time."""
    path = saved_on(2, tmp_path, 10)
    checkpoint = load_checkpoint(path)
    read: list[str] = []
    source: Any = checkpoint.tensors["model"]
    part = source.source.part
    source.source.part = lambda chunk, *box: read.append(chunk.key) or part(chunk, *box)
    dtype, shape = source.form("embed")
    assert (dtype, shape, read) == (torch.float32, (7, 4), [])
    assert bits(checkpoint.tensors["model"]["embed"]) == bits(whole(10)["model"]["embed"])
    assert read == ["embed(0,0)", "embed(4,0)"]


# Crafted files


def signed(path: Path) -> None:
    """Write sizes and hashes of all files into the manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (path / name).read_bytes()
        manifest["files"][name] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_on(2, tmp_path_factory.mktemp("template"), 10)


ODD: tuple[Any, ...] = (None, True, -1, 0, 10**30, 1.5, "x", [], [0], {})


def leaves(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    if path:
        yield path
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    for key, item in items:
        yield from leaves(item, *path, key)


@pytest.mark.parametrize(
    "name",
    [pytest.param("tensors.json", marks=pytest.mark.slow), "state.json", "manifest.json"],
)
def test_any_odd_value_is_refused_in_one_line_or_means_the_same(tmp_path: Path, name: str) -> None:
    def on_rank() -> None:
        with whole_world("cpu", timeout_seconds=60) as world:
            tiny_save(tmp_path, 20, world)

    run_ranks(2, on_rank)
    path = tmp_path / "checkpoints" / "batch-000000020"
    text = (path / name).read_text()
    for *parents, last in list(leaves(json.loads(text))):
        if "counters" in (*parents, last) or "words" in (*parents, last):
            continue  # what a run makes of these is for its parts to check
        for odd in ODD:
            changed = place = json.loads(text)
            for key in parents:
                place = place[key]
            place[last] = odd
            (path / name).write_text(json.dumps(changed))
            if name != "manifest.json":
                signed(path)
            try:
                found = load_checkpoint(path)
            except CheckpointError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
            else:
                assert bits(found.tensors["model"]["w"]) == bits(torch.full((2,), 20.0))


def edit_chunk(field: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(index: dict[str, Any]) -> None:
        index["model"]["embed"]["chunks"][1][field] = value

    return edit


def edit_embed(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["model"]["embed"].update(entries)


def swap_files(index: dict[str, Any]) -> None:
    one, two = index["model"]["embed"]["chunks"]
    one[2], two[2] = two[2], one[2]


CRAFTED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no dtype": (edit_embed(dtype=None), "have one of F64"),
    "unknown dtype": (edit_embed(dtype="C64"), "have one of F64"),
    "another dtype": (edit_embed(dtype="I32"), "hold torch.int32"),
    "negative shape": (edit_embed(shape=[-7, 4]), "have a shape"),
    "shape of floats": (edit_embed(shape=[7.0, 4]), "have a shape"),
    "shape of booleans": (edit_embed(shape=[True, 4]), "have a shape"),
    "huge shape": (edit_embed(shape=[2**62, 2**62]), "have a shape"),
    "many dimensions": (edit_embed(shape=[1] * 65), "have a shape"),
    "larger shape": (edit_embed(shape=[8, 4]), "cover the 32 elements"),
    "smaller shape": (edit_embed(shape=[6, 4]), "chunks inside"),
    "another rank": (edit_embed(shape=[7, 4, 1]), "chunks of 3 dimensions"),
    "no chunks": (edit_embed(chunks=[]), "cover the 28 elements"),
    "chunks of text": (edit_embed(chunks="x"), "list the chunks"),
    "a chunk of text": (edit_embed(chunks=["x"]), "offsets, sizes, file and key"),
    "one more entry": (edit_embed(extra=1), "have dtype, shape and chunks"),
    "an entry of text": (lambda index: index["model"].update(embed="x"), "dtype, shape and"),
    "a group of text": (lambda index: index.update(model="x"), "by the name of a group"),
    "an unknown group name": (lambda index: index.update({"../x": {}}), "by the name of a group"),
    "overlapping": (edit_chunk(0, [3, 0]), "do not overlap"),
    "past the end": (edit_chunk(0, [5, 0]), "chunks inside"),
    "negative offset": (edit_chunk(0, [-1, 0]), "offsets, sizes"),
    "other sizes": (edit_chunk(1, [3, 3]), "cover the 28 elements"),
    "no sizes": (edit_chunk(1, None), "offsets, sizes"),
    "empty chunk": (edit_chunk(1, [0, 4]), "chunks inside"),
    "outside": (edit_chunk(2, "../model.00001.safetensors"), "name files of model"),
    "absolute": (edit_chunk(2, "/etc/passwd"), "name files of model"),
    "of another group": (edit_chunk(2, "ema.00001.safetensors"), "name files of model"),
    "not in the manifest": (edit_chunk(2, "model.00007.safetensors"), "name files of model"),
    "no file": (edit_chunk(2, 3), "offsets, sizes"),
    "another key": (edit_chunk(3, "nothing"), "hold"),
    "a key twice": (edit_chunk(3, "half(3,0,0)"), "name every chunk once"),
    "swapped files": (swap_files, "hold"),
    "a tensor left out": (lambda index: index["model"].pop("embed"), "hold nothing as"),
    "a group left out": (lambda index: index.pop("ema"), "hold nothing as"),
    "a rank that is none": (
        lambda index: index["rng"].update({"2/torch": index["rng"].pop("1/torch")}),
        "by one of 2 processes",
    ),
    "no rank": (
        lambda index: index["rng"].update({"torch": index["rng"].pop("1/torch")}),
        "by one of 2 processes",
    ),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_index_is_refused_in_one_line(template: Path, tmp_path: Path, case: str) -> None:
    path = shutil.copytree(template, tmp_path / template.name)
    edit, words = CRAFTED[case]
    index = json.loads((path / "tensors.json").read_text())
    edit(index)
    (path / "tensors.json").write_text(json.dumps(index))
    signed(path)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path)
    message = str(refused.value)
    assert words in message and "\n" not in message and len(message) < 1000


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, '{"model": ' + "9" * 5000 + "}"]
)
def test_an_index_that_is_none_is_refused(template: Path, tmp_path: Path, text: str) -> None:
    path = shutil.copytree(template, tmp_path / template.name)
    (path / "tensors.json").write_text(text)
    signed(path)
    with pytest.raises(CheckpointError, match=r"tensors\.json must hold"):
        load_checkpoint(path)


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "no ranks": ({"ranks": []}, "values of each process"),
    "ranks of text": ({"ranks": ["x", "y"]}, "of each process"),
    "another state": ({"state": 3}, "hold an object as state"),
    "an entry of all": ({"ranks": [{"counters": 1}]}, "of each process"),
    "names of numbers": ({"per_rank": [1]}, "list the names"),
    "another position": ({"micro_step": 11}, "be named by its micro-batches"),
    "fewer ranks": ({"ranks": [{}]}, "by one of 1 processes"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_crafted_state_is_refused_in_one_line(template: Path, tmp_path: Path, case: str) -> None:
    path = shutil.copytree(template, tmp_path / template.name)
    entries, words = STATES[case]
    state = json.loads((path / "state.json").read_text()) | entries
    (path / "state.json").write_text(json.dumps(state))
    signed(path)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.1.safetensors", "../x.safetensors"])
def test_files_of_other_names_are_refused(template: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(template, tmp_path / template.name)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("model.00000.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"list state\.json, tensors\.json and"):
        load_checkpoint(path)


def test_a_manifest_without_an_index_is_refused(template: Path, tmp_path: Path) -> None:
    path = shutil.copytree(template, tmp_path / template.name)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["tensors.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"list tensors\.json in its manifest"):
        load_checkpoint(path)
