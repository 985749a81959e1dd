"""Tiles of the row kernels: each candidate's time over the time to move the bytes, on a GPU.

The table ``TILES`` in ``sad_kernels/_triton/tile_sizes.py`` is what this is for; ``LOG.md`` says
what was chosen and why. Launchers are called without autograd, so that no host time shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from sad_kernels import Objective
from sad_kernels._rows import LossSpec, RowTargets
from torch import Tensor

from bench.kernels import roofline
from bench.kernels.timing import Device, Gpu, launched_ms

N, V, K = 8192, 128256, 64
SEGMENTS = (16384, 32768)
STATISTICS = ((256, 1), (512, 1), (1024, 2), (2048, 4), (4096, 8), (8192, 8))
GRADIENT = ((512, 1), (1024, 4), (2048, 8), (4096, 8), (8192, 8))
MIXTURE = ((512, 1), (1024, 4), (2048, 4), (2048, 8))


class Loss(NamedTuple):
    """One use of the kernels, and how many times its logits go through memory."""

    name: str
    objective: Objective
    teacher: str | None  # dense, top_k
    joint: bool  # with CE and compute_metrics
    forward: int
    backward: int


JOINT: dict[str, Any] = {"ce_weight": 0.5, "kd_weight": 0.5, "label_smoothing": 0.1}
LOSSES = (
    Loss("ce", Objective(ce_weight=1.0, kd_weight=0.0, label_smoothing=0.1), None, False, 1, 2),
    Loss("kl", Objective(temperature=2.0), "dense", False, 2, 3),
    Loss("joint T=1", Objective(**JOINT), "dense", True, 2, 3),
    Loss("joint T=2", Objective(**JOINT, temperature=2.0), "dense", True, 2, 3),
    Loss("joint T=2.7", Objective(**JOINT, temperature=2.7), "dense", True, 2, 3),
    Loss("mixed T=2", Objective(**JOINT, temperature=2.0, teacher_share=0.4), "dense", True, 2, 3),
    Loss("jsd", Objective(divergence="jsd", temperature=2.0), "dense", False, 4, 3),
    *(
        Loss(name, Objective(divergence=name, temperature=2.0), "dense", False, 4, 3)
        for name in ("skew_forward_kl", "skew_reverse_kl")
    ),
    Loss("top_k", Objective(**JOINT, temperature=2.0), "top_k", True, 1, 2),
)


def measure(rounds: int = 8, swept: Collection[str] | None = None) -> dict[str, Any]:
    """``rows``: loss, kernel, tile (None: what the table says), ms, and the ratio to the floor.

    Of losses that are not in ``swept`` (default: all are) only the table's tiles are measured.
    """
    if not torch.cuda.is_available():
        raise SystemExit("error: the case tiles must find a GPU, got none; run it where one is")
    device = Gpu()
    rate = roofline.copy_roofline(device, "start").rate / 1e3  # bytes per ms
    rows = [
        row
        for dtype in (torch.bfloat16, torch.float32)
        for row in _rows(device, dtype, rounds, swept)
    ]
    for row in rows:
        row["ratio_copy"] = row["ms"] / (row.pop("bytes") / rate)
        print(f"{row['loss']:12} {row['dtype']:9} {row['kernel']:11} {row['tile']!s:20} "
              f"{row['ms']:8.3f} ms {row['ratio_copy']:6.3f}x")  # fmt: skip
    return {"case": "tiles", "shape": {"N": N, "V": V, "K": K}, "copy": rate * 1e3, "rows": rows}


Calls = tuple[Callable[[], Any], Callable[[Any], None]]


def calls(device: torch.device, dtype: torch.dtype) -> Callable[[Loss], Calls]:
    """Of each loss the launchers without autograd: forward, and the gradient of what it returns."""
    from sad_kernels._triton import launch

    n = N if dtype == torch.bfloat16 else N // 4  # fp32: the slabs of a linear loss
    x, t = (torch.empty(n, V, dtype=dtype, device=device).normal_(std=3) for _ in range(2))
    out = torch.empty(n, V, dtype=torch.bfloat16, device=device)
    y = torch.randint(V, (n,), device=device)
    upstream = torch.ones(1, device=device)
    log_probs, ids = torch.randn(n, K, device=device).log_softmax(1) - 0.1, _ids(n, device)
    teachers = {
        "dense": launch.Logits(t),
        "top_k": launch.SortedTopK.prepare(ids, log_probs, "bucket", V),
        None: None,
    }
    student = launch.Logits(x)

    def of(loss: Loss) -> Calls:
        teacher = teachers[loss.teacher]
        ce = loss.joint or loss.teacher is None
        spec = LossSpec(loss.objective, V, -100, compute_ce=ce, compute_metrics=loss.joint)
        return (
            lambda: launch.forward(spec, student, RowTargets(y), teacher),
            lambda saved: launch.gradient(
                spec, student, RowTargets(y), teacher, saved, upstream, out
            ),
        )

    return of


def _rows(
    device: Device, dtype: torch.dtype, rounds: int, swept: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    of = calls(device.device, dtype)
    logits = (N if dtype == torch.bfloat16 else N // 4) * V  # of one side
    read, written = logits * dtype.itemsize, logits * torch.bfloat16.itemsize
    for loss in LOSSES:
        forward, gradient = of(loss)
        saved = forward()
        kernels: list[Any] = [("statistics", STATISTICS, forward, loss.forward * read)]
        if loss.forward == 4:
            kernels.append(("mixture", MIXTURE, forward, loss.forward * read))
        backward = partial(gradient, saved)
        kernels.append(("gradient", GRADIENT, backward, (loss.backward - 1) * read + written))
        for kernel, tiles, call, size in kernels:
            sweep = tiles if swept is None or loss.name in swept else ()
            for tile, ms in _times(device, kernel, sweep, call, rounds):
                yield {
                    "loss": loss.name, "dtype": str(dtype).removeprefix("torch."),
                    "kernel": kernel, "tile": tile, "ms": ms, "bytes": size,
                }  # fmt: skip


def _times(
    device: Device, kernel: str, tiles: Any, call: Callable[[], Any], rounds: int
) -> Iterator[tuple[list[int] | None, float]]:
    """Milliseconds of a call with each tile for one kernel; first with the table's own."""
    yield None, launched_ms(device, call, rounds)
    for block, warps in tiles:
        for segment in SEGMENTS:
            with _tile_of(kernel, block, segment, warps):
                yield [block, segment, warps], launched_ms(device, call, rounds)


def _tile_of(kernel: str, block: int, segment: int, warps: int) -> AbstractContextManager[object]:
    """Within it this kernel gets this tile, and the others theirs."""
    from sad_kernels._triton import tile_sizes

    others = tile_sizes.current_rule()

    def rule(arch: str, name: str, *how: Any) -> tile_sizes.Tile:
        if name != kernel:
            return others(arch, name, *how)
        return tile_sizes.Tile(block, segment, warps, tile_sizes.threads_per_warp(arch))

    return tile_sizes.tile_rule(rule)


def _ids(n: int, device: torch.device) -> Tensor:
    """[n, K], distinct in each row."""
    rows = [torch.randperm(V, device=device)[:K] for _ in range(16)]
    return torch.stack(rows).repeat(-(-n // 16), 1)[:n]
