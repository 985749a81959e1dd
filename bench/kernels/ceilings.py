"""Hardware limits of a GPU, and how close the kernels come: copies, GEMMs, few rows, EMA.

``copy`` and ``gemm``   memory bandwidth and GEMM throughput, to which the ratios below refer
``products``            GEMMs of a linear loss with fp32 results, in calls of so many rows: what
                        chunking costs before any loss kernel runs
``few_rows``            forward and backward of a loss of 256 rows in a CUDA graph, relative to a
                        copy of its bytes, and the kernels it launches
``chunks``              whole linear losses by ``chunk_bytes``, relative to their GEMMs with 16-bit
                        results
``ema``                 update and swap of 10^9 bf16 parameters by the block size of a program,
                        relative to a copy of their bytes
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import sad_kernels
import torch
from sad_kernels import Head, Objective, TeacherHidden
from torch.profiler import ProfilerActivity, profile

from bench.kernels import roofline
from bench.kernels.timing import MIB, Device, Gpu, Step, launched_ms, loss_step

Json = dict[str, Any]

N = 8192
SHAPES = ((4096, 128256), (1024, 151936))  # D, V
ROWS = (256, 512, 1024, 2048, 4096, 8192)
FEW, V = 256, 128256
CHUNKS = (1 << 29, 1 << 30, 1 << 31, 1 << 32)  # bytes
PARAMETERS, TENSORS = 10**9, 400
BLOCKS = ((2048, 4), (4096, 8), (8192, 8), (16384, 8))


def measure(calls: int = 10) -> Json:
    """Measure every limit; takes seconds, and needs a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("error: the case ceilings must find a GPU, got none; run it where one is")
    device = Gpu()
    copy = roofline.copy_roofline(device, "start")
    return {
        "case": "ceilings",
        "copy": copy.record,
        "gemm": [_square(device, size, calls) for size in (4096, 8192)],
        "products": [row for shape in SHAPES for row in _products(device, *shape, calls)],
        "few_rows": [_few_rows(device, name, copy.rate) for name in ("ce", "kl")],
        "chunks": [row for kind in ("ce", "joint") for row in _chunks(device, kind, calls)],
        "ema": list(_ema(device, copy.rate, calls)),
    }


def table(result: Json) -> list[str]:
    """Markdown tables of bandwidth, throughput, and the cost of chunking."""
    gemm = max(row["rate"] for row in result["gemm"])
    copy = result["copy"]["rate"]
    lines = [f"Copy {copy / 1e12:.2f} TB/s, bf16 products {gemm / 1e12:.0f} TFLOP/s.", ""]
    rows = sorted({row["rows"] for row in result["products"]})
    lines += [
        "| products with fp32 results, in calls of so many rows, over one with 16 bits | "
        + " | ".join(f"{n:,}" for n in rows)
        + " |",
        "|-|" + "-|" * len(rows),
    ]
    kinds = dict.fromkeys((row["D"], row["V"], row["product"]) for row in result["products"])
    for D, V, product in kinds:
        ratios = {
            row["rows"]: row["ratio"]
            for row in result["products"]
            if (row["D"], row["V"], row["product"]) == (D, V, product)
        }
        cells = " | ".join(f"{ratios[n]:.2f}x" for n in rows)
        lines.append(f"| {product}, D = {D:,}, V = {V:,} | {cells} |")
    lines += [
        "",
        "| linear loss by `chunk_bytes` | ms | over its products | MiB beyond the inputs |",
        "|-|-|-|-|",
    ]
    names = {"ce": "CE", "joint": "CE + KL, T = 2"}
    for row in result["chunks"]:
        lines.append(
            f"| {names[row['loss']]}, {row['chunk_bytes'] / (1 << 30):.3g} GiB "
            f"| {row['ms']:.1f} | {row['ratio']:.2f}x | {row['peak_mib']:,.0f} |"
        )
    return lines


def median_ms(device: Device, call: Callable[[], Any], calls: int) -> float:
    return step_ms(device, Step(call), calls)


def step_ms(device: Device, step: Step, calls: int) -> float:
    """Median milliseconds of a step, after two calls that are not counted."""
    return statistics.median(t.full for t in device.time(step, calls + 2)[2:])


def noise(device: Device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device.device)


def _square(device: Device, size: int, calls: int) -> Json:
    a, b = noise(device, size, size), noise(device, size, size)
    ms = median_ms(device, lambda: a @ b, calls)
    return {"size": size, "dtype": "bfloat16", "ms": ms, "rate": 2 * size**3 / ms * 1e3}


def gemm_ms(
    device: Device, h: torch.Tensor, w: torch.Tensor, g: torch.Tensor, calls: int
) -> dict[str, float]:
    """Milliseconds of a linear loss's GEMMs, each in one call with a 16-bit result."""
    return {
        "h w^T": median_ms(device, lambda: h @ w.T, calls),
        "g w": median_ms(device, lambda: g @ w, calls),
        "g^T h": median_ms(device, lambda: g.T @ h, calls),
    }


