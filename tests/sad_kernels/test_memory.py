"""The memory formulas of ``linear.py``, ``ce.py`` and ``kd.py``, held against torch's allocator.

The profiler's allocation events see every tensor of the torch path and nothing else, so they give
the same number each time; resident set sizes do not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sad_kernels import (
    Head,
    Objective,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    cross_entropy,
    distill_loss,
    linear_cross_entropy,
    linear_distill_loss,
)
from support.allocations import peak_bytes
from support.oracle import IMPLS
from torch import Tensor

A, B, B_PER_ID = 1.25, 256, 64  # the constants of linear.py's docstring
TILE = 8 << 20  # of the functions of logits
SMALL = 64 << 10  # what a call takes whatever its size: flags, scalars, indices


class Case:
    """A linear loss with its inputs, and what its docstring allows it."""

    def __init__(
        self,
        N: int = 700,
        V: int = 3000,
        D: int = 24,
        dtype: torch.dtype = torch.float32,
        *,
        teacher: str | None = "hidden",
        ignored: int = 0,
        softcap: float | None = None,
        bias: bool = False,
        chunk_bytes: int = 1 << 20,
        **objective: Any,
    ) -> None:
        self.chunk_bytes, self.D_t, self.K = chunk_bytes, 40, 16
        self.hidden = torch.randn(N, D).to(dtype).requires_grad_()
        self.weight = torch.randn(V, D).to(dtype).requires_grad_()
        self.bias = torch.randn(V).to(dtype).requires_grad_() if bias else None
        self.head = Head(self.weight, self.bias, softcap=softcap)
        self.labels = torch.randint(V, (N,))
        self.labels[:ignored] = -100
        self.kind = teacher
        self.teacher = self._teacher(N, V, dtype)
        kd_weight = 0.0 if teacher is None else 0.5
        self.objective = Objective(ce_weight=0.5, kd_weight=kd_weight, **objective)

    def _teacher(self, N: int, V: int, dtype: torch.dtype) -> Any:
        if self.kind == "hidden":
            head = Head(torch.randn(V, self.D_t).to(dtype))
            return TeacherHidden(torch.randn(N, self.D_t).to(dtype), head)
        if self.kind == "logits":
            return TeacherLogits(torch.randn(N, V).to(dtype))
        if self.kind == "topk":
            ids = torch.arange(self.K).repeat(N, 1)
            return TeacherTopK(ids, torch.full((N, self.K), 1 / (2 * self.K)).log())
        return None

    def forward(self) -> Tensor:
        return linear_distill_loss(
            self.hidden,
            self.head,
            self.labels,
            self.teacher,
            self.objective,
            chunk_bytes=self.chunk_bytes,
        ).loss

    def both(self) -> tuple[Tensor, ...]:
        leaves = [x for x in (self.hidden, self.weight, self.bias) if x is not None]
        return torch.autograd.grad(self.forward(), leaves)

    def allowed(self, backward: bool) -> float:
        N, D = self.hidden.shape
        valid = self.labels != -100
        n, itemsize = (
            int(valid.sum()),
            torch.promote_types(self.hidden.dtype, torch.float32).itemsize,
        )
        copied = n < N or itemsize != self.hidden.dtype.itemsize
        copies = copied * itemsize * n * (D + (self.D_t if self.kind == "hidden" else 0))
        rows = (B + B_PER_ID * self.K * (self.kind == "topk")) * N
        total = A * self.chunk_bytes + copies + rows + SMALL
        if backward:
            leaves = (self.hidden, self.weight, self.bias)
            total += sum(x.numel() * x.itemsize for x in leaves if x is not None)
            total += itemsize * n * D
        return total


CASES: dict[str, dict[str, Any]] = {
    "joint": {},
    "ce": {"teacher": None},
    "many rows": {"N": 3000, "V": 400},
    "few rows": {"N": 3, "V": 20000},
    "wide": {"N": 300, "V": 1500, "D": 700},
    "bf16": {"dtype": torch.bfloat16},
    "fp64": {"dtype": torch.float64},
    "ignored rows": {"ignored": 100},
    "softcap and bias": {"softcap": 20.0, "bias": True},
    "temperature": {"temperature": 2.0, "label_smoothing": 0.1, "z_loss": 0.01},
    "reverse": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd"},
    "skew": {"divergence": "skew_reverse_kl"},
    "teacher's logits": {"teacher": "logits"},
    "teacher's ids": {"teacher": "topk"},
    "large chunk": {"chunk_bytes": 8 << 20},
    "small chunk": {"chunk_bytes": 200_000},
}


BY_DEFAULT = ("joint", "ce", "bf16", "temperature", "teacher's ids")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in CASES],
)
def test_linear_losses_keep_their_formula(name: str) -> None:
    """Every kind of call, forward alone and with backward, stays below what ``linear.py`` says."""
    case = Case(**CASES[name])
    case.both()  # what a process takes once
    for call in (case.forward, case.both):  # the first may make the gradients
        assert peak_bytes(call) <= case.allowed(backward=True)
    with torch.no_grad():
        assert peak_bytes(case.forward) <= case.allowed(backward=False)


@pytest.mark.slow
def test_chunk_bytes_are_used() -> None:
    """The bound is no excuse for tiny tiles: a call that could use more takes at least half."""
    case = Case(N=2000, V=6000, chunk_bytes=4 << 20)
    case.both()
    assert peak_bytes(case.forward) > case.chunk_bytes / 2


@pytest.mark.slow
def test_no_memory_grows_with_tokens_times_vocabulary() -> None:
    """At fixed ``chunk_bytes``, doubling N adds rows, doubling V adds head, nothing adds N x V."""

    def peak(N: int, V: int) -> int:
        case = Case(N=N, V=V, D=8, teacher="hidden")
        case.both()
        return peak_bytes(case.both)

    N, V, D, itemsize = 1000, 2500, 8, 4
    base = peak(N, V)
    per_row = (peak(2 * N, V) - base) / N
    per_class = (peak(N, 2 * V) - base) / V
    slack = (A - 0.5) * (1 << 20)  # how full the chunks are may change
    assert per_row <= 2 * D * itemsize + B + slack / N
    assert per_class <= D * itemsize + slack / V
    assert peak(2 * N, 2 * V) - base <= N * per_row + V * per_class + 2 * slack < 4 * N * V


@pytest.mark.slow
def test_without_gradients_nothing_is_kept() -> None:
    """Under ``no_grad`` the call leaves a few numbers, and frozen leaves get no gradient memory."""
    case = Case(N=200, V=20000, D=32)
    case.both()
    with torch.no_grad():
        assert peak_bytes(case.forward) <= case.allowed(backward=False)

    case.weight.requires_grad_(False)
    case.hidden.grad = None

    def hidden_only() -> tuple[Tensor, ...]:
        return torch.autograd.grad(case.forward(), [case.hidden])

    weight_bytes = case.weight.numel() * case.weight.itemsize
    assert peak_bytes(hidden_only) <= case.allowed(backward=True) - weight_bytes


@pytest.mark.skipif("triton" not in IMPLS, reason="triton is not installed")
def test_chunks_around_the_kernels_share_one_gradient_of_the_weight() -> None:
    """What interpreted kernels hold is NumPy's and unseen, but slabs and gradients are tensors.

    https://github.com/linkedin/Liger-Kernel/issues/1323: as much as the weight, once per chunk.
    """
    N, V, D, chunk_bytes = 8, 1000, 512, 20 << 10
    hidden, weight = torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_()
    y = torch.randint(V, (N,))

    def forward() -> Tensor:  # in two chunks, and with the gradients
        return linear_cross_entropy(hidden, weight, y, chunk_bytes=chunk_bytes, impl="triton")

    forward()  # what a process takes once
    gradients = 4 * (N + V) * D
    assert gradients < peak_bytes(forward) <= gradients + A * chunk_bytes + B * N + SMALL


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_logits_take_tiles_and_one_gradient(dtype: torch.dtype) -> None:
    """Beyond the inputs: the gradient, and six tiles at most, in fp32 whatever the logits are."""
    N, V = 1500, 20000
    logits = torch.randn(N, V).to(dtype).requires_grad_()
    labels, teacher = torch.randint(V, (N,)), TeacherLogits(torch.randn(N, V).to(dtype))
    objective = Objective(ce_weight=0.5, temperature=2.0)

    def ce() -> Tensor:
        return torch.autograd.grad(cross_entropy(logits, labels), logits)[0]

    def joint() -> Tensor:
        loss = distill_loss(logits, labels, teacher, objective).loss
        return torch.autograd.grad(loss, logits)[0]

    gradient = logits.numel() * logits.itemsize
    assert peak_bytes(ce) <= gradient + 6 * TILE + B * N
    assert peak_bytes(joint) <= gradient + 6 * TILE + B * N
