"""The one table of tile sizes: by architecture, kernel and register pressure.

Tiles are fixed. Nothing is tuned at run time, so that two runs sum in the same order, and a launch
costs no search. To give a GPU tiles of its own, add a row to ``TILES``.

Sweeps and tests choose tiles of their own within ``tile_rule``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sad_kernels._tiles import GROUP

SEGMENT = 16384
"""Columns that one program sums up. 256 rows of 128256 columns make 2048 programs."""

VECTOR_BYTES = 16  # the widest load of one thread


class Tile(NamedTuple):
    """Columns at a time, the columns of one program (a multiple), and its warps."""

    block: int
    segment: int
    warps: int
    threads_per_warp: int = 32

    def lanes(self, *logits: Tensor) -> dict[str, int]:
        """Columns that a thread loads at once, and the threads that hold different ones.

        As Triton lays out the tiles of all that is read, so that a lane's sum stays within a thread
        and equal logits of two dtypes are summed in the same order.
        """
        vector = min(self.block, VECTOR_BYTES // min(x.element_size() for x in logits))
        threads = self.threads_per_warp * self.warps
        return {"VECTOR": vector, "LANES": min(self.block // vector, threads)}

    def of_whole_groups(self) -> Tile:
        """At least as large, of whole groups of columns that share a maximum, see ``codes.py``."""
        block = max(self.block, GROUP)
        return self._replace(block=block, segment=max(self.segment, block))


class BlockAndWarps(NamedTuple):
    """A program's columns at a time, and its warps, for vocabularies of at least a block."""

    block: int
    warps: int


ANY = None  # any other pressure

TILES: dict[str, dict[tuple[str, int | None], BlockAndWarps]] = {
    # These are the fastest on an H200 with 8192 rows, or within 2 % of it, a quarter faster than
    # larger segments with 256, and spill in no loop; with two tensors only small programs keep
    # enough resident. Times are in bench/LOG.md and come from `python -m bench tiles`; what each
    # kernel takes on sm_80 to sm_120 and gfx942 is in tests/contracts/budgets.json.
    "default": {
        ("statistics", 1): BlockAndWarps(2048, 4),
        ("statistics", ANY): BlockAndWarps(512, 1),
        ("mixture", ANY): BlockAndWarps(2048, 4),
        ("gradient", 1): BlockAndWarps(2048, 8),
        ("gradient", 2): BlockAndWarps(2048, 4),
        ("gradient", ANY): BlockAndWarps(1024, 4),
        # Not timed. A group is loaded by one warp, so that its sums need no other.
        ("compress", 1): BlockAndWarps(1024, 1),
        ("compress", ANY): BlockAndWarps(512, 1),
    },
}
"""Architecture (``sm_90``, ``gfx942``, ...) -> (kernel, pressure) -> tile. What an architecture
does not list it takes from ``default``."""

PRESSURES = {
    "statistics": (1, 2, 3, 4, 5),
    "mixture": (2,),
    "gradient": (1, 2, 3, 4, 5),
    "compress": (1, 2),
}
LAUNCHED = [(kernel, p) for kernel, several in PRESSURES.items() for p in (*several, ANY)]
"""The keys that a launch looks up: kernel, and its pressure or ``ANY``."""


def check_tiles(tiles: Mapping[str, Mapping[Any, BlockAndWarps]]) -> None:
    """Raise ``ValueError`` for a row that no launch would ask for, or that no kernel can take."""
    for arch, table in tiles.items():
        if arch != "default" and not re.fullmatch(r"sm_\d+|gfx\w+|xpu", arch):
            raise ValueError(
                f"architectures must be like sm_90, gfx942 or xpu, got {arch!r}; see architecture()"
            )
        for key, (block, warps) in table.items():
            if key not in LAUNCHED:
                raise ValueError(
                    f"tiles must be of a (kernel, pressure) that launches ask for: "
                    f"{', '.join(map(str, LAUNCHED))}, got {key!r} in {arch}"
                )
            powers = block == power_of_2(block) and warps == power_of_2(warps)
            if not (powers and 128 <= block <= 1 << 16 and 1 <= warps <= 32):
                raise ValueError(
                    f"a tile must have a power of 2 of columns, 128 to 65536, and of warps, up to "
                    f"32, got {block} and {warps} for {key!r} in {arch}"
                )


TileRule = Callable[[str, str, int, int, bool], Tile]
"""Architecture, kernel, vocabulary, pressure, whether there are ids -> tile."""


def choose_tile(
    device: torch.device, kernel: str, vocab: int, pressure: int, *, ids: bool = False
) -> Tile:
    """The tile of one launch.

    ``pressure`` counts what occupies registers: each tensor read, a softcap, a divergence that
    needs logarithms, and two for a top-k teacher. With ``ids`` of such a teacher to look for a
    program takes twice the columns, as it does for a gradient, which is written and not summed, so
    that few programs are as good as many.
    """
    return _rule(architecture(device), kernel, vocab, pressure, ids)


def table_rule(arch: str, kernel: str, vocab: int, pressure: int, ids: bool) -> Tile:
    """What ``TILES`` says, cut down to small vocabularies."""
    block, warps = _listed(arch, kernel, pressure)
    threads = threads_per_warp(arch)
    block = min(block, max(128, power_of_2(vocab)))
    most = block // (8 * threads)  # 16 bytes of 16-bit logits per thread
    segment = 2 * SEGMENT if ids or kernel == "gradient" else SEGMENT
    return Tile(block, segment, max(1, min(warps, most)), threads)


def _listed(arch: str, kernel: str, pressure: int) -> BlockAndWarps:
    for table in (TILES.get(arch, {}), TILES["default"]):
        for key in ((kernel, pressure), (kernel, ANY)):
            if key in table:
                return table[key]
    raise KeyError(f"kernel must be one of the table of tiles, got {kernel!r}; add a row to it")


_rule: TileRule = table_rule


def current_rule() -> TileRule:
    """The rule that ``choose_tile`` follows: ``table_rule``, or that of a ``tile_rule``."""
    return _rule


@contextmanager
def tile_rule(rule: TileRule) -> Iterator[None]:
    """Choose tiles by ``rule``, in all threads, until the context ends."""
    global _rule
    before, _rule = _rule, rule
    try:
        yield
    finally:
        _rule = before


@lru_cache
def architecture(device: torch.device) -> str:
    """The name of a device's instruction set, such as ``sm_90`` or ``gfx942``; else its type."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def threads_per_warp(arch: str) -> int:
    """64 on AMD's CDNA and GCN, 32 elsewhere."""
    return 64 if arch.startswith(("gfx8", "gfx9")) else 32


def power_of_2(at_least: int) -> int:
    """The smallest power of 2 that is not below; Triton's own takes 20 microseconds."""
    return 1 << max(0, at_least - 1).bit_length()


check_tiles(TILES)
