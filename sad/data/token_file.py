"""A stream of tokens on disk, read block by block against checksums.

A run reads its packed rows for days, and anyone may write to the file meanwhile. A memory map would
show what they write, and end the process with SIGBUS where they have cut it. So blocks are read
through a descriptor, and a checksum of each, computed when the file was opened and its hash
verified, is compared every time.
"""

from __future__ import annotations

import hashlib
import os
import weakref
import zlib
from pathlib import Path

import numpy as np

from sad.errors import UnfitError

_BLOCK = 1 << 14
"""Bytes of a block: about one row, and 26 MB of checksums for 100 GB of tokens."""


class TokenFile:
    """The tokens of a file, indexed by their places in the stream.

    ``digest`` is the BLAKE2b hash, of 16 bytes, that the whole file must have. A file that is
    replaced under its name goes on being read as it was.

    Raises ``ValueError`` for another hash and ``OSError`` for a file that cannot be read.
    """

    def __init__(self, path: Path, dtype: str, digest: str) -> None:
        self.path = path
        self._dtype = np.dtype(dtype)
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._checksums, size = self._verify(digest)
        self._tokens = size // self._dtype.itemsize
        self._per_block = _BLOCK // self._dtype.itemsize

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        """The tokens at these places, in the shape of ``at``.

        The last axis is read from its least place to its greatest. Raises ``UnfitError`` if the
        file is no longer what was opened.
        """
        if not at.size:
            return np.zeros(at.shape, dtype=self._dtype)
        first = at.min(axis=-1, keepdims=True) // self._per_block
        last = at.max(axis=-1, keepdims=True) // self._per_block
        spans = zip(first.ravel().tolist(), last.ravel().tolist(), strict=True)
        blocks = sorted({block for low, high in spans for block in range(low, high + 1)})
        tokens = np.concatenate([self._block(block) for block in blocks])
        # The blocks of a span follow each other in ``tokens``; only the last may be short.
        begins = np.searchsorted(blocks, first) * self._per_block
        return tokens[begins + (at - first * self._per_block)]

    def _block(self, number: int) -> np.ndarray:
        try:
            content = os.pread(self._descriptor, _BLOCK, number * _BLOCK)
        except OSError as error:
            raise self._changed(f"{error.strerror or error}") from error
        if zlib.crc32(content) != self._checksums[number]:
            raise self._changed(f"other bytes from {number * _BLOCK:,} on")
        return np.frombuffer(content, dtype=self._dtype)

    def _changed(self, found: str) -> UnfitError:
        return UnfitError(
            f"packed rows must stay as they are while a run reads them, got {found} in "
            f"{self.path}; resume the run, which packs them again, and leave data.cache_dir alone"
        )

    def _verify(self, expected: str) -> tuple[np.ndarray, int]:
        """The checksum of each block and the size in bytes, in the pass that computes the hash."""
        digest, checksums, size = hashlib.blake2b(digest_size=16), [], 0
        while content := os.pread(self._descriptor, 64 * _BLOCK, size):
            digest.update(content)
            view = memoryview(content)
            checksums += [zlib.crc32(view[i : i + _BLOCK]) for i in range(0, len(content), _BLOCK)]
            size += len(content)
        if digest.hexdigest() != expected or size % self._dtype.itemsize:
            raise ValueError(f"{self.path.name} does not match its digest")
        return np.array(checksums, dtype=np.uint32), size
