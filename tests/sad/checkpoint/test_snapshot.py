"""A copy on the host: the same files as from the live tensors, and nothing shared with them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faulty_disk import FaultyDisk, tree
from torch import Tensor

from sad.checkpoint import snapshot as snapshot_module
from sad.checkpoint.snapshot import (
    WRITER,
    HostBuffers,
    Snapshot,
    at_once,
    group_bytes,
    in_thread,
    snapshot,
    write,
)
from sad.checkpoint.store import load_checkpoint, save_checkpoint
from sad.checkpoint.tensor_files import file_order, safetensors_chunks

STATE: dict[str, Any] = {"seen": [1, 2], "nested": {"loss": float("inf")}}


def groups() -> dict[str, dict[str, Tensor]]:
    """Every width, odd sizes, other strides, nothing at all, a number, a group without tensors."""
    return {
        "model": {
            "a": torch.randn(5, 3).t(),
            "b": torch.arange(7, dtype=torch.uint8),
            "c": torch.randn(3).bfloat16(),
            "d": torch.randn(2, 4, dtype=torch.float64)[:, ::2],
            "e": torch.nn.Parameter(torch.randn(4)),
            "none": torch.empty(0, 3),
            "number": torch.tensor(2.5),
            "flags": torch.tensor([True, False, True]),
        },
        "grads": {},
    }


def address_of(taken: Snapshot) -> int:
    """Of the copy's first group."""
    named = taken.tensors["model"]
    return named[file_order(named)[0]].data_ptr()


def test_the_files_have_the_bytes_of_the_live_tensors(tmp_path: Path) -> None:
    tensors = groups()
    live = save_checkpoint(tmp_path / "live", 7, STATE, tensors, save_total_limit=2)
    taken = snapshot(7, STATE, tensors, HostBuffers())
    copied = write(tmp_path / "copied", taken, save_total_limit=2)
    assert copied.name == live.name
    assert tree(copied) == tree(live)


def test_what_lies_together_in_memory_is_one_piece_of_the_file() -> None:
    """Whatever was left out between, and with the same bytes as from tensors that lie apart."""
    taken = snapshot(7, STATE, groups(), HostBuffers())
    header, *pieces = safetensors_chunks(taken.tensors["model"])
    expected = sum(tensor.nbytes for tensor in groups()["model"].values())
    assert len(header) and [len(piece) for piece in pieces] == [expected]
    apart = {name: tensor.clone() for name, tensor in taken.tensors["model"].items()}
    assert b"".join(safetensors_chunks(apart)) == bytes(header) + bytes(pieces[0])
    some = {name: tensor for name, tensor in taken.tensors["model"].items() if name != "c"}
    assert len(list(safetensors_chunks(some))) == 3  # around what was left out


def test_what_changes_afterwards_is_not_in_it(tmp_path: Path) -> None:
    tensors, state = groups(), {"seen": [1, 2]}
    before = {name: tensor.detach().clone() for name, tensor in tensors["model"].items()}
    taken = snapshot(7, state, tensors, HostBuffers())
    with torch.no_grad():
        for tensor in tensors["model"].values():
            tensor.zero_()
    state["seen"].append(3)
    saved = load_checkpoint(write(tmp_path, taken, save_total_limit=2))
    assert saved.state == {"seen": [1, 2]}
    for name, tensor in before.items():
        assert torch.equal(saved.tensors["model"][name], tensor), name


def test_buffers_are_used_again_and_grow() -> None:
    buffers = HostBuffers()
    first, second = (
        snapshot(i, {}, {"model": {"a": torch.full((1000,), i)}}, buffers) for i in range(2)
    )
    address = address_of(first)
    assert address_of(second) == address
    assert second.tensors["model"]["a"].eq(1).all()
    smaller = snapshot(2, {}, {"model": {"a": torch.ones(10)}}, buffers)
    assert address_of(smaller) == address
    larger = snapshot(3, {}, {"model": {"a": torch.ones(5000)}}, buffers)
    assert larger.tensors["model"]["a"].sum() == 5000
    buffers.clear()
    assert snapshot(4, {}, groups(), buffers).tensors["grads"] == {}


def test_prepared_buffers_are_those_that_are_used() -> None:
    buffers, tensors = HostBuffers(), groups()
    sizes = group_bytes(tensors)
    assert sizes["grads"] == 0 and sizes["model"] == sum(
        t.nbytes for t in tensors["model"].values()
    )
    buffers.prepare(sizes)
    address = buffers.reserve("model", sizes["model"]).data_ptr()
    assert address_of(snapshot(0, {}, tensors, buffers)) == address


def test_tensors_that_share_memory_are_refused_before_they_are_two() -> None:
    weight = torch.ones(4)
    with pytest.raises(ValueError, match="must not share memory"):
        snapshot(0, {}, {"model": {"a": weight, "b": weight}}, HostBuffers())
    with pytest.raises(TypeError, match="must be a plain None"):
        snapshot(0, {"a": (1, 2)}, {}, HostBuffers())


def test_a_group_is_written_as_one_piece(tmp_path: Path) -> None:
    """A thread that comes back to Python for each of a thousand tensors holds up training."""
    tensors = {"model": {f"{i:03d}": torch.full((3,), i) for i in range(200)}}
    taken = snapshot(0, {}, tensors, HostBuffers())
    with FaultyDisk().mounted() as disk:
        write(tmp_path, taken, save_total_limit=2)
    writes = [arguments for name, arguments, _ in disk.trace if name == "write"]
    assert len(writes) == 1 + 2 + 1  # state.json; header and tensors; manifest.json


def test_a_thread_has_the_result_or_the_error() -> None:
    names: list[str] = []

    def work() -> int:
        names.append(threading.current_thread().name)
        return 3

    def fail() -> int:
        raise KeyboardInterrupt

    assert in_thread(work).result() == at_once(work).result() == 3
    assert names == [WRITER, threading.current_thread().name]
    for run in (in_thread, at_once):
        with pytest.raises(KeyboardInterrupt):
            run(fail).result()


def test_without_threads_it_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(snapshot_module.Thread, "start", start)
    future = in_thread(lambda: 3)
    assert future.done() and future.result() == 3
