"""Which tensors each file of a cache must hold: names, dtypes and shapes, and what they may say.

A hash says that bytes are those that were written. Another program may have
written them, or somebody who meant harm: a run asks for the form of every file before it trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sad.checkpoint.tensor_files import FileTensors
from sad.errors import UnfitError, quoted
from sad.teachers.cache.facts import CacheFacts
from sad.teachers.cache.files import AGAIN, LENGTHS, Shards, open_shard, open_tensors

Forms = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def open_whole_shard(
    folder: Path, facts: CacheFacts, shards: Shards, number: int, *, verify: bool
) -> tuple[FileTensors, Tensor]:
    """A shard that holds what it must, and the ``lengths`` of its rows: as ``open_shard``.

    Raises ``UnfitError`` for one with other tensors, or with lengths that do not add up to them.
    """
    path = folder / shards.name(number)
    tensors = open_shard(path, facts.plan, verify=verify)
    rows = len(shards.of(number))
    _require_form(path, tensors, {LENGTHS: (torch.int32, (rows,))})
    lengths = tensors[LENGTHS].to(torch.int64)
    if bool((lengths < 0).any()) or bool((lengths > facts.max_length).any()):
        raise UnfitError(
            f"{path} must hold rows of 0 to {facts.max_length} positions, got "
            f"{int(lengths.min())} to {int(lengths.max())}; {AGAIN}"
        )
    forms = record_forms(facts, shards, int(lengths.sum()))
    _require_form(path, tensors, {LENGTHS: (torch.int32, (rows,)), **forms}, only=True)
    return tensors, lengths


def record_forms(facts: CacheFacts, shards: Shards, positions: int) -> Forms:
    """The tensors of so many records."""
    if shards.kind == "hidden":
        assert facts.head is not None
        shape = (positions, facts.head.width)
        if facts.codec == "bf16":
            return {"hidden": (torch.bfloat16, shape)}
        return {"hidden": (torch.int8, shape), "scale": (torch.float32, (positions,))}
    if shards.kind == "likelihood":
        return {"log_prob": (torch.float32, (positions,))}
    assert facts.top_k is not None
    forms: Forms = {"ids_lo": (torch.uint16, (positions, facts.top_k))}
    if facts.num_ids > 2**16:
        forms["ids_hi"] = torch.uint8, (positions, (facts.top_k + 1) // 2)
    forms["logw"] = torch.uint16, (positions, facts.top_k)
    if shards.kind == "topk":
        forms["tail"] = torch.float32, (positions, len(facts.tail_temperatures))
    return forms


def open_head(path: Path, facts: CacheFacts) -> FileTensors:
    """The teacher's head: a ``weight`` [V, D] with at least the tokenizer's ids, perhaps a ``bias``
    [V]."""
    assert facts.head is not None
    tensors = open_tensors(path)
    weight = _form(tensors, "weight")
    rows = weight[1][0] if weight and len(weight[1]) == 2 else 0
    fits = (
        weight is not None
        and weight[0].is_floating_point
        and weight[1] == (rows, facts.head.width)
        and rows >= facts.valid_vocab
        and ("bias" not in tensors or _shape_of(tensors, "bias") == (rows,))
    )
    if not fits:
        raise UnfitError(
            f"{path} must hold a weight [{facts.valid_vocab} or more, {facts.head.width}], and "
            f"perhaps a bias, got {said_tensors(tensors)}; {AGAIN}"
        )
    return tensors


def require_basis(path: Path, tensors: FileTensors, facts: CacheFacts) -> None:
    """Raise ``UnfitError`` unless a basis of int8 is as wide as the hidden states."""
    assert facts.head is not None
    width = (facts.head.width,)
    _require_form(
        path,
        tensors,
        {
            "mean": (torch.float32, width),
            "permutation": (torch.int32, width),
            "signs": (torch.int8, width),
        },
    )


def require_decoded(path: Path, record: Mapping[str, Tensor], ids: Tensor, vocab: int) -> None:
    """Raise ``UnfitError`` unless decoded ids lie below ``vocab`` and tails in [0, 1]."""
    if ids.numel() and int(ids.max()) >= vocab:
        raise UnfitError(f"{path} must hold ids below {vocab:,}, got {int(ids.max()):,}; {AGAIN}")
    tail = record.get("tail")
    if tail is not None and not bool(((tail >= 0) & (tail <= 1)).all()):  # NaN compares false
        raise UnfitError(f"{path} must hold tails from 0 to 1, got another mass; {AGAIN}")


def _form(tensors: FileTensors, name: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """Dtype and shape; None for a tensor that is not there or of a dtype that is not read."""
    try:
        return tensors.form(name)
    except KeyError:
        return None


def _shape_of(tensors: FileTensors, name: str) -> tuple[int, ...] | None:
    form = _form(tensors, name)
    return None if form is None or not form[0].is_floating_point else form[1]


def _require_form(path: Path, tensors: FileTensors, forms: Forms, *, only: bool = False) -> None:
    same = all(_form(tensors, name) == form for name, form in forms.items())
    if same and not (only and tensors.keys() - forms.keys()):
        return
    asked = ", ".join(f"{name} {_shape(*form)}" for name, form in forms.items())
    raise UnfitError(f"{path} must hold {asked}, got {said_tensors(tensors)}; {AGAIN}")


def said_tensors(tensors: FileTensors) -> str:
    """What a file holds, in words: some of its tensors with dtype and shape."""
    found = []
    for name in list(tensors)[:6]:
        form = _form(tensors, name)
        found.append(f"{quoted(name, 20)} {'of another dtype' if form is None else _shape(*form)}")
    return ", ".join(found) or "nothing"


def _shape(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
