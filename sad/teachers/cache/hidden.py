r"""Codecs of a teacher's final hidden states: what a cache stores of a position, and back.

==========  ==============  =======================================================================
``bf16``    2 D bytes       the states, rounded to bfloat16: what a bfloat16 teacher gives
``int8``    D + 4 bytes     minus the mean, rotated, one fp32 scale per position
==========  ==============  =======================================================================

One scale per position serves all of its D channels, and in trained models a few of them are many
times as large as the others: these would lose most of their 8 bits. So ``int8`` stores
``round(H S P (h - mean) / scale)``: a permutation P, random signs S, and the Hadamard matrix H in
blocks of 64 channels (where 64 does not divide D, of the largest power of two that does), which
spread each channel over its block. All of them are orthogonal and are undone when the record is
read, so that the teacher's head stays as it is. ``scale`` is the largest absolute value over 127; a
rotated channel errs by at most ``scale / 2``, and a position, in the 2-norm, by at most
``sqrt(D) scale / 2``.

float16 is not offered: hidden states of real models pass its largest number, 65,504.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from sad.errors import UnfitError

Record = dict[str, Tensor]

CODECS = ("bf16", "int8")
BLOCK = 64
"""Channels that are mixed with each other: as good as more of them, and cheap."""
_LEVELS = 127
_CHUNK = 2**18
"""Numbers that are decoded together on a CPU: 1 MiB in fp32, which its caches hold."""


class Codec(Protocol):
    """Turns final hidden states into records and back; ``name`` is one of ``CODECS``."""

    @property
    def name(self) -> str: ...

    def encode(self, x: Tensor) -> Record: ...

    def decode(self, record: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor: ...

    def tensors(self) -> Record: ...

    def to(self, device: torch.device | str) -> Codec: ...


class Bf16Codec:
    """Hidden states rounded to bfloat16: exact for a teacher that runs in bfloat16."""

    name = "bf16"

    def encode(self, x: Tensor) -> Record:
        """``hidden`` bfloat16 [..., D]. Raises ``UnfitError`` for states that are not finite."""
        require_finite(x)
        return {"hidden": _cast(x, torch.bfloat16)}

    def decode(self, record: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The states [..., D] in ``dtype``, which should be that of the teacher's head."""
        return _cast(record["hidden"], dtype)

    def tensors(self) -> Record:
        """What has to be kept beside the records: nothing."""
        return {}

    def to(self, device: torch.device | str) -> Bf16Codec:
        return self


