"""Linear losses with 16-bit logits against 32-bit logits on a GPU, and what each part takes.

``copy``       memory bandwidth, to which passes over logits are compared
``products``   the product ``h W^T`` with fp32 results, in calls of so many rows, over one call with
               16-bit results
``slabs``      the same product in slabs of so many rows and columns, each read at once and written
               in 16 bits: the least that logits of 16 bits cost without a product of one's own
``losses``     CE, and CE and KL at T = 2, by how logits are kept: milliseconds, over the bare
               products of the same run, and memory
``widths``     the losses with 16-bit logits by the slabs that they are made in
``kernels``    the kernels of one call of each loss, their calls and microseconds
``limits``     what decides which path is built on, and which is the default: the figure, its limit
               and whether it is met; None where it could not be measured

A part that fails leaves its reason in place of its figures. The record is written after each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sad_kernels import _tiles

from bench.kernels import ceilings, roofline
from bench.kernels.timing import MIB, Cpu, Device, Gpu, one_line
from bench.peers.base import Unsupported
from bench.peers.ours import COMPACT

Json = dict[str, Any]

KINDS = {"ce": "CE", "joint": "CE + KL, T = 2"}
LIMITS = {"ce": 1.05, "joint": 1.10}
"""Of the time of a loss over its bare products, per loss."""
SLAB_LIMIT = 1.10
"""Of a product in slabs and the pass over them, over one with 16-bit results: where a product with
an epilogue of its own, at nine tenths of the library's rate, would be no faster."""
COPY_SHARE = 0.95
"""The least rate of a pass over logits, over a copy's."""
MERGE_US = 20.0
"""The most microseconds to put the tables of 1024 rows together."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: ``N`` rows in the losses, ``rows`` in the products alone."""

    N: int = 8192
    rows: int = 4096
    D: int = 4096
    V: int = 128256
    calls: int = 3  # that count, after two that do not
    cuts: tuple[int, ...] = (1024, 2048, 4096)  # rows of a call
    slabs: tuple[tuple[int, int], ...] = ((1024, 4096), (1024, 8192), (1024, 16384), (4096, 128256))


FAKE = Sizes(N=2, rows=2, D=16, V=260, calls=1, cuts=(1, 2), slabs=((1, 256), (2, 260)))


def measure(
    *,
    fake: bool = False,
    earlier: Json | None = None,
    keep: Callable[[Json], None] = lambda _: None,
    sizes: Sizes | None = None,
) -> Json:
    """Every part, less those that ``earlier``, a record of the same sizes, holds.

    Needs a GPU, unless ``fake``: tiny sizes on a CPU, to see that everything runs.
    """
    if not fake and not torch.cuda.is_available():
        raise SystemExit("error: the case compact must find a GPU, got none; run it where one is")
    device: Device = Cpu() if fake else Gpu()
    sizes = sizes or (FAKE if fake else Sizes())
    about = _as_json(asdict(sizes))
    found: Json = {"case": "compact", "sizes": about}
    if earlier is not None and earlier["sizes"] == about:
        found |= {name: earlier[name] for name in PARTS if _is_measured(earlier.get(name))}
    for name, part in PARTS.items():
        if name not in found:
            try:
                found[name] = part(device, sizes)
            except (Unsupported, RuntimeError) as error:
                known = isinstance(error, Unsupported)
                found[name] = {"reason": str(error) if known else one_line(error)}
            device.free()
            keep(found | {"limits": limits(found)})
    return found | {"limits": limits(found)}


def limits(found: Json) -> list[Json]:
    """Each figure that decides something, its limit, and whether it is met."""
    N = found["sizes"]["N"]
    lines = [
        _limit(
            f"product in slabs of {row['rows']:,} x {row['columns']:,} and a pass over them, "
            "over one with 16-bit results",
            SLAB_LIMIT,
            row["ratio"],
        )
        for row in _rows(found, "slabs")
    ]
    for kind, name in KINDS.items():
        of_kind = {row["logits"]: row for row in _rows(found, "losses") if row["loss"] == kind}
        compact, exact = of_kind.get("compact", {}), of_kind.get("exact", {})
        lines.append(_limit(f"{name}, over its products", LIMITS[kind], compact.get("ratio")))
        ratio = compact["ms"] / exact["ms"] if compact and exact else None
        lines.append(_limit(f"{name}, over 32-bit logits", 1.0, ratio))
        passes = _passes(found, kind)
        rate = None
        if passes.get("gradient"):
            numbers = N * found["sizes"]["V"] * (1 if kind == "ce" else 2)  # read; one is written
            size = 2 * (numbers + N * found["sizes"]["V"])
            rate = size / (passes["gradient"] * 1e-6) / found["copy"]["rate"]
        what = f"{name}, rate of the gradient pass over a copy's"
        lines.append(_limit(what, COPY_SHARE, rate, at_least=True))
        merge = passes["merge"] * 1024 / N if passes.get("merge") else None
        lines.append(_limit(f"{name}, us to merge 1,024 rows", MERGE_US, merge))
    return lines


def _limit(what: str, limit: float, measured: float | None, at_least: bool = False) -> Json:
    met = None if measured is None else measured >= limit if at_least else measured <= limit
    bound = "at least" if at_least else "at most"
    return {"what": what, "bound": bound, "limit": limit, "measured": measured, "met": met}


def _rows(found: Json, part: str) -> list[Json]:
    rows = found.get(part)
    return rows if isinstance(rows, list) else []


