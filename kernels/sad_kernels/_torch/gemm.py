"""Matrix products of the torch path: into memory that is there, by the faster of two libraries.

torch sends fp32 products on a CPU to MKL. oneDNN, which torch also carries, runs them 1.5 to 2.9
times as fast on an AMD EPYC with AVX-512 (159 to 216 against 75 to 99 GFLOP/s per core, torch 2.13,
November 2026). Asked for bf16 as the precision of fp32 products it gets them; on a processor
without AMX there is no faster way to compute with bf16, so it computes in fp32 all the same. With
AMX it would round, and is not asked. Without AVX-512 both are equally fast.

16-bit products of a CPU have 16-bit results. ``SplitProduct`` gets a result of twice the digits
from two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PIECE = 512
"""The most terms that oneDNN may sum one after the other. MKL sums in blocks, and over thousands of
terms the longest sum would decide the error: 2.2 times MKL's at 2048 terms, 1.6 times in pieces of
512."""


def has_cpu_feature(name: str) -> bool:
    """Whether this processor has ``avx512``, ``avx512_bf16`` or ``amx_tile``, as torch sees it."""
    probe = getattr(torch.cpu, f"_is_{name}_supported", None)  # not in every torch
    return probe is not None and bool(probe())


def _switch() -> object | None:
    """torch's setting of the precision of fp32 products in oneDNN, if it has one."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return setting if hasattr(setting, "fp32_precision") else None


ONEDNN_IS_FASTER = (
    torch.backends.mkldnn.is_available()
    and has_cpu_feature("avx512")
    and not has_cpu_feature("amx_tile")
    and _switch() is not None
)


@contextmanager
def onednn_products() -> Iterator[None]:
    """Let oneDNN compute fp32 products on a CPU where it is faster and no less exact.

    The setting belongs to the process: other threads' fp32 products go to oneDNN as well while it
    lasts. One that somebody has set is left as it is.
    """
    switch = _switch()
    if not ONEDNN_IS_FASTER or getattr(switch, "fp32_precision", None) != "none":
        yield
        return
    switch.fp32_precision = "bf16"  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    try:
        yield
    finally:
        switch.fp32_precision = "none"  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def multiply_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """``out = a b``, or with ``add`` ``out += a b``: [m, k], [k, n] -> [m, n], summed in its dtype.

    A single row is computed as two, because libraries take another path for it, and a row's bits
    must not depend on how many others come with it.
    """
    if len(a) == 1:
        both = out.expand(2, -1).clone() if add else out.new_empty(2, out.shape[1])
        multiply_(both, a.expand(2, -1), b, add=add)
        return out.copy_(both[:1])
    k = a.shape[1]
    step = PIECE if _by_onednn(a) else max(k, 1)
    for start in range(0, k, step):
        piece = slice(start, start + step)
        if start == 0 and not add:
            torch.mm(a[:, piece], b[piece], out=out)
        else:
            out.addmm_(a[:, piece], b[piece])
    return out.zero_() if k == 0 and not add else out


def _by_onednn(a: Tensor) -> bool:
    if not (ONEDNN_IS_FASTER and a.is_cpu and a.dtype == torch.float32):
        return False
    return getattr(_switch(), "fp32_precision", "none") == "bf16"
