"""Tile sizes of the torch path and chunk sizes of the Triton path, as functions of shapes alone.

Nothing depends on free memory or load: the order of summation follows the tiles, so sizes that
moved with the machine would make two runs differ in their last bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sad_kernels._divergence_table import DIVERGENCES

DEFAULT_CHUNK_BYTES = 32 << 20
"""Default budget of the ``linear_*`` functions with ``impl="torch"``. Measured from 8 to 64 MiB (2
cores, 32 MB of L3 cache, N=512, D=256 and 512, V=128256): smaller tiles pay for each operation's
start, larger for the cache."""

TRITON_CHUNK_BYTES = 1 << 30
"""Default budget of the ``linear_*`` functions with ``impl="triton"``. With a dense teacher, V =
128256 and bf16: 512 rows per forward product and 2048 per gradient product."""

GRADIENT_BLOCKS = 4
"""Forward products (hidden states by weight) per gradient product. Those that give N x V numbers
are efficient from about 512 rows on; those that sum over rows want more, since each reads and
writes all of dweight."""

PITCH = 64  # row strides of slabs are multiples of this many columns: 16-byte loads whatever V is

HEAD_ROWS = 1024  # the most rows of a tile made from a head: sharing its slice pays until here
NARROW = 128  # the fewest columns of such a tile; where fewer fit, it gets fewer rows instead
# The most columns of a tile of given logits: below torch's threshold for splitting one row's sum
# between threads, so that a row's bits do not depend on how many rows come with it.
LOGIT_COLUMNS = 16384
LOGIT_TILE = 1 << 21  # numbers: 8 MB in fp32


class TileShape(NamedTuple):
    """The largest tile: a tile at an edge has fewer rows or columns."""

    rows: int
    columns: int


def logit_tiles(vocab: int) -> TileShape:
    """Tiles of given logits, about 8 MB each."""
    columns = min(vocab, LOGIT_COLUMNS)
    return TileShape(max(1, LOGIT_TILE // columns), columns)


def head_tiles(
    num_rows: int, vocab: int, *, slabs: int, per_column: int, per_row: int, numbers: int
) -> TileShape:
    """Tiles of logits made from a head, as large as a budget of ``numbers`` allows, at least 1 x 1.

    Alive at a time are ``slabs`` tiles, and ``per_column`` and ``per_row`` numbers of the factors:
    ``slabs * rows * columns + per_column * columns + per_row * rows <= numbers``.
    """

    def columns(rows: int) -> int:
        return (numbers - per_row * rows) // (slabs * rows + per_column)

    rows = max(1, min(num_rows, HEAD_ROWS))
    if columns(rows) < min(vocab, NARROW):
        # The largest tile is the one whose rows and columns take equal shares of the budget.
        unit = per_row * per_column / slabs
        share = unit * (math.sqrt(1 + numbers / unit) - 1)
        rows = max(1, min(rows, int(share / per_row)))
    return TileShape(rows, max(1, min(vocab, columns(rows))))


def term_tiles(divergence: str) -> int:
    """How many tiles the terms of a divergence take at a time beside a dense teacher's logits."""
    if divergence == "forward_kl":
        return 0  # its gradient is made of exponentials in place
    return 6 if DIVERGENCES[divergence].forward_passes == 2 else 3


class ChunkRows(NamedTuple):
    """The most rows of a forward product and of a gradient product in the Triton path."""

    forward: int
    gradient: int


def chunk_rows(vocab: int, sides: int, itemsize: int, chunk_bytes: int) -> ChunkRows:
    """As many rows as fit, at least one: ``pitch (4 sides forward + itemsize gradient)`` bytes."""
    rows = max(1, chunk_bytes // (pitch(vocab) * (4 * sides + itemsize * GRADIENT_BLOCKS)))
    if rows >= 128:
        rows -= rows % 128  # whole tiles of a matrix product
    return ChunkRows(rows, GRADIENT_BLOCKS * rows)


def pitch(vocab: int) -> int:
    """The row stride of a slab: ``vocab`` rounded up to a multiple of ``PITCH``."""
    return -(-vocab // PITCH) * PITCH


def cut(length: int, at_most: int) -> list[slice]:
    """Cut a range into as few pieces as possible, of sizes that differ by one at most."""
    if length == 0:
        return []
    pieces = -(-length // at_most)
    return [slice(i * length // pieces, (i + 1) * length // pieces) for i in range(pieces)]
