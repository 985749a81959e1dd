"""Tile sizes of the torch path and chunk sizes of the Triton path, as functions of shapes alone.

Nothing depends on free memory or load: the order of summation follows the tiles, so sizes that
moved with the machine would make two runs differ in their last bits.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, NamedTuple

from sad_kernels._divergence_table import DIVERGENCES

DEFAULT_CHUNK_BYTES = 128 << 20
"""Default budget of the ``linear_*`` functions with ``impl="torch"``: some hundred whole rows of
128256 logits of both models, so that the products of a chunk of rows are efficient."""

TRITON_CHUNK_BYTES = 1 << 30
"""Default budget of the ``linear_*`` functions with ``impl="triton"``. With a dense teacher, V =
128256 and bf16: 512 rows per forward product and 2048 per gradient product."""

COMPACT_CHUNK_BYTES = 21 << 26
"""The same where logits are codes of 16 bits: at V = 128256 over 4096 rows per gradient product,
and over 5000 without a dense teacher."""

GRADIENT_BLOCKS = 4
"""Forward products (hidden states by weight) per gradient product. Those that give N x V numbers
are efficient from about 512 rows on; those that sum over rows want more, since each reads and
writes all of dweight."""

LogitStorage = Literal["exact", "compact"]
"""How the Triton path keeps the logits of a chunk: in fp32, or as codes of 16 bits."""

GROUP = 256
"""Columns whose logits share a maximum where they are codes, see ``_triton/codes.py``."""

SLAB_COLUMNS = 8192  # of a product that becomes codes: with SLAB_ROWS it stays in a GPU's L2 cache
SLAB_ROWS = 1024
COMPACT_DIVERGENCES = ("forward_kl", "reverse_kl")
STUDENT_SUMS, TEACHER_SUMS = 5, 4  # numbers per row and group, see ``_triton/compress.py``

CODE_BYTES = 2
PITCH = 64  # row strides of slabs are multiples of this many columns: 16-byte loads whatever V is

HEAD_ROWS = 1024  # the most rows of a tile made from a head: sharing its slice pays until here
NARROW = 128  # the fewest columns of such a tile; where fewer fit, it gets fewer rows instead
# The most columns of a tile of given logits: their sums stay in a core's cache.
LOGIT_COLUMNS = 16384
BLOCK = 1 << 19  # numbers, 2 MB in fp32: what is worked on at a time stays in a core's cache
SHARE_OF_BLOCK = 32  # a block takes at most this part of a budget, as up to 14 are alive
CONVERTED_NUMBERS = 1 << 20  # of a weight that are converted to another dtype at a time
OUTCOME_NUMBERS = 8  # fp32 per outcome: the sums, a shift, and masks; see _triton/outcomes.py
OUTCOME_BLOCKS = 6  # five of outcomes and the slope, see _torch/outcomes.py
FEWEST_ROWS = 64  # of a chunk of whole rows: the weight is read for each, and its gradient too


class TileShape(NamedTuple):
    """The largest tile: a tile at an edge has fewer rows or columns."""

    rows: int
    columns: int
    block: int = BLOCK
    """Numbers of the tile that are worked on at a time."""


def logit_tiles(vocab: int) -> TileShape:
    """Tiles of given logits, of one block each."""
    columns = min(vocab, LOGIT_COLUMNS)
    return TileShape(max(1, BLOCK // columns), columns)


def outcome_tiles(widths: tuple[int, int, int], rows: int | None = None) -> TileShape:
    """Tiles of whole rows that are compared by outcomes, of so many columns and outcomes."""
    return TileShape(max(1, BLOCK // max(widths)) if rows is None else rows, widths[0])


def block_rows(columns: int, shape: TileShape) -> int:
    """The rows of a block of a tile that has so many columns."""
    return max(1, shape.block // columns)


class HeadBudget(NamedTuple):
    """What the torch path keeps of a ``linear_*`` loss at a time, in numbers of its arithmetic."""

    half_slabs: int
    """Of logits, in halves of a number each: the student's two, and a teacher's that are made from
    its head; of products that are split one, see ``SplitHeadSource``."""
    blocks: int  # that are alive at a time
    per_column: int  # of the factors: slices of the weights in another dtype, and of the gradient
    per_row: int
    converted: int  # of the same for all columns, where whole rows are made


def head_budget(
    *,
    student_width: int,
    teacher_width: int,  # 0 unless its logits are made from its head
    converts: bool,  # a weight or its gradient is not in the dtype of the arithmetic
    dense: bool,  # the teacher has logits, or a head
    divergences: tuple[str, ...],
    splits: bool,  # products of bf16 factors are bf16 numbers, see SplitHeadSource
    copied: int = 0,  # models whose logits are copied out of their slab, as a shard's are
) -> HeadBudget:
    widths = student_width * 2 + teacher_width  # the student's weight, its gradient; the teacher's
    # A list, because torch.compile cannot trace max() with a default.
    terms = max([0, *(term_blocks(name) for name in divergences)]) if dense else 0
    return HeadBudget(
        half_slabs=2 + (teacher_width > 0) * (1 if splits else 2),
        blocks=4 + (3 if dense else 0) + terms + copied,
        per_column=widths,
        per_row=student_width,
        converted=(3 if teacher_width else 2) * CONVERTED_NUMBERS if converts else 0,
    )


def head_tiles(num_rows: int, vocab: int, numbers: int, budget: HeadBudget) -> TileShape:
    """Tiles of logits made from a head, as large as ``numbers`` allow, at least 1 x 1.

    Alive at a time are ``half_slabs / 2`` tiles, ``blocks`` of the size of a block, and
    ``per_column`` and ``per_row`` numbers of the factors.
    """
    block = max(1, min(BLOCK, numbers // SHARE_OF_BLOCK))
    numbers = max(0, numbers - budget.blocks * block)
    halves, _, per_column, per_row, _ = budget

    def columns(rows: int) -> int:
        return 2 * (numbers - per_row * rows) // (halves * rows + 2 * per_column)

    rows = max(1, min(num_rows, HEAD_ROWS))
    if columns(rows) < min(vocab, NARROW):
        # The largest tile is the one whose rows and columns take equal shares of the budget.
        unit = 2 * per_row * per_column / halves
        share = unit * (math.sqrt(1 + numbers / unit) - 1)
        rows = max(1, min(rows, int(share / per_row)))
    width = max(1, min(vocab, columns(rows)))
    # A block is a row at least, so a tile must not be wider than a block.
    return TileShape(rows, min(width, block), block)


def whole_rows(num_rows: int, vocab: int, numbers: int, budget: HeadBudget) -> int:
    """How many whole rows of logits fit at a time; 0 where they are too few to be worth it."""
    block = max(1, min(BLOCK, numbers // SHARE_OF_BLOCK))
    numbers -= budget.blocks * max(block, vocab) + budget.converted
    rows = 2 * numbers // (budget.half_slabs * vocab)
    return rows if rows >= min(num_rows, FEWEST_ROWS) else 0


def outcome_rows(
    num_rows: int, widths: tuple[int, int, int], numbers: int, budget: HeadBudget
) -> TileShape:
    """Tiles of whole rows of both models' logits, as many as fit and one at least.

    ``widths`` are the columns of student and teacher and the number of outcomes. Blocks are at most
    as wide as the widest, and there are ``OUTCOME_BLOCKS`` more of them.
    """
    V, V_t, _ = widths
    block = max(1, min(BLOCK, numbers // SHARE_OF_BLOCK))
    numbers -= (budget.blocks + OUTCOME_BLOCKS) * max(block, *widths) + budget.converted
    row = V + (V_t if budget.half_slabs > 2 else 0)
    return TileShape(max(1, min(num_rows, numbers // row)), V, block)


def term_blocks(divergence: str) -> int:
    """How many blocks the terms of a divergence take at a time beside a dense teacher's logits."""
    return 7 if DIVERGENCES[divergence].forward_passes == 2 else 1