def _is_measured(part: Any) -> bool:
    return part is not None and not (isinstance(part, dict) and "reason" in part)


PASSES = {"gradient": ("gradient",), "merge": ("merge", "fold")}
"""Passes over what is not a product, and the words in the names of their kernels."""


def _passes(found: Json, kind: str) -> dict[str, float]:
    """Microseconds of each pass of a loss with 16-bit logits."""
    of_kind = [
        kernel
        for row in _rows(found, "kernels")
        if (row["loss"], row["logits"]) == (kind, "compact")
        for kernel in row["kernels"]
    ]
    return {
        name: sum(k["us"] for k in of_kind if any(word in k["kernel"] for word in words))
        for name, words in PASSES.items()
    }


# Parts


def _copy(device: Device, sizes: Sizes) -> Json:
    return roofline.copy_roofline(device, "start").record


def _products(device: Device, sizes: Sizes) -> list[Json]:
    from sad_kernels._triton.gemm import times

    h, w, bare = _factors(device, sizes)
    rows = []
    for cut in sizes.cuts:
        out = torch.empty(cut, sizes.V, device=device.device)

        def call(cut: int = cut, out: torch.Tensor = out) -> None:
            for at in _tiles.cut(sizes.rows, cut):
                times(h[at], w.T, out=out[: at.stop - at.start])

        ms = ceilings.median_ms(device, call, sizes.calls)
        rows.append({"rows": cut, "ms": ms, "ratio": ms / bare})
    return rows


def _slabs(device: Device, sizes: Sizes) -> list[Json]:
    from sad_kernels._triton.gemm import times

    h, w, bare = _factors(device, sizes)
    kept = h.new_empty(sizes.rows, sizes.V)
    rows = []
    for height, width in sizes.slabs:
        slab = torch.empty(height, width, device=device.device)

        def call(height: int = height, width: int = width, slab: torch.Tensor = slab) -> None:
            for at in _tiles.cut(sizes.rows, height):
                for columns in _tiles.cut(sizes.V, width):
                    out = slab[: at.stop - at.start, : columns.stop - columns.start]
                    times(h[at], w[columns].T, out=out)
                    kept[at, columns].copy_(out)

        ms = ceilings.median_ms(device, call, sizes.calls)
        rows.append({"rows": height, "columns": width, "ms": ms, "ratio": ms / bare})
    return rows


def _losses(device: Device, sizes: Sizes) -> list[Json]:
    return [_loss(device, sizes, kind, logits) for kind in KINDS for logits in ("exact", "compact")]


def _loss(device: Device, sizes: Sizes, kind: str, logits: str) -> Json:
    make, floor = ceilings.linear_loss(device, kind, (sizes.N, sizes.D, sizes.V), sizes.calls)
    step = make(**_settings(logits))
    ms = ceilings.step_ms(device, step, sizes.calls)
    device.free()
    return {
        "loss": kind, "logits": logits, "ms": ms, "products_ms": floor, "ratio": ms / floor,
        "peak_mib": device.peak(step) / MIB,
    }  # fmt: skip


def _widths(device: Device, sizes: Sizes) -> list[Json]:
    rows = []
    for kind in KINDS:
        for height, width in sizes.slabs:
            with _slabs_of(height, width):
                row = _loss(device, sizes, kind, "compact")
            rows.append(row | {"rows": height, "columns": width})
    return rows


@contextmanager
def _slabs_of(rows: int, columns: int) -> Iterator[None]:
    """Make the slabs of 16-bit logits of this size."""
    sizes = {"SLAB_ROWS": rows, "SLAB_COLUMNS": columns}
    before = {name: getattr(_tiles, name) for name in sizes}
    try:
        for name, size in sizes.items():
            setattr(_tiles, name, size)
        yield
    finally:
        for name, size in before.items():
            setattr(_tiles, name, size)


def _kernels(device: Device, sizes: Sizes) -> list[Json]:
    if not isinstance(device, Gpu):
        raise Unsupported("a CPU launches no kernels")
    rows = []
    for kind in KINDS:
        for logits in ("exact", "compact"):
            shape = (sizes.N, sizes.D, sizes.V)
            make, _ = ceilings.linear_loss(device, kind, shape, sizes.calls)
            step = make(**_settings(logits))
            for _ in range(2):
                step.prepare()
                step()
            step.prepare()
            kernels = ceilings.kernels_of(step)
            rows.append({"loss": kind, "logits": logits, "kernels": kernels})
    return rows


PARTS: dict[str, Callable[[Device, Sizes], Any]] = {
    "copy": _copy,
    "products": _products,
    "slabs": _slabs,
    "losses": _losses,
    "widths": _widths,
    "kernels": _kernels,
}


def _factors(device: Device, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Hidden states, a weight, and the milliseconds of their product with 16-bit results."""
    h, w = ceilings.noise(device, sizes.rows, sizes.D), ceilings.noise(device, sizes.V, sizes.D)
    return h, w, ceilings.median_ms(device, lambda: h @ w.T, sizes.calls)


def _settings(logits: str) -> Json:
    return {} if logits == "exact" else COMPACT


def _as_json(value: Any) -> Any:
    """With lists in place of tuples, as a record has them that was written and read."""
    if isinstance(value, dict):
        return {name: _as_json(each) for name, each in value.items()}
    return [_as_json(each) for each in value] if isinstance(value, Iterable) else value
