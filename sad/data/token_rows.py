"""Rows of documents that come as token ids, written to a folder as ``sad.data.rows`` reads them.

One whole document to a row: what has been computed of it elsewhere was computed with all of it in
sight.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from sad.data.packing import (
    CONTEXT,
    DOCUMENTS,
    TARGET_BYTES,
    TOKENS,
    write_index,
)
from sad.data.rows import PackedRows


class TokenRowsWriter:
    """Writes the rows of documents to an empty ``folder``, in which ``finish`` opens them.

    ``vocab`` is the number of ids there are.
    """

    def __init__(self, folder: Path, vocab: int, max_length: int) -> None:
        self._folder = folder
        self._max_length = max_length
        self._dtype = "<u2" if vocab <= 1 << 16 else "<i4"
        self._file = (folder / TOKENS).open("wb")
        self._documents: list[int] = []
        self._context: list[int] = []
        self._target_bytes: list[int] = []
        self._tokens = 0
        self._max_id = 0
        self._end_tokens: set[int] = set()

    def __len__(self) -> int:
        return len(self._documents)

    def add(
        self,
        tokens: np.ndarray,  # int64 [n]
        learned: np.ndarray,  # bool [n]
        target_bytes: int,
        *,
        end_token: int | None = None,
    ) -> None:
        """Add a document of 2 to ``max_length + 1`` tokens, of which those that are ``learned``
        are targets, of ``target_bytes`` in UTF-8; ``end_token`` ends it, if anything does."""
        if not 2 <= len(tokens) <= self._max_length + 1:
            raise ValueError(f"tokens must be 2 to {self._max_length + 1}, got {len(tokens)}")
        learned = learned.copy()
        learned[0] = False
        self._documents.append(self._tokens)
        # A change from learned to context begins a span or ends one.
        changes = np.flatnonzero(np.diff(learned, prepend=True, append=True))
        self._context.extend((self._tokens + changes).tolist())
        self._target_bytes.append(target_bytes)
        self._file.write(tokens.astype(self._dtype).tobytes())
        self._tokens += len(tokens)
        self._max_id = max(self._max_id, int(tokens.max()))
        if end_token is not None:
            self._end_tokens.add(end_token)

    def close(self) -> None:
        """Give up, or do nothing after ``finish``."""
        self._file.close()

    def finish(self) -> PackedRows:
        """Write what describes the rows, and open them; their fingerprint is a hash of them."""
        self._file.close()
        arrays = {
            DOCUMENTS: self._documents,
            CONTEXT: self._context,
            TARGET_BYTES: self._target_bytes,
        }
        with (self._folder / TOKENS).open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        for name, values in arrays.items():
            array = np.array(values, dtype="<i8")
            array.tofile(self._folder / name)
            content.update(name.encode() + array.tobytes())
        content.update(json.dumps([self._dtype, self._max_length]).encode())
        write_index(
            self._folder,
            {
                "fingerprint": content.hexdigest(),
                "max_length": self._max_length,
                "packing": False,
                "token_dtype": self._dtype,
                "max_token_id": self._max_id,
                "end_tokens": sorted(self._end_tokens),
                "counts": {},
            },
            [TOKENS, *arrays],
        )
        return PackedRows(self._folder)
