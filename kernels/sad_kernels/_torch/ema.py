"""Averaging and swapping with torch operations: in place on a CPU, in blocks that fit its cache.

The formulas are at the top of ``sad_kernels/ema.py``. On a CPU the decay is a number, a block takes
few passes, all blocks share one scratch, and only elements that need it take the long way. On other
devices, where nothing may wait for the device, the decay stays a tensor and every element takes the
long way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 17  # elements per step, on a CPU for each thread: block and scratch stay in its cache
INFINITY = 0x7F80  # bits of the bf16 magnitude of infinity; larger ones are NaNs

Pairs = list[tuple[Tensor, Tensor]]

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}

lists: Any = torch  # untyped: torch's stubs leave out the _foreach functions


@torch.inference_mode()  # shadows that were made in inference mode may be written to in no other
def update(pairs: Pairs, decay: Tensor) -> None:
    """Move every shadow towards its parameter."""
    on_cpu, elsewhere = _by_place(pairs)
    if on_cpu:
        _update_on_cpu(on_cpu, float(decay))
    if elsewhere:
        _update_elsewhere(elsewhere, decay)


@torch.inference_mode()
def swap(pairs: Pairs) -> None:
    """Exchange shadows and parameters in place."""
    on_cpu, elsewhere = _by_place(pairs)
    if on_cpu:
        _swap_on_cpu(on_cpu)
    if elsewhere:
        _swap_elsewhere(elsewhere)


def on_device(decay: float | Tensor, device: torch.device) -> Tensor:  # [] float64
    """``decay`` as a tensor on the device, without waiting for it."""
    if isinstance(decay, Tensor):
        return decay.to(device, torch.float64, non_blocking=True)
    return torch.full((), decay, dtype=torch.float64, device=device)


# --- Update --------------------------------------------------------------------------------------


def _update_on_cpu(pairs: Pairs, keep: float) -> None:
    w = 1.0 - keep
    if w == 0.0:
        return
    for group in _by_dtypes(pairs):
        shadows, params = [s for s, _ in group], [p for _, p in group]
        dtype = shadows[0].dtype
        step = torch.tensor(-keep if w >= 0.5 else w, dtype=dtype, device="cpu")
        # torch's lerp is the formula for w < 1/2, if w is less than that once it is rounded.
        is_lerp = w < 0.5 and 0.0 < float(step) < 0.5
        if w == 1.0:
            lists._foreach_copy_(shadows, params)
        elif is_lerp and params[0].dtype == dtype:
            lists._foreach_lerp_(shadows, params, w)
        else:
            _update_in_batches(group, w, step, is_lerp)


def _update_in_batches(pairs: Pairs, w: float, step: Tensor, is_lerp: bool) -> None:
    scratch = _Scratch(_cpu_block(), step.dtype)
    for shadows, params, sizes in _batches(pairs, _cpu_block()):
        upcast = scratch.parts(sizes)
        lists._foreach_copy_(upcast, params)
        if is_lerp:
            lists._foreach_lerp_(shadows, upcast, w)
            continue
        for s, p in zip(shadows, upcast, strict=True):
            if w >= 0.5:
                torch.sub(p, s, out=s)
                torch.addcmul(p, step, s, out=s)
            else:  # close to 1/2, or a tensor that held NaN or a number above 1
                s.addcmul_(step, p.sub_(s))


def _update_elsewhere(pairs: Pairs, decay: Tensor) -> None:
    coefficients = {}  # once per device and dtype of shadows
    for shadow, param in pairs:
        key = (shadow.device, shadow.dtype)
        if key not in coefficients:
            coefficients[key] = _coefficients(decay, shadow)
        from_param, step, exact = coefficients[key]
        for s, p in _blocks(shadow, param, BLOCK):
            p = p.to(s.dtype)
            base = torch.where(from_param, p, s)
            moved = torch.addcmul(base, step, p - s)
            # A decay of 0 or 1 copies: arithmetic would turn 0 * NaN into NaN and -0.0 into 0.0.
            torch.where(exact, base, moved, out=s)


def _coefficients(decay: Tensor, shadow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """0-d tensors of an update ``base + step (p - s)``, without a host sync: whether ``base`` is
    the parameter (else the shadow), ``step``, and whether ``base`` is the result already."""
    keep = on_device(decay, shadow.device)
    w = 1.0 - keep
    from_param = w >= 0.5
    step = torch.where(from_param, -keep, w).to(shadow.dtype)
    return from_param, step, (w == 0.0) | (w == 1.0)


# --- Swap ----------------------------------------------------------------------------------------


def _swap_on_cpu(pairs: Pairs) -> None:
    for group in _by_dtypes(pairs):
        integers = [(_as_integers(s), _as_integers(p)) for s, p in group]
        s, p = integers[0]
        if s.dtype == p.dtype:
            _exchange_in_batches(integers)
        else:
            _round_in_batches(integers)


def _exchange_in_batches(pairs: Pairs) -> None:
    scratch = _Scratch(_cpu_block(), pairs[0][0].dtype)
    for shadows, params, sizes in _batches(pairs, _cpu_block()):
        kept = scratch.parts(sizes)
        lists._foreach_copy_(kept, shadows)
        lists._foreach_copy_(shadows, params)
        lists._foreach_copy_(params, kept)


def _round_in_batches(pairs: Pairs) -> None:
    shared = BLOCK // 4
    rounding = _Rounding.for_blocks_of(_cpu_block())
    of_size: dict[int, _Rounding] = {}
    s_shared, p_shared = _Scratch(shared, torch.int32), _Scratch(shared, torch.int16)
    for shadows, params, sizes in _batches(pairs, shared):
        n = sum(sizes)
        if n not in of_size:
            of_size[n] = rounding.cut(n)
        if len(sizes) == 1:
            _exchange_in_place(shadows[0], params[0], of_size[n])
            continue
        # Small tensors are moved into one block and back: that costs less than a block for each.
        s_parts, p_parts = s_shared.parts(sizes), p_shared.parts(sizes)
        lists._foreach_copy_(s_parts, shadows)
        lists._foreach_copy_(p_parts, params)
        _exchange_in_place(s_shared.block[:n], p_shared.block[:n], of_size[n])
        lists._foreach_copy_(shadows, s_parts)
        lists._foreach_copy_(params, p_parts)


class _Rounding(NamedTuple):
    """Scratch for the swap of a block, and its constants as tensors, which cost less than ints."""

    wide: Tensor  # [block] int32
    folded: Tensor  # [2, block] int16, in the memory of ``wide``
    both: Tensor  # [2, block] int16
    param: Tensor  # [block], the first half of ``both``
    rounded: Tensor  # [block], the second
    half: Tensor
    sixteen: Tensor
    fold: Tensor

    @classmethod
    def for_blocks_of(cls, n: int) -> _Rounding:
        half, sixteen = torch.tensor([0x8000, 16], dtype=torch.int32, device="cpu")
        fold = torch.tensor(FOLD, dtype=torch.int16, device="cpu")
        wide, both = _empty(n, torch.int32), _empty(2 * n, torch.int16)
        return cls(wide, both, both, both, both, half, sixteen, fold).cut(n)

    def cut(self, n: int) -> _Rounding:
        wide, both = self.wide[:n], self.both.view(-1)[: 2 * n].view(2, n)
        folded = wide.view(torch.int16).view(2, n)
        return self._replace(wide=wide, folded=folded, both=both, param=both[0], rounded=both[1])


FOLD = 0x7FFC
LAST_ON_CIRCLE = 2 * INFINITY + FOLD - (1 << 16)
"""``2 bits + FOLD`` in int16 is at most this for the magnitudes 2 to ``INFINITY``, and above it for
0, 1 and NaNs: doubling drops the sign of bf16 bits, and the shift brings these to the end."""


def _exchange_in_place(s: Tensor, p: Tensor, room: _Rounding) -> None:
    """Swap a block of int32 with one of int16.

    With ``r`` the upper half of ``s + 0x8000``, ``s - (r << 16)`` is the lower half of ``s`` as a
    signed number: negative where ``s`` was rounded up, so that adding it to ``p << 16`` takes 1
    from ``p``. Elements for which ``pi`` is not a step of 1 are computed apart.
    """
    wide, param, rounded = room.wide, room.param, room.rounded
    torch.add(s, room.half, out=wide).bitwise_right_shift_(room.sixteen)
    rounded.copy_(wide)
    param.copy_(p)
    odd = _off_circle(s, room)
    apart = None if odd is None else (s[odd], p[odd])
    wide.copy_(param.sub_(rounded))  # modulo 2^16: the product drops the rest
    s.add_(wide, alpha=1 << 16)
    p.copy_(rounded)
    if apart is not None:
        _exchange_rounded(*apart)
        s[odd], p[odd] = apart


def _off_circle(s: Tensor, room: _Rounding) -> Tensor | None:
    """Indices of the elements that a step of 1 takes off the circle of ``_turn``, or None.

    Those are parameters of magnitude 0, 1 or NaN, which would step down, and shadows that have
    stepped up to one of these.
    """
    folded = torch.add(room.fold, room.both, alpha=2, out=room.folded)
    if int(folded.amax()) <= LAST_ON_CIRCLE:
        return None
    # Zeros are common, in biases and padding, but mostly without a step: bit 15 of s is not set.
    worst, steps = folded.amax(0), folded[1].copy_(s).bitwise_right_shift_(15)
    if int(worst.bitwise_and_(steps).amax()) <= LAST_ON_CIRCLE:
        return None
    return (worst > LAST_ON_CIRCLE).nonzero().squeeze(1)


def _as_integers(x: Tensor) -> Tensor:
    """The bits: copying NaNs as floats may change theirs."""
    return _flat(x).view(INTEGER_OF_SIZE[x.element_size()])


def _swap_elsewhere(pairs: Pairs) -> None:
    for shadow, param in pairs:
        for s, p in _blocks(_as_integers(shadow), _as_integers(param), BLOCK):
            if s.dtype == p.dtype:
                kept = s.clone()
                s.copy_(p)
                p.copy_(kept)
            else:
                _exchange_rounded(s, p)


def _exchange_rounded(s: Tensor, p: Tensor) -> None:
    """Swap int32 with int16 by the formulas at the top of ``sad_kernels/ema.py``."""
    # Both results before either is written: pi of the upper half, pi^-1 of the parameter.
    low = s & 0xFFFF
    up = (low >= 0x8000).to(torch.int32)
    rounded = _turn((s >> 16) & 0xFFFF, up)
    residue = _turn(p.to(torch.int32) & 0xFFFF, -up)
    p.copy_(rounded.to(torch.int16))
    s.copy_((residue << 16) | low)


def _turn(bits: Tensor, by: Tensor) -> Tensor:
    """``pi`` (by = 1), its inverse (-1) or the identity (0) of bf16 bits held in int32.

    Steps along the circle of the magnitudes 1 to ``INFINITY``; zeros and NaNs are not on it.
    """
    magnitude = bits & 0x7FFF
    turned = torch.remainder(magnitude - 1 + by, INFINITY) + 1
    on_circle = (magnitude >= 1) & (magnitude <= INFINITY)
    return (bits & 0x8000) | torch.where(on_circle, turned, magnitude)


# --- Blocks --------------------------------------------------------------------------------------


def _by_place(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """The pairs on the CPU, and those elsewhere."""
    on_cpu = [pair for pair in pairs if pair[0].is_cpu]
    if len(on_cpu) == len(pairs):
        return on_cpu, []
    return on_cpu, [pair for pair in pairs if not pair[0].is_cpu]


def _by_dtypes(pairs: Pairs) -> Iterable[Pairs]:
    groups: dict[tuple[torch.dtype, torch.dtype], Pairs] = {}
    for s, p in pairs:
        groups.setdefault((s.dtype, p.dtype), []).append((s, p))
    return groups.values()


Batch = tuple[list[Tensor], list[Tensor], tuple[int, ...]]


def _batches(pairs: Pairs, shared: int) -> Iterator[Batch]:
    """Blocks of shadows, of parameters, and their sizes: one of ``_cpu_block()`` elements at most,
    or several of ``shared`` elements in all.

    A call for a list of small tensors costs less than one for each of them.
    """
    most, total = _cpu_block(), 0
    shadows: list[Tensor] = []
    params: list[Tensor] = []
    sizes: list[int] = []
    for shadow, param in pairs:
        for s, p in _blocks(shadow, param, most):
            n = s.numel()
            if shadows and total + n > shared:
                yield shadows, params, tuple(sizes)
                shadows, params, sizes, total = [], [], [], 0
            shadows.append(s)
            params.append(p)
            sizes.append(n)
            total += n
    yield shadows, params, tuple(sizes)


def _blocks(shadow: Tensor, param: Tensor, most: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Matching one-dimensional views of both tensors, in the order of their memory."""
    s, p = _flat(shadow), _flat(param)
    if s.numel() <= most:
        return ((s, p),)
    return zip(s.split(most), p.split(most), strict=True)


def _flat(x: Tensor) -> Tensor:
    """All elements of a dense tensor in the order of its memory."""
    return x if x.ndim == 1 else x.as_strided((x.numel(),), (1,))


class _Scratch:
    """A block that is cut into parts, which are kept: models have few sizes of tensors."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self.block = _empty(n, dtype)
        self._parts: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def parts(self, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        if sizes not in self._parts:
            self._parts[sizes] = self.block[: sum(sizes)].split_with_sizes(sizes)
        return self._parts[sizes]


def _empty(n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, dtype=dtype, device="cpu")


def _cpu_block() -> int:
    return BLOCK * torch.get_num_threads()