def _products(device: Device, D: int, V: int, calls: int) -> Iterator[Json]:
    """Each GEMM in calls of ``rows`` rows with fp32 results, relative to one bf16 call."""
    from sad_kernels._triton.gemm import add_times_, times

    h, w, g = noise(device, N, D), noise(device, V, D), noise(device, N, V)
    dw = torch.zeros(V, D, device=device.device)
    bare = gemm_ms(device, h, w, g, calls)
    for rows in ROWS:
        cuts = [slice(start, start + rows) for start in range(0, N, rows)]
        logits = torch.empty(rows, V, device=device.device)

        def forward(cuts: Any = cuts, logits: torch.Tensor = logits) -> None:
            for cut in cuts:
                times(h[cut], w.T, out=logits)

        def to_hidden(cuts: Any = cuts) -> None:
            for cut in cuts:
                times(g[cut], w)

        def to_weight(cuts: Any = cuts) -> None:
            for cut in cuts:
                add_times_(dw, g[cut].T, h[cut])

        for name, call in (("h w^T", forward), ("g w", to_hidden), ("g^T h", to_weight)):
            ms = median_ms(device, call, calls)
            yield {
                "D": D,
                "V": V,
                "product": name,
                "rows": rows,
                "ms": ms,
                "ratio": ms / bare[name],
            }


def _few_rows(device: Device, name: str, rate: float) -> Json:
    x, t = noise(device, FEW, V).requires_grad_(), noise(device, FEW, V)
    y = torch.randint(V, (FEW,), device=device.device)

    def loss() -> torch.Tensor:
        if name == "ce":
            return sad_kernels.cross_entropy(x, y)
        return sad_kernels.kl_div(x, t, temperature=2.0, labels=y)

    step = loss_step(loss, torch.full((), 0.125, device=device.device), [x])
    assert isinstance(device, Gpu)
    for _ in range(3):
        step.prepare()
        step()
    graph, eager = device.graph(step, 20), statistics.median(t.full for t in device.time(step, 20))
    step.prepare()
    kernels = kernels_of(step)
    size = x.nbytes * (3 if name == "ce" else 5)
    return {
        "loss": name, "rows": FEW, "V": V, "graph_ms": graph, "eager_ms": eager,
        "ratio": graph / (size / rate * 1e3), "kernels": kernels,
    }  # fmt: skip


def kernels_of(step: Step) -> list[Json]:
    """The kernels that a step launches on a GPU: their calls and microseconds."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        step()
        torch.cuda.synchronize()
    return [
        {"kernel": e.key[:80], "calls": e.count, "us": e.self_device_time_total}
        for e in seen.key_averages()
    ]


def linear_loss(
    device: Device, kind: str, sizes: tuple[int, int, int], calls: int
) -> tuple[Callable[..., Step], float]:
    """A linear loss of random inputs, CE or CE and KL at T = 2, and its products' milliseconds.

    ``sizes`` are N, D (of both models) and V. The first result makes the step, forward and
    backward, of the loss with some keywords.
    """
    N, D, V = sizes
    h, w = noise(device, N, D).requires_grad_(), (noise(device, V, D) / D**0.5).requires_grad_()
    ht, wt = noise(device, N, D), noise(device, V, D) / D**0.5
    y = torch.randint(V, (N,), device=device.device)
    one = torch.full((), 0.125, device=device.device)
    bare = gemm_ms(device, h.detach(), w.detach(), noise(device, N, V), calls)
    floor = sum(bare.values()) + (bare["h w^T"] if kind == "joint" else 0)
    objective = Objective(ce_weight=0.5, kd_weight=0.5, temperature=2.0)

    def step(**settings: Any) -> Step:
        def loss() -> torch.Tensor:
            if kind == "ce":
                return sad_kernels.linear_cross_entropy(h, w, y, **settings)
            teacher = TeacherHidden(ht, Head(wt))
            return sad_kernels.linear_distill_loss(
                h, Head(w), y, teacher, objective, **settings
            ).loss

        return loss_step(loss, one, [h, w])

    return step, floor


def _chunks(device: Device, kind: str, calls: int) -> Iterator[Json]:
    """Linear losses by ``chunk_bytes``, forward and backward: CE, or CE and KL at T = 2."""
    make, floor = linear_loss(device, kind, (N, *SHAPES[0]), calls)
    for chunk_bytes in CHUNKS:
        step = make(chunk_bytes=chunk_bytes)
        ms = step_ms(device, step, calls)
        device.free()
        yield {
            "loss": kind, "chunk_bytes": chunk_bytes, "ms": ms, "ratio": ms / floor,
            "peak_mib": device.peak(step) / MIB,
        }  # fmt: skip


def _ema(device: Device, rate: float, calls: int) -> Iterator[Json]:
    """EMA by block size and warps, and once without the hint of 16-byte alignment."""
    from sad_kernels._triton import ema

    each = PARAMETERS // TENSORS
    params = [noise(device, each) for _ in range(TENSORS)]
    shadows = [p.float() for p in params]
    kept = ema.BLOCK, ema.NUM_WARPS, ema._is_aligned
    try:
        for block, hint in ((None, True), *((block, True) for block in BLOCKS), (None, False)):
            ema.BLOCK, ema.NUM_WARPS = block or kept[:2]
            ema._is_aligned = kept[2] if hint else lambda _: False
            ema._plan.cache_clear()
            for name, size, call in (
                ("update", 10, lambda: sad_kernels.ema_update_(shadows, params, 0.999)),
                ("swap", 12, lambda: sad_kernels.ema_swap_(shadows, params)),
            ):
                ms = launched_ms(device, call, calls)
                floor = size * each * TENSORS / rate * 1e3
                yield {"what": name, "block": block, "hint": hint, "ms": ms, "ratio": ms / floor}
    finally:
        ema.BLOCK, ema.NUM_WARPS, ema._is_aligned = kept
        ema._plan.cache_clear()
