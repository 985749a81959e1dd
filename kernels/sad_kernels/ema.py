"""Exponential moving average (EMA) of a model's parameters, and a lossless swap of the two.

The averages, one "shadow" per parameter, are updated by ``ema_update_``; to evaluate the averaged
model without a third copy of it, ``ema_swap_`` exchanges shadows and parameters in place, and a
second call restores both bit for bit.

Update. Elementwise, with ``s`` a shadow, ``p`` its parameter and ``w = 1 - decay``:

    s <- s + w (p - s)              for w < 1/2
    s <- p - (1 - w) (p - s)        otherwise

This is ``torch.lerp``, computed in fp32 (fp64 for fp64 pairs). ``w`` and ``1 - w`` are formed in
float64 and rounded once: ``1 - 0.9999`` in fp32 has a relative error of 1.7e-4. ``w = 0``
keeps every bit of the shadow, -0.0 included, and ``w = 1`` copies the parameter, whatever the other
side holds: a skipped step lets no NaN in.

Swap. Equal dtypes exchange their bits. A bf16 parameter cannot hold its fp32 shadow, so it gets the
shadow rounded to bf16, and the shadow's 32 bits keep the old parameter and what rounding dropped.
With ``hi`` and ``low`` the upper and lower 16 bits of the shadow:

    parameter <- pi(hi)
    shadow    <- pi^-1(bits(parameter)) << 16 | low

``pi`` rounds half away from zero: the identity for ``low < 0x8000``, else one bf16 value further
from zero. It is a permutation of the bf16 values that depends on ``low`` alone, and ``low`` stays:
so a second swap applies ``pi^-1`` where the first applied ``pi``, and undoes it. To be one, pi maps
infinity, which has no next value, to the smallest number above zero; zeros and NaNs stay as they
are, so that no NaN turns into a number.

Where ``pi`` and ``pi^-1`` are a step of 1, or none, they need no comparison: the new shadow is
``shadow + ((bits(parameter) - pi(hi)) << 16)``, modulo 2^32. On a CPU that is computed in place,
and apart only what steps from or to a zero or a NaN.

Both functions check every pair before they write to any, and go over memory once. Extra memory: on
a GPU, where a call is one launch per pair of dtypes, 24 bytes for every 4096 elements; on a CPU a
scratch of 1.2 MiB per thread, and some 64 bytes for each of 131,072 elements per thread that are
swapped apart; elsewhere a few blocks of as many elements. None of it grows with the model.
Compilers see each as one operator that writes to its arguments.

Sources: Polyak and Juditsky 1992 (averaging); Tarvainen and Valpola 1703.01780 (EMA of weights).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from sad_kernels._check import FLOATS
from sad_kernels._dispatch import choose_impl, resolve_impl
from sad_kernels._extents import Extent, _is_dense, _layout, _require_apart
from sad_kernels._torch import ema as torch_ema
from sad_kernels._torch.ema import Pairs

UPDATE_DTYPES = {
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
}


def ema_update_(
    shadows: Iterable[Tensor],
    params: Iterable[Tensor],
    decay: float | Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Move every shadow towards its parameter: ``shadow <- decay * shadow + (1 - decay) * param``.

    ``shadows`` and ``params`` are lists, or what can be iterated over once, such as
    ``model.parameters()``, of equal length: one shadow per parameter, in one order. ``decay`` is a
    number in [0, 1] or a 0-d floating-point tensor, which is read on the device without a host
    sync; make it float64. 1 leaves the shadow untouched and 0 copies. A tensor's value is not
    checked: NaN makes every shadow NaN.

    Shadows are fp32 and parameters fp32, bf16 or fp16; fp64 goes with fp64. A 16-bit shadow is
    refused: at a decay of 0.9999 it hardly moves. Tensors may have any dense layout, equal on both
    sides; empty pairs are skipped. Gradients are not recorded. Triton takes no fp64. Tensors that
    wrap others are refused: pass the local tensors of DTensors, ``.to_local()``.

    Before a CUDA graph captures a call, make the same call once outside of it: the first one with
    a set of tensors copies their addresses to the device. Under capture it raises ``RuntimeError``.

    Raises ``TypeError`` and ``ValueError`` before anything is written: for a tensor in the place of
    a list, for lists of unequal length, for shapes, dtypes, devices or layouts that do not match,
    for tensors that overlap in memory (a tensor listed twice, tied weights, a shadow that is the
    parameter) and for a decay out of range; and ``RuntimeError`` for batched tensors, under
    ``torch.vmap``.

    >>> shadow, param = torch.tensor([1.0]), torch.tensor([3.0])
    >>> ema_update_([shadow], [param], 0.75)
    >>> shadow
    tensor([1.5000])
    """
    decay = _as_decay(decay)
    pairs = _checked_pairs(shadows, params, impl)
    for i, (shadow, param) in enumerate(pairs):
        if (shadow.dtype, param.dtype) not in UPDATE_DTYPES:
            raise TypeError(
                f"shadow and parameter {i} must be float32 with float32, bfloat16 or float16, or "
                f"both float64, got {shadow.dtype} with {param.dtype}; keep the shadow in float32"
            )
    if pairs:
        with torch.no_grad():
            update_op(*_unzipped(pairs), torch_ema.on_device(decay, pairs[0][0].device), impl)


