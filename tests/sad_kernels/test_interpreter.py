"""The tests' interpreter is quicker than Triton's own: it must give the same bits, and clean up."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import ORIGINAL
from support.oracle import bound, measure
from support.problems import plain
from support.traffic import needs_interpreter

pytestmark = needs_interpreter

OPS = ("cross_entropy", "kl_div", "distill_loss", "linear_cross_entropy", "linear_distill_loss")


@pytest.mark.parametrize("op", OPS)
def test_the_bits_are_those_of_tritons_own_interpreter(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    problem = plain(op, torch.bfloat16, N=3, V=40, ignore="first", divergence="jsd")
    ours = measure(problem, bound("triton"))
    for name, value in ORIGINAL.items():
        monkeypatch.setattr(interpreter, name, value)
    for name, value in measure(problem, bound("triton")).items():
        assert torch.equal(ours[name], value), name


def test_the_language_is_as_before_after_a_launch() -> None:
    """Also after one that fails, whose patches the next launch would take for its own."""
    import triton
    import triton.language as tl

    @triton.jit
    def fails(x_ptr, N: tl.constexpr):
        tl.store(x_ptr, tl.sum(tl.arange(0, N)))
        raise ValueError

    x, before = torch.zeros(1, dtype=torch.int32), (tl.load, tl.arange, tl.range, tl.tensor.to)
    for _ in range(2):
        with pytest.raises(Exception, match="ValueError"):
            fails[(1,)](x, N=4)  # pyright: ignore[reportArgumentType]
        assert x.item() == 6
        assert (tl.load, tl.arange, tl.range, tl.tensor.to) == before