class ChunkRows(NamedTuple):
    """The most rows of a forward product and of a gradient product in the Triton path."""

    forward: int
    gradient: int


def outcome_row_bytes(widths: tuple[int, int, int]) -> int:
    """Bytes per row of the Triton path's sums by outcome and of the teacher that is made of them,
    ``widths`` as for ``outcome_rows``."""
    V, _, count = widths
    return 4 * (pitch(V) + OUTCOME_NUMBERS * count)


def chunk_rows(
    vocab: int, sides: int, itemsize: int, chunk_bytes: int, others: int = 0
) -> ChunkRows:
    """As many rows as fit, at least one: ``pitch (4 sides forward + itemsize gradient)`` bytes, and
    ``others`` per row of a forward product."""
    numbers = pitch(vocab)
    rows = chunk_bytes // (numbers * (4 * sides + itemsize * GRADIENT_BLOCKS) + others)
    rows = _whole_tiles(rows)
    return ChunkRows(rows, GRADIENT_BLOCKS * rows)


def has_codes(itemsize: int, teacher: str | None, divergences: Collection[str]) -> bool:
    """Whether logits beside such a teacher may be codes in the Triton path, ``itemsize`` that of
    the hidden states. Not where

    * the gradient, in the dtype of the hidden states, does not fit in the place of the codes;
    * a teacher's logits are given, which would only be read once more, or some ids of them;
    * a divergence needs both normalisers before its first term, so that codes would be read again
      for its value, or two sums of cross terms.
    """
    return itemsize == CODE_BYTES and (
        teacher is None
        or (teacher == "hidden" and all(name in COMPACT_DIVERGENCES for name in divergences))
    )