def ema_swap_(shadows: Iterable[Tensor], params: Iterable[Tensor], *, impl: str = "auto") -> None:
    """Exchange shadows and parameters in place, without loss: a second call undoes the first.

    Equal dtypes are exchanged bit for bit. For a bf16 parameter with an fp32 shadow the parameter
    becomes the shadow rounded to the nearest bf16 value, ties away from zero. The swapped shadow is
    then opaque: it lies within one bf16 step of the old parameter, but only a second swap gives it
    meaning again, so do not average, save or report it. Tensors do not show whether they are
    swapped; the caller keeps that flag.

    Other dtype pairs are refused. fp16 with fp32 cannot work: one fp16 value near zero stands for
    2^30 fp32 values, so 32 bits cannot hold the parameter and the rounding.

    Raises ``TypeError`` and ``ValueError`` before anything is written, as ``ema_update_`` does, and
    wants the same first call before a CUDA graph.

    >>> shadow, param = torch.tensor([1.0]), torch.tensor([3.0])
    >>> ema_swap_([shadow], [param])
    >>> shadow, param
    (tensor([3.]), tensor([1.]))
    """
    pairs = _checked_pairs(shadows, params, impl)
    for i, (shadow, param) in enumerate(pairs):
        rounded = (shadow.dtype, param.dtype) == (torch.float32, torch.bfloat16)
        if not rounded and shadow.dtype != param.dtype:
            raise TypeError(
                f"shadow and parameter {i} must have one dtype, or be float32 with bfloat16, got "
                f"{shadow.dtype} with {param.dtype}; keep a copy of the parameters instead"
            )
    if pairs:
        with torch.no_grad():
            swap_op(*_unzipped(pairs), impl)


# --- Operators -----------------------------------------------------------------------------------
# Opaque to compilers: only inside have tensors an address, and the torch path keeps its blocks
# instead of being rewritten into copies of the model.


def _update(shadows: list[Tensor], params: list[Tensor], decay: Tensor, impl: str) -> None:
    """``ema_update_`` of pairs that match and are not empty."""
    for_triton, for_torch = _split(list(zip(shadows, params, strict=True)), impl)
    if for_triton:
        from sad_kernels._triton import ema as triton_ema

        triton_ema.update(for_triton, decay)
    torch_ema.update(for_torch, decay)


def _swap(shadows: list[Tensor], params: list[Tensor], impl: str) -> None:
    """``ema_swap_`` of pairs that match and are not empty."""
    for_triton, for_torch = _split(list(zip(shadows, params, strict=True)), impl)
    if for_triton:
        from sad_kernels._triton import ema as triton_ema

        triton_ema.swap(for_triton)
    torch_ema.swap(for_torch)


update_op = torch.library.custom_op(
    "sad_kernels::ema_update",
    _update,
    mutates_args={"shadows"},
    tags=(torch.Tag.cudagraph_unsafe,),
)
swap_op = torch.library.custom_op(
    "sad_kernels::ema_swap",
    _swap,
    mutates_args={"shadows", "params"},
    tags=(torch.Tag.cudagraph_unsafe,),
)
update_op.register_fake(lambda shadows, params, decay, impl: None)
swap_op.register_fake(lambda shadows, params, impl: None)


def _refuse_batches(info: object, in_dims: tuple[Any, ...], *args: object) -> NoReturn:
    """The rule of ``torch.vmap``, which calls it where any of an operator's tensors is batched."""
    batched = [
        name
        for name, dims in zip(("shadows", "params", "decay"), in_dims, strict=False)
        if (
            any(d is not None for d in dims)
            if isinstance(dims, (list, tuple))
            else dims is not None
        )
    ]
    raise RuntimeError(
        f"{' and '.join(batched)} must not be batched by torch.vmap, got a call under it; average "
        "or swap the whole tensors, outside of it"
    )


update_op.register_vmap(_refuse_batches)
swap_op.register_vmap(_refuse_batches)


