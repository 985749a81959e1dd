"""The files of a checkpoint: tensors in the safetensors format, written as a stream and read one at
a time, and JSON."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sad.checkpoint import atomic_files as files
from sad.errors import CheckpointError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes a checkpoint holds, as the safetensors format spells them."""

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def file_order(named: Mapping[str, Tensor]) -> list[str]:
    """Names in the order in which a file holds their tensors: wide dtypes first."""
    return sorted(named, key=lambda name: (-named[name].element_size(), name))


def safetensors_chunks(
    named: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[files.Chunk]:
    """The safetensors format, one tensor at a time; those that lie in host memory one after the
    other, as in a snapshot, as one piece.

    A writer of our own because the bytes must pass through ``files.OPERATIONS``, where faults are
    injected and files forced to disk, and are hashed on the way; the library's ``save_file`` opens
    the file itself. It takes contiguous tensors only, and copies all tensors of a device to the
    host before it writes the first (tensors on the CPU it writes from where they lie); ``save``
    returns the whole file as bytes and holds it twice meanwhile (0.8.0: 763 MiB for 381 MiB).

    The format: length of the header as a little-endian u64, the header as JSON padded with spaces
    to 8 bytes, then the tensors without gaps; wide dtypes first, so that every one is aligned.
    ``metadata`` is what the header says besides.
    """
    order = file_order(named)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = named[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    piece: list[Tensor] = []
    for tensor in (named[name] for name in order if named[name].numel()):
        if piece and not _follows(piece[-1], tensor):
            yield _joined(piece)
            piece = []
        piece.append(tensor)
    if piece:
        yield _joined(piece)


def _follows(before: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor begins in host memory where the one before it ends."""
    return (
        before.device.type == tensor.device.type == "cpu"
        and before.is_contiguous()
        and tensor.is_contiguous()
        and before.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        and before.data_ptr() + before.nbytes == tensor.data_ptr()
    )


def _joined(piece: Sequence[Tensor]) -> memoryview:
    """The bytes of tensors of which each follows the one before."""
    first = piece[0]
    if len(piece) == 1:
        return _raw(first)
    storage: Any = first.untyped_storage()
    begin, size = first.data_ptr() - storage.data_ptr(), sum(tensor.nbytes for tensor in piece)
    return torch.empty(0, dtype=torch.uint8).set_(storage, begin, (size,), (1,)).numpy().data


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class FileTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read when it is asked for.

    Whoever drops a tensor drops its memory; ``load_file`` maps the whole file for as long as one of
    its tensors is in use, and all that was read of it counts as memory of the process. The file is
    kept open, so that tensors outlive its name.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt"):  # the library checks the format
            pass
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        length = int.from_bytes(self._read(0, 8), "little")
        self._header: dict[str, Any] = json.loads(self._read(8, length))
        self.metadata: dict[str, str] = self._header.pop("__metadata__", {})
        self._start = 8 + length

    def __getitem__(self, name: str) -> Tensor:
        entry = self._header[name]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        content = self._read(self._start + begin, end - begin)
        return torch.frombuffer(content, dtype=dtype).reshape(shape)

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor, which is not read for that."""
        entry = self._header[name]
        return DTYPES[entry["dtype"]], tuple(entry["shape"])

    def part(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box of a tensor that begins at ``offsets``; of the file, whole rows are read."""
        dtype, shape = self.form(name)
        if not shape:
            return self[name]
        if not math.prod(sizes):
            return torch.empty(tuple(sizes), dtype=dtype)
        row = math.prod(shape[1:]) * dtype.itemsize
        begin = self._start + self._header[name]["data_offsets"][0] + offsets[0] * row
        content = self._read(begin, sizes[0] * row)
        tensor = torch.frombuffer(content, dtype=dtype).reshape(sizes[0], *shape[1:])
        for dim in range(1, len(shape)):
            tensor = tensor.narrow(dim, offsets[dim], sizes[dim])
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._header

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def _read(self, offset: int, size: int) -> bytearray:
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:  # one call reads 2 GiB at most
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise OSError(f"a file of tensors ended {size - done} bytes early")
            done += count
        return content


def read_tensors(path: Path) -> FileTensors:
    """Open a file of tensors; ``CheckpointError`` for one of another format or other dtypes."""
    try:
        tensors = FileTensors(path)
        for name in tensors:
            tensors.form(name)
    except SafetensorError as error:
        raise unusable(path, "hold tensors in the safetensors format", str(error)) from error
    except KeyError as error:
        raise unusable(path, f"hold tensors of {', '.join(DTYPES)}", str(error)) from error
    return tensors


def read_json(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """The object with ``keys`` in a file of a checkpoint; ``CheckpointError`` without one."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise unusable(path, "hold JSON", repr(error)) from error
    if type(content) is not dict or not all(key in content for key in keys):
        raise unusable(path, f"hold an object with {' and '.join(keys)}", f"{str(content)[:80]}")
    return content


def unusable(path: Path, expectation: str, value: str) -> CheckpointError:
    """The error of a checkpoint, or a file of one, that is not as it must be."""
    return CheckpointError(
        f"checkpoint {path} must {expectation}, got {value}; take another checkpoint"
    )
