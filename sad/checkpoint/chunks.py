"""Tensors that several processes saved, each its own chunks: where these lie, and how to read them.

``tensors.json`` says of every tensor, by group and name, its dtype, its global shape and its
chunks: the offsets at which each begins, its sizes, its file and its key there::

    {"model": {"lm_head.weight": {"dtype": "F32", "shape": [512, 32], "chunks": [
        [[0, 0], [256, 32], "model.00000.safetensors", "lm_head.weight(0,0)"],
        [[256, 0], [256, 32], "model.00001.safetensors", "lm_head.weight(256,0)"]]}}}

The chunks of a tensor cover it exactly, and none is empty.
"""

from __future__ import annotations

import math
import re
from bisect import insort
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sad.checkpoint import atomic_files as files
from sad.checkpoint.tensor_files import (
    DTYPE_NAMES,
    DTYPES,
    FileTensors,
    read_json,
    read_tensors,
    unusable,
)
from sad.errors import quoted

INDEX = "tensors.json"
"""The file that says where every tensor lies."""

SHARD_NAME = re.compile(r"(?P<group>[a-z][a-z0-9_]*)\.(?P<rank>\d{5,})\.safetensors")
"""A file of the chunks that one process wrote of a group."""

_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")
_DIMENSIONS = 64  # torch's limit
_OPEN_FILES = 64


class Chunk(NamedTuple):
    """A box of a tensor, and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


class ChunkedTensor(NamedTuple):
    """A tensor in chunks, which cover it exactly."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of the whole
    chunks: tuple[Chunk, ...]


Index = Mapping[str, Mapping[str, ChunkedTensor]]
"""Group -> name -> tensor."""


def shard_name(group: str, rank: int) -> str:
    """The file of a group's chunks that a process writes."""
    return f"{group}.{rank:05d}.safetensors"


def chunk_key(name: str, offsets: Sequence[int]) -> str:
    """The key of a chunk in its file.

    The bracket sorts before what names consist of: keys have the order of names.
    """
    return f"{name}({','.join(map(str, offsets))})"


def index_as_json(index: Index) -> dict[str, Any]:
    """The content of ``tensors.json``."""
    return {
        group: {
            name: {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "chunks": [
                    [list(chunk.offsets), list(chunk.sizes), chunk.file, chunk.key]
                    for chunk in tensor.chunks
                ],
            }
            for name, tensor in named.items()
        }
        for group, named in index.items()
    }


# Reading tensors.json


def read_index(path: Path, names: Collection[str]) -> Index:
    """Read ``tensors.json`` of the checkpoint ``path``, whose files are ``names``.

    Raises ``CheckpointError`` unless every tensor is of a known dtype and covered exactly by chunks
    in files of its own group, each in a place of its own. What the files hold is for
    ``check_shard`` to compare.
    """
    file = path / INDEX
    index: dict[str, dict[str, ChunkedTensor]] = {}
    places: set[tuple[str, str]] = set()
    for group, named in read_json(file, ()).items():
        if not _GROUP_NAME.fullmatch(group) or type(named) is not dict:
            raise unusable(file, "hold objects by the name of a group", quoted(group))
        index[group] = {}
        for name, entry in named.items():
            tensor = index[group][name] = _tensor(file, f"{group}/{name}", entry)
            for chunk in tensor.chunks:
                _require_place(file, group, chunk, names)
                if chunk[2:] in places:
                    raise unusable(file, "name every chunk once", quoted(chunk.key))
                places.add((chunk.file, chunk.key))
    return index


