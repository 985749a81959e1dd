"""Buffers that are used again for every block of logits, and the fast exponential on them.

A fresh tensor of some megabytes costs a page fault for every 4 KiB, which takes longer than most
operations on it. So on a CPU each thread keeps its buffers for the next call: as many bytes as the
largest ``chunk_bytes`` so far, until ``release_scratch``. Elsewhere torch's allocator keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
GRAIN = 64
"""A multiple of the numbers that a CPU's widest vector instructions take at once."""


class Scratch:
    """Named buffers of one dtype; a name is one buffer, made as large as it was ever asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.buffers: dict[str, Tensor] = {}
        self.others: dict[torch.dtype, Scratch] = {}
        # exp2 reaches beyond the numbers that are asked for, see exp_.
        self.grain = GRAIN * torch.get_num_threads() if device.type == "cpu" else 1

    def of(self, dtype: torch.dtype) -> Scratch:
        """Buffers of another dtype, kept beside these."""
        return self.others.setdefault(dtype, Scratch(dtype, self.device))

    def like(self, name: str, shape: torch.Size | tuple[int, int]) -> Tensor:
        """A contiguous tensor of this shape, which holds anything."""
        count = math.prod(shape)
        return self._flat(name, count)[:count].view(shape)

    def exp_(
        self, name: str, x: Tensor, temperature: float = 1.0, *, to_the_bit: bool = False
    ) -> Tensor:
        """``exp(x / T)`` of x <= 0, in the buffer of that name.

        Its relative error is about ``|x / T|`` roundings by exp2, as that of a softmax in torch;
        ``to_the_bit`` it is one at T = 1 and 2, by exp, for differences of nearly equal numbers.
        torch's exp2 takes a third of the time of exp on a CPU, but its vector instructions and its
        loop over what is left at the end differ in the last bit, and with them a number's result by
        its place. So it is given whole vectors in every thread: the buffer ends in numbers that
        nobody reads.
        """
        count = x.numel()
        flat = self._flat(name, count)
        out = flat[:count].view(x.shape)
        if to_the_bit and temperature == 1:
            return torch.exp(x, out=out)
        if to_the_bit:
            return torch.mul(x, 1 / temperature, out=out).exp_()
        torch.mul(x, LOG2_E / temperature, out=out)
        flat[: self._padded(count)].exp2_()
        return out

    def _flat(self, name: str, count: int) -> Tensor:
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < self._padded(count):
            self.buffers.pop(name, None)  # its memory may serve the larger one
            # zeros, because what nobody reads must still be numbers that cost no more than others;
            # a tensor made in inference mode could not be written to in a later call outside of it
            with torch.inference_mode(False):
                buffer = torch.zeros(self._padded(count), dtype=self.dtype, device=self.device)
            self.buffers[name] = buffer
        return buffer

    def _padded(self, count: int) -> int:
        return -(-count // self.grain) * self.grain


_kept = local()


@contextmanager
def borrowed_scratch(dtype: torch.dtype, device: torch.device) -> Iterator[Scratch]:
    """The buffers that this thread keeps for the dtype, or new ones while they are in use."""
    kept: dict[tuple[torch.dtype, int], Scratch] = _kept.__dict__.setdefault("scratch", {})
    key = dtype, torch.get_num_threads()
    scratch = kept.pop(key, None) if device.type == "cpu" else None
    scratch = Scratch(dtype, device) if scratch is None else scratch
    yield scratch
    if device.type == "cpu":
        kept[key] = scratch


def release_scratch() -> None:
    """Free the buffers that this thread keeps."""
    _kept.__dict__.clear()
