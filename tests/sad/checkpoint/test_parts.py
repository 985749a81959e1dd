"""The parts of a checkpoint: what one saves it is given back, and what lacks one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sad.checkpoint.parts import (
    Constant,
    Entries,
    Entry,
    NamedTensors,
    Numbers,
    Part,
    PartState,
    RandomGenerators,
    capture_parts,
    restore_parts,
)
from sad.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from sad.errors import CheckpointError


class Toy:
    """Torch's pair of methods around some state."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


def through_disk(folder: Path, parts: list[Part]) -> Checkpoint:
    state, tensors = capture_parts(parts)
    return load_checkpoint(save_checkpoint(folder, 1, state, tensors, save_total_limit=2))


def test_every_kind_comes_back(tmp_path: Path) -> None:
    def parts(fill: float) -> tuple[list[Part], list[Any]]:
        toy, flat, mixed = Toy(a=fill), Toy(b=fill), Toy(c=fill, t={"x": torch.full((2,), fill)})
        named = {"w": torch.full((3,), fill)}
        numbers = torch.full((2,), fill, dtype=torch.float64)
        made: list[Part] = [
            Constant("constant", fill),
            Entry("toy", toy),
            Entry("mixed", mixed, tensors="t"),
            Entries(flat),
            Numbers("numbers", numbers),
            NamedTensors("named", named),
        ]
        return made, [toy.state_dict, flat.state_dict, mixed.state_dict, named, numbers]

    saved, _ = parts(0.1)
    live, (toy, flat, mixed, named, numbers) = parts(0.7)
    checkpoint = through_disk(tmp_path, saved)
    assert list(checkpoint.state) == ["constant", "toy", "mixed", "b", "numbers"]
    assert sorted(checkpoint.tensors) == ["mixed", "named"]
    restore_parts(live, checkpoint)
    assert toy() == {"a": 0.1} and flat() == {"b": 0.1} and mixed()["c"] == 0.1
    assert mixed()["t"]["x"].tolist() == torch.full((2,), 0.1).tolist()
    assert named["w"].tolist() == torch.full((3,), 0.1).tolist() and numbers.tolist() == [0.1, 0.1]


def test_what_a_run_lacks_is_saved_as_nothing_and_stays(tmp_path: Path) -> None:
    """On either side: the configuration was allowed to change."""
    with_it, without = Toy(a=1, t={"x": torch.ones(1)}), [Entry("toy", None, tensors="t")]
    empty = through_disk(tmp_path / "without", list(without))
    assert empty.state == {"toy": None} and empty.tensors == {"toy": {}}
    restore_parts([Entry("toy", with_it, tensors="t")], empty, changed=True)
    assert with_it.state["a"] == 1
    full = through_disk(tmp_path / "with", [Entry("toy", with_it, tensors="t")])
    restore_parts(without, full, changed=True)


def test_a_part_without_its_key_is_refused_before_anything_changes(tmp_path: Path) -> None:
    old, new = Toy(a=1), Toy(a=2)
    checkpoint = through_disk(tmp_path, [Entry("toy", old)])
    for other, lacking in (
        (Entry("other", Toy()), r"'other' in state\.json"),
        (NamedTensors("weights", {"w": torch.ones(1)}), r"weights\.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=rf"must hold {lacking}, got one without; .*new"):
            restore_parts([Entry("toy", new), other], checkpoint)
        assert new.state == {"a": 2}


def test_a_part_cannot_be_half_added() -> None:
    class SavedOnly:
        def state_dict(self) -> dict[str, Any]:
            return {}

    class HalfPart(Part):
        def state_dict(self) -> PartState:
            return PartState({"half": 1})

    for view in (lambda: Entry("x", SavedOnly()), lambda: Entries(SavedOnly())):  # pyright: ignore
        with pytest.raises(TypeError, match="saved and not restored"):
            view()
    with pytest.raises(TypeError, match="load_state_dict"):
        HalfPart()  # pyright: ignore


def test_two_parts_with_one_name_are_refused() -> None:
    toy = Toy(x=1)
    with pytest.raises(ValueError, match="entry must belong to one part, got two with 'x'"):
        capture_parts([Entry("x", toy), Entries(toy)])
    tensors = {"w": torch.ones(1)}
    with pytest.raises(ValueError, match="tensor group must belong to one part"):
        capture_parts([NamedTensors("x", tensors), NamedTensors("x", tensors)])


def test_numbers_of_another_shape_are_refused(tmp_path: Path) -> None:
    checkpoint = through_disk(tmp_path, [Numbers("sums", torch.zeros(3))])
    with pytest.raises(
        CheckpointError, match=r"sums must be a list of 2 items, got a list of 3 items; "
    ):
        restore_parts([Numbers("sums", torch.zeros(2))], checkpoint)


def test_generators_are_restored_after_all_others(tmp_path: Path) -> None:
    class Drawing(Toy):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            torch.rand(3)

    parts: list[Part] = [RandomGenerators("rng"), Entry("drawing", Drawing())]
    checkpoint = through_disk(tmp_path, parts)
    expected = torch.rand(4)
    restore_parts(parts, checkpoint)
    assert torch.equal(torch.rand(4), expected)