def _tensor(file: Path, name: str, entry: Any) -> ChunkedTensor:
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "chunks"}:
        raise unusable(file, f"have dtype, shape and chunks of {quoted(name)}", quoted(entry))
    dtype, shape, chunks = entry["dtype"], entry["shape"], entry["chunks"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise unusable(file, f"have one of {', '.join(DTYPES)} for {quoted(name)}", quoted(dtype))
    if not _is_shape(shape):
        raise unusable(file, f"have a shape of {quoted(name)}", quoted(shape))
    if type(chunks) is not list:
        raise unusable(file, f"list the chunks of {quoted(name)}", quoted(chunks))
    tensor = ChunkedTensor(
        DTYPES[dtype], tuple(shape), tuple(_chunk(file, name, chunk) for chunk in chunks)
    )
    _require_tiled(file, name, tensor)
    return tensor


def _is_shape(value: Any) -> bool:
    """Whether it is a list of sizes that a tensor can have."""
    return (
        type(value) is list
        and len(value) <= _DIMENSIONS
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
        and math.prod(max(size, 1) for size in value) < 2**60
    )


def _chunk(file: Path, name: str, value: Any) -> Chunk:
    if (
        type(value) is not list
        or len(value) != 4
        or not (_is_shape(value[0]) and _is_shape(value[1]))
        or not (type(value[2]) is type(value[3]) is str)
    ):
        raise unusable(
            file, f"have offsets, sizes, file and key of a chunk of {quoted(name)}", quoted(value)
        )
    offsets, sizes, where, key = value
    return Chunk(tuple(offsets), tuple(sizes), where, key)


def _require_place(file: Path, group: str, chunk: Chunk, names: Collection[str]) -> None:
    named = SHARD_NAME.fullmatch(chunk.file)
    if named is None or named["group"] != group or chunk.file not in names:
        raise unusable(file, f"name files of {group} that the manifest lists", quoted(chunk.file))


def _require_tiled(file: Path, name: str, tensor: ChunkedTensor) -> None:
    """Refuse chunks that leave something out, reach past the tensor, are empty or overlap."""
    shape, chunks = tensor.shape, tensor.chunks
    for chunk in chunks:
        if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape):
            raise unusable(
                file, f"have chunks of {len(shape)} dimensions for {quoted(name)}", _box(chunk)
            )
        ends = (o + s for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        inside = all(end <= size for end, size in zip(ends, shape, strict=True))
        if not inside or not all(chunk.sizes):
            raise unusable(file, f"have chunks inside of {quoted(name)} {shape}", _box(chunk))
    covered, elements = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
    if covered != elements:
        raise unusable(
            file,
            f"have chunks that cover the {elements:,} elements of {quoted(name)}",
            f"chunks of {covered:,}",
        )
    _require_apart(file, name, tensor)


def _require_apart(file: Path, name: str, tensor: ChunkedTensor) -> None:
    """Refuse overlapping chunks: a sweep along the longest dimension compares neighbours only."""
    if len(tensor.chunks) < 2:
        return
    dim = max(range(len(tensor.shape)), key=lambda d: tensor.shape[d])
    active: list[tuple[int, int]] = []  # end along dim, number of the chunk
    chunks = sorted(tensor.chunks, key=lambda chunk: chunk.offsets[dim])
    for i, chunk in enumerate(chunks):
        while active and active[0][0] <= chunk.offsets[dim]:
            active.pop(0)
        for _, j in active:
            if _overlap(chunk, chunks[j]):
                raise unusable(
                    file,
                    f"have chunks of {quoted(name)} that do not overlap",
                    f"{_box(chunks[j])} and {_box(chunk)}",
                )
        insort(active, (chunk.offsets[dim] + chunk.sizes[dim], i))


def _overlap(one: Chunk, other: Chunk) -> bool:
    return all(
        a < b + m and b < a + n
        for a, n, b, m in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )


def _box(chunk: Chunk) -> str:
    return quoted(f"{list(chunk.offsets)} + {list(chunk.sizes)}").strip("'")


def check_shards(path: Path, index: Index, names: Iterable[str]) -> None:
    """Raise ``CheckpointError`` unless these files hold exactly the chunks that ``index`` names.

    Only their headers are read.
    """
    expected: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {n: {} for n in names}
    for named in index.values():
        for tensor in named.values():
            for chunk in tensor.chunks:
                if chunk.file in expected:
                    expected[chunk.file][chunk.key] = tensor.dtype, chunk.sizes
    for name, forms in expected.items():
        found = read_tensors(path / name)
        for key in found.keys() | forms.keys():
            form = found.form(key) if key in found else None
            if form != forms.get(key):
                raise unusable(
                    path / name,
                    f"hold {_form(forms.get(key))} as {quoted(key)}, as {INDEX} says",
                    _form(form),
                )


def _form(form: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "nothing" if form is None else f"{form[0]} {form[1]}"


# Reading tensors


class ShardFiles:
    """The files of tensors in a checkpoint, opened when they are needed: there may be thousands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open = lru_cache(_OPEN_FILES)(lambda name: read_tensors(path / name))

    def part(self, chunk: Chunk, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box of a chunk that begins at ``offsets``, counted from the chunk's beginning."""
        try:
            return self._open(chunk.file).part(chunk.key, offsets, sizes)
        except OSError as error:
            raise unusable(self.path / chunk.file, "be readable", files.describe(error)) from error


class ChunkedTensors(Mapping[str, Tensor]):
    """Tensors by name, each put together from its chunks when it is asked for.

    While one is put together, it and one chunk of it are in memory.
    """

    def __init__(self, source: ShardFiles, tensors: Mapping[str, ChunkedTensor]) -> None:
        self.source = source
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if len(tensor.chunks) == 1:
            return self._read(tensor.chunks[0])
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for chunk in tensor.chunks:
            part = whole
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                part = part.narrow(dim, offset, size)
            part.copy_(self._read(chunk))
        return whole

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor, which is not read for that."""
        tensor = self.tensors[name]
        return tensor.dtype, tensor.shape

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def _read(self, chunk: Chunk) -> Tensor:
        return self.source.part(chunk, [0] * len(chunk.sizes), chunk.sizes)


def in_one_chunk(file: str, tensors: FileTensors) -> dict[str, ChunkedTensor]:
    """The tensors of a file of whole ones, each as its only chunk."""
    named = {}
    for name in tensors:
        dtype, shape = tensors.form(name)
        whole = Chunk((0,) * len(shape), shape, file, name)
        named[name] = ChunkedTensor(dtype, shape, (whole,) if math.prod(shape) else ())
    return named