class Int8Codec:
    """Hidden states in 8 bits per channel: centred, rotated, one scale per position.

    ``mean`` [D] is subtracted, channel ``permutation[i]`` comes to place i and is multiplied by
    ``signs[i]``, then blocks of channels are rotated. Raises ``UnfitError`` for tensors that are no
    such basis.
    """

    name = "int8"

    def __init__(self, mean: Tensor, permutation: Tensor, signs: Tensor) -> None:
        self.mean = mean.float()
        self.permutation = permutation.long()
        self.signs = signs.float()
        self._check()
        self.width = len(self.mean)
        self.block = math.gcd(self.width, BLOCK)
        self._inverse = self.permutation.argsort()
        self._inverse_signs = self.signs[self._inverse]
        self._signs_of_block = _hadamard_signs(self.block, self.mean.device)

    @classmethod
    def fitted(cls, states: Tensor, seed: int = 0) -> Int8Codec:
        """The mean of a sample of states [m, D], of which some hundred will do, with a permutation
        and signs drawn from ``seed``. They lie on the states' device, and do not depend on it."""
        if states.ndim != 2 or not states.numel():
            raise ValueError(
                f"states must be [m, D] with some of both, got {tuple(states.shape)}; pass a sample"
            )
        require_finite(states)
        generator = torch.Generator().manual_seed(seed)
        width = states.shape[1]
        permutation = torch.randperm(width, generator=generator)
        signs = 1 - 2 * torch.randint(2, (width,), generator=generator)
        mean = states.double().mean(0).float()
        return cls(mean, permutation.to(mean.device), signs.to(mean.device))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Int8Codec:
        """The codec whose ``tensors()`` these are; ``UnfitError`` if they are not."""
        missing = {"mean", "permutation", "signs"} - tensors.keys()
        if missing:
            raise UnfitError(
                f"basis of int8 hidden states must hold {', '.join(sorted(missing))}, got "
                f"{', '.join(sorted(tensors)) or 'nothing'}; make the cache again"
            )
        return cls(tensors["mean"], tensors["permutation"], tensors["signs"])

    def tensors(self) -> Record:
        """What has to be kept beside the records: ``mean`` float32, ``permutation`` int32 and
        ``signs`` int8, all [D]."""
        return {
            "mean": self.mean,
            "permutation": self.permutation.to(torch.int32),
            "signs": self.signs.to(torch.int8),
        }

    def to(self, device: torch.device | str) -> Int8Codec:
        """The same codec on another device; itself if it is there already."""
        device = torch.device(device)
        if device == self.mean.device:
            return self
        parts = (self.mean, self.permutation, self.signs)
        return Int8Codec(*(part.to(device) for part in parts))

    def encode(self, x: Tensor) -> Record:
        """``hidden`` int8 [..., D] and ``scale`` float32 [...], on the codec's device.

        Raises ``UnfitError`` for states that are not finite, or of another width.
        """
        self._require_width(x)
        require_finite(x)
        x = x.to(self.mean.device, torch.float32)
        # In units of the row's power of two: neither the difference nor the rotation overflows.
        unit = _power_of_two(torch.maximum(_largest(x), self.mean.abs().amax()))
        centred = x / unit - self.mean / unit
        rotated = _rotated(centred[..., self.permutation] * self.signs, self.block)
        step = _largest(rotated) / _LEVELS
        levels = (rotated / torch.where(step > 0, step, 1.0)).round_().clamp_(-_LEVELS, _LEVELS)
        return {"hidden": levels.to(torch.int8), "scale": (step * unit).squeeze(-1)}

    def decode(self, record: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The states [..., D] in ``dtype``, which should be that of the teacher's head.

        Raises ``UnfitError`` for records of another width.
        """
        levels = record["hidden"].to(self.mean.device)
        self._require_width(levels)
        scale = record["scale"].to(self.mean.device) / math.sqrt(self.block)
        rows = scale.numel() if levels.device.type != "cpu" else _CHUNK // self.width
        chunks = [
            whole.reshape(-1, width).split(max(rows, 1))
            for whole, width in ((levels, self.width), (scale, 1))
        ]
        with torch.autocast(levels.device.type, enabled=False):
            x = torch.cat(
                [_cast(self._decoded(*chunk), dtype) for chunk in zip(*chunks, strict=True)]
            )
        return x.view(levels.shape)

    def _decoded(self, levels: Tensor, scale: Tensor) -> Tensor:
        """float32 [n, D] of levels [n, D] and the scales [n, 1] of rotated channels."""
        # Whole numbers: their sums are exact in whatever order, and cannot overflow.
        x = levels.float()
        x = (x.unflatten(-1, (-1, self.block)) @ self._signs_of_block).flatten(-2)
        x = x.index_select(-1, self._inverse)
        return x.mul_(self._inverse_signs).mul_(scale).add_(self.mean)

    def _require_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.width:
            raise UnfitError(
                f"hidden states must have the width of their basis, {self.width}, got "
                f"{x.shape[-1]}; make the cache again with this teacher"
            )

    def _check(self) -> None:
        D = self.mean.numel()
        whole = torch.arange(D, device=self.permutation.device)
        fits = (
            self.mean.shape == self.permutation.shape == self.signs.shape == (D,)
            and bool(self.mean.isfinite().all())
            and torch.equal(self.permutation.sort().values, whole)
            and bool((self.signs.abs() == 1).all())
        )
        if not fits:
            raise UnfitError(
                "basis of int8 hidden states must be a finite mean, a permutation and signs of 1 "
                "and -1, all of one width, got others; make the cache again"
            )


def build_codec(
    name: str,
    *,
    states: Tensor | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Codec:
    """The codec of this name: a new one, fitted to a sample of ``states`` [m, D], or the one whose
    ``tensors()`` were kept. Only ``int8`` needs either. Raises ``UnfitError`` for an unknown name.
    """
    match name:
        case "bf16":
            return Bf16Codec()
        case "int8" if tensors is not None:
            return Int8Codec.from_tensors(tensors)
        case "int8" if states is not None:
            return Int8Codec.fitted(states, seed)
        case "int8":
            raise ValueError("int8 must be fitted to states or read from tensors, got neither")
    raise _unknown(name)


def hidden_bytes(name: str, width: int) -> int:
    """Bytes per position of a codec, for hidden states of this width; ``UnfitError`` for an unknown
    name."""
    match name:
        case "bf16":
            return 2 * width
        case "int8":
            return width + 4
    raise _unknown(name)


def require_finite(x: Tensor) -> None:
    """Raise ``UnfitError`` that names the first NaN or infinity of hidden states [..., D]."""
    finite = x.isfinite()
    if bool(finite.all()):
        return
    wrong = (~finite).flatten(0, -2).nonzero() if x.ndim > 1 else (~finite)[None].nonzero()
    row, channel = wrong[0].tolist()
    value = x.reshape(-1, x.shape[-1])[row, channel].item()
    raise UnfitError(
        f"teacher's final hidden states must be finite, got {value} at position {row}, channel "
        f"{channel}, and {len(wrong) - 1:,} more; check the teacher's dtype "
        "(teacher_dtype: bfloat16 does not overflow)"
    )


def _rotated(x: Tensor, block: int) -> Tensor:
    """H x in blocks, by sums and differences of pairs.

    A product of matrices sums in an order that depends on how many rows there are; these bits do
    not.
    """
    width = 1
    while width < block:
        first, second = x.unflatten(-1, (-1, 2, width)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        width *= 2
    return x / math.sqrt(block)


def _hadamard_signs(n: int, device: torch.device | str) -> Tensor:
    """The symmetric Hadamard matrix [n, n] of Sylvester, of 1 and -1, for n a power of two. Over
    ``sqrt(n)`` it is orthogonal and its own inverse."""
    H = torch.ones(1, 1, device=device)
    while len(H) < n:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def _power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is at most x; 1 for 0."""
    exponent = torch.frexp(x).exponent - 1
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), exponent), 1.0)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``; what would be rounded to infinity becomes the largest number there is."""
    limit = torch.finfo(dtype).max
    # As float32: bfloat16 would round the limit of float16 up.
    fits = torch.finfo(x.dtype).max < limit or x.dtype == dtype == torch.bfloat16
    return x.to(dtype) if fits else x.float().clamp(-limit, limit).to(dtype)


def _unknown(name: str) -> UnfitError:
    return UnfitError(
        f"codec of hidden states must be one of {', '.join(CODECS)}, got {name!r}; choose one of "
        "these"
    )