def _split(pairs: Pairs, impl: str) -> tuple[tuple[Extent, ...], Pairs]:
    """The pairs for Triton, as extents, and those for torch; raise if any two tensors overlap.

    Both may be present: a model may lie on several devices, or have float64 parts.
    """
    extents = tuple(
        Extent(s.device, s.dtype, p.dtype, s.data_ptr(), p.data_ptr(), s.numel()) for s, p in pairs
    )
    _require_apart(extents)
    kinds = {extent[:3] for extent in extents}
    impls = {kind: choose_impl(impl, kind[0].type, torch.float64 in kind[1:]) for kind in kinds}
    if set(impls.values()) == {"torch"}:
        return (), pairs
    triton = [impls[extent[:3]] == "triton" for extent in extents]
    torch_pairs = [pair for pair, is_triton in zip(pairs, triton, strict=True) if not is_triton]
    return tuple(compress(extents, triton)), torch_pairs


# --- Checks --------------------------------------------------------------------------------------


def _checked_pairs(shadows: Iterable[Tensor], params: Iterable[Tensor], impl: str) -> Pairs:
    """The non-empty pairs; raise if the lists or any of their pairs do not match."""
    resolve_impl(impl)
    shadows, params = _listed("shadows", shadows), _listed("params", params)
    if len(shadows) != len(params):
        raise ValueError(
            f"shadows and params must have one length, got {len(shadows)} and {len(params)}; "
            "pass one shadow per parameter, in the same order"
        )
    pairs = list(zip(shadows, params, strict=True))
    for i, (shadow, param) in enumerate(pairs):
        _require_matching(i, shadow, param)
    return [(shadow, param) for shadow, param in pairs if shadow.numel() > 0]


def _listed(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):  # iterating over it would give its rows
        raise TypeError(
            f"{name} must be a list of tensors, got one tensor of shape {tuple(tensors.shape)}; "
            f"pass [{name}]"
        )
    if not isinstance(tensors, Iterable):
        raise TypeError(
            f"{name} must be a list of tensors, got {type(tensors).__name__}; pass a list, or "
            "model.parameters()"
        )
    return list(tensors)


def _require_plain(name: str, i: int, tensor: object) -> None:
    """Require a dense floating-point tensor that has memory of its own."""
    kind = type(tensor)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} {i} must be a tensor, got {kind.__name__}; pass lists of tensors")
    # The attribute is torch's mark of a tensor that wraps others, known to its compiler as well.
    if kind not in (Tensor, Parameter) and hasattr(kind, "__tensor_flatten__"):
        raise TypeError(
            f"{name} {i} must be a plain tensor, got {kind.__name__}; pass .to_local() of "
            "each DTensor, and the tensors inside of any other kind"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} {i} must be a dense tensor, got {layout}; leave it out")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} {i} must be a floating-point tensor of 16 bits or more, "
            f"got {tensor.dtype}; leave it out"
        )


def _require_matching(i: int, shadow: Tensor, param: Tensor) -> None:
    _require_plain("shadow", i, shadow)
    _require_plain("parameter", i, param)
    if shadow.shape != param.shape:
        raise ValueError(
            f"shadow and parameter {i} must have one shape, got {tuple(shadow.shape)} and "
            f"{tuple(param.shape)}; pass them in the same order"
        )
    if shadow.device != param.device:
        raise ValueError(
            f"shadow and parameter {i} must be on one device, got {shadow.device} and "
            f"{param.device}; move the shadow to the parameter's device"
        )
    if shadow.stride() == param.stride() and param.is_contiguous():
        return
    layouts = _layout(shadow), _layout(param)
    if layouts[0] != layouts[1] or not _is_dense(layouts[1]):
        raise ValueError(
            f"shadow and parameter {i} must be dense with equal strides, got strides "
            f"{shadow.stride()} and {param.stride()} for shape {tuple(param.shape)}; make the "
            "shadow with torch.empty_like(param), or pass contiguous tensors"
        )


def _as_decay(decay: float | Tensor) -> float | Tensor:
    if isinstance(decay, Tensor):
        if decay.ndim != 0 or not decay.dtype.is_floating_point:
            raise ValueError(
                "decay must be a number or a 0-d floating-point tensor, got shape "
                f"{tuple(decay.shape)} of {decay.dtype}; pass a float64 scalar"
            )
        return decay.detach()
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise TypeError(f"decay must be a number or a 0-d tensor, got {decay!r}; pass a float")
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must lie in [0, 1], got {decay!r}; 1 keeps the shadow, 0 copies")
    return float(decay)


def _unzipped(pairs: Pairs) -> tuple[list[Tensor], list[Tensor]]:
    return [shadow for shadow, _ in pairs], [param for _, param in pairs]
