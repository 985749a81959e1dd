"""Matrix products of the torch path: into memory that is there, by the faster of two libraries.

fp32. torch sends products on a CPU to MKL. oneDNN, which torch also carries, runs them 1.5 to 2.9
times as fast on an AMD EPYC with AVX-512 (159 to 216 against 75 to 99 GFLOP/s per core, torch 2.13,
November 2026). Asked for bf16 as the precision of fp32 products it gets them; on a processor
without AMX there is no faster way to compute with bf16, so it computes in fp32 all the same. With
AMX it rounds the factors to bf16, and is not asked. Without AVX-512 both libraries are equally
fast.

bf16. A product of a CPU in 16 bits has a result of 16 bits, too few for logits: near agreement
their rounding is larger than what is to be learnt. Two products give twice the digits, the second
of what the first has rounded off (``split_product_``), at a third of the time of one in fp32 where
the processor multiplies bf16 (AVX512_BF16). With AMX a single product of bf16 numbers held in fp32
would be as exact, and takes longer than those two. Elsewhere the factors are converted to fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PIECE = 1024
"""The most terms that oneDNN may sum one after the other. MKL sums in blocks, and over thousands of
terms the longest sum would decide the error: 2.2 times MKL's at 2048 terms, 1.6 times in pieces of
512 or 1024."""


FEWEST_ROWS = 8
"""MKL sums up to 3 rows in another order than more, on a processor with AVX2; others get room."""


def has_cpu_feature(name: str) -> bool:
    """Whether this processor has ``avx512``, ``avx512_bf16`` or ``amx_tile``, as torch sees it."""
    probe = getattr(torch.cpu, f"_is_{name}_supported", None)  # not in every torch
    return probe is not None and bool(probe())


def _switch() -> object | None:
    """torch's setting of the precision of fp32 products in oneDNN, if it has one."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return setting if hasattr(setting, "fp32_precision") else None


def _is_onednn_faster() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and has_cpu_feature("avx512")
        and not has_cpu_feature("amx_tile")
        and _switch() is not None
    )


ONEDNN_IS_FASTER = _is_onednn_faster()


HAS_BF16_PRODUCTS = has_cpu_feature("avx512_bf16")
"""Whether bf16 products are split in two."""


def moves_setting() -> bool:
    """Whether ``onednn_products`` would change the setting of the process now: fp32 products of
    other threads are then others while it lasts."""
    return ONEDNN_IS_FASTER and getattr(_switch(), "fp32_precision", None) == "none"


@contextmanager
def onednn_products() -> Iterator[None]:
    """Let oneDNN compute fp32 products on a CPU where it is faster and no less exact.

    The setting belongs to the process: other threads' fp32 products go to oneDNN as well while it
    lasts. One that somebody has set is left as it is.
    """
    if not moves_setting():
        yield
        return
    switch = _switch()
    switch.fp32_precision = "bf16"  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    try:
        yield
    finally:
        switch.fp32_precision = "none"  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def multiply_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """``out = a b``, or with ``add`` ``out += a b``: [m, k], [k, n] -> [m, n], summed in its dtype.

    Libraries sum a few rows in another order than many, and a row's bits must not depend on how
    many others come with it: so a few are computed as ``FEWEST_ROWS``, some of them twice.
    """
    if 0 < len(a) < FEWEST_ROWS:
        again = _repeated(a)
        more = out[again] if add else out.new_empty(FEWEST_ROWS, out.shape[1])
        return out.copy_(multiply_(more, a[again], b, add=add)[: len(a)])
    k = a.shape[1]
    step = PIECE if _by_onednn(a) else max(k, 1)
    for start in range(0, k, step):
        piece = slice(start, start + step)
        if start == 0 and not add:
            torch.mm(a[:, piece], b[piece], out=out)
        else:
            out.addmm_(a[:, piece], b[piece])
    return out.zero_() if k == 0 and not add else out


def _repeated(a: Tensor) -> Tensor:  # [FEWEST_ROWS]
    return torch.arange(FEWEST_ROWS, device=a.device) % len(a)


def _by_onednn(a: Tensor) -> bool:
    if not (ONEDNN_IS_FASTER and a.is_cpu and a.dtype == torch.float32):
        return False
    return getattr(_switch(), "fp32_precision", "none") == "bf16"


def split_product_(high: Tensor, low: Tensor, a: Tensor, b: Tensor) -> None:
    """``high + low = a b``, all in bf16: the product rounded, and what rounding has dropped.

    The sum has an error of about 2^-17 of the product, and of 2^-24 of what is summed up. A product
    that is infinite leaves NaN in ``low``.
    """
    if 0 < len(a) < FEWEST_ROWS:  # see multiply_
        again = _repeated(a)
        more = high.new_empty(2, FEWEST_ROWS, high.shape[1])
        split_product_(more[0], more[1], a[again], b)
        high.copy_(more[0, : len(a)])
        low.copy_(more[1, : len(a)])
        return
    torch.mm(a, b, out=high)
    torch.addmm(high, a, b, beta=-1, out=low)


def product_less_(out: Tensor, a: Tensor, b: Tensor, base: Tensor) -> None:
    """``out = a b - base`` in bf16, of which the difference is rounded, not the product."""
    if 0 < len(a) < FEWEST_ROWS:
        again = _repeated(a)
        out.copy_(torch.addmm(base[again], a[again], b, beta=-1)[: len(a)])
    else:
        torch.addmm(base, a, b, beta=-1, out=out)