def compact_rows(vocab: int, sides: int, chunk_bytes: int) -> ChunkRows:
    """``chunk_rows`` where logits are codes: the student's, which the gradient overwrites, of all
    rows, a teacher's and what ``product_row_bytes`` says of those of a forward product."""
    codes = CODE_BYTES * pitch(vocab)
    forward = (sides - 1) * codes + product_row_bytes(vocab, sides)
    rows = _whole_tiles(chunk_bytes // (forward + GRADIENT_BLOCKS * codes))
    if rows < SLAB_ROWS:
        return ChunkRows(rows, GRADIENT_BLOCKS * rows)
    return ChunkRows(SLAB_ROWS, _whole_tiles((chunk_bytes - SLAB_ROWS * forward) // codes))


def product_row_bytes(vocab: int, sides: int) -> int:
    """Bytes per row of a forward product that becomes codes: its slab, and what is kept by group,
    the sums of both sides and how far each group is below its row's maximum."""
    sums = STUDENT_SUMS + (sides - 1) * TEACHER_SUMS + sides
    return 4 * (min(pitch(vocab), SLAB_COLUMNS) + sums * num_groups(vocab))


def num_groups(vocab: int) -> int:
    return -(-vocab // GROUP)


def _whole_tiles(rows: int) -> int:
    """At least one row, and from 128 on whole tiles of a matrix product."""
    return rows - rows % 128 if rows >= 128 else max(1, rows)


def pitch(vocab: int) -> int:
    """The row stride of a slab: ``vocab`` rounded up to a multiple of ``PITCH``."""
    return -(-vocab // PITCH) * PITCH


def cut(length: int, at_most: int) -> list[slice]:
    """Cut a range into as few pieces as possible, of sizes that differ by one at most."""
    if length == 0:
        return []
    pieces = -(-length // at_most)
    return [slice(i * length // pieces, (i + 1) * length // pieces) for i in range(pieces)]
