"""``linear_memory_bytes`` against torch's allocator, and what it refuses."""

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
    linear_distill_loss,
    linear_memory_bytes,
)
from sad_kernels.memory import ID_BYTES, LinearMemory, TeacherKind
from support.allocations import peak_bytes
from support.oracle import IMPLS
from torch import Tensor

SMALL = 64 << 10  # what a call takes whatever its size: flags, scalars, indices
MIB = 1 << 20


class Call:
    """A joint loss of given sizes, and what the function says of it."""

    def __init__(
        self,
        impl: str,
        N: int,
        V: int,
        D: int,
        *,
        teacher: TeacherKind | None = "hidden",
        width: int = 16,
        dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype | None = None,
        divergence: Any = "forward_kl",
        gradients: tuple[Any, ...] = ("hidden", "weight"),
        chunk_bytes: int | None = None,
    ) -> None:
        self.said: LinearMemory = linear_memory_bytes(
            N,
            V,
            D,
            teacher=teacher,
            teacher_width=0 if teacher in (None, "logits") else width,
            divergence=divergence,
            dtype=dtype,
            weight_dtype=weight_dtype,
            gradients=gradients,
            chunk_bytes=chunk_bytes,
            impl=impl,
        )
        leaves = {
            "hidden": torch.randn(N, D, dtype=dtype),
            "weight": torch.randn(V, D, dtype=weight_dtype or dtype),
            "bias": torch.randn(V, dtype=dtype),
        }
        self.wrt = [leaves[name].requires_grad_() for name in gradients]
        head = Head(leaves["weight"], leaves["bias"] if "bias" in gradients else None)
        labels = torch.randint(V, (N,))
        labels[0] = -100
        other: Any = None
        if teacher == "hidden":
            states, weight = torch.randn(N, width, dtype=dtype), torch.randn(V, width, dtype=dtype)
            other = TeacherHidden(states, Head(weight))
        elif teacher == "logits":
            other = TeacherLogits(torch.randn(N, V, dtype=dtype))
        elif teacher == "top_k":
            other = TeacherTopK(torch.arange(width).expand(N, -1), torch.full((N, width), -9.0))
        kd_weight = 0.0 if other is None else 0.5
        objective = Objective(ce_weight=0.5, kd_weight=kd_weight, divergence=divergence)

        def loss() -> Tensor:
            return linear_distill_loss(
                leaves["hidden"], head, labels, other, objective, chunk_bytes=chunk_bytes, impl=impl
            ).loss

        self.loss = loss

    def run(self) -> object:
        return torch.autograd.grad(self.loss(), self.wrt) if self.wrt else self.loss()

    @property
    def peak(self) -> int:
        self.run()  # what a process takes once
        return peak_bytes(self.run)


TORCH: dict[str, dict[str, Any]] = {
    "joint": {"chunk_bytes": MIB},
    "teacher's ids": {"teacher": "top_k", "width": 4, "chunk_bytes": MIB},
    "16 bits": {"dtype": torch.bfloat16, "weight_dtype": torch.float32, "chunk_bytes": MIB},
    "no gradients": {"gradients": (), "chunk_bytes": MIB},
    "a vocabulary smaller than a chunk": {},
    "terms of a mixture": {"divergence": "jsd"},
}
MORE: dict[str, dict[str, Any]] = {
    "no teacher": {"teacher": None, "chunk_bytes": MIB},
    "teacher's logits": {"teacher": "logits", "chunk_bytes": MIB},
    "fp64": {"dtype": torch.float64, "chunk_bytes": MIB},
    "bias": {"gradients": ("hidden", "weight", "bias"), "chunk_bytes": MIB},
    "hidden alone": {"gradients": ("hidden",), "chunk_bytes": MIB},
    "weight alone": {"gradients": ("weight",), "chunk_bytes": MIB},
    "terms of a KL": {"divergence": "reverse_kl"},
}


@pytest.mark.parametrize("name", [*TORCH, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_the_torch_path_takes_no_more_than_is_said(name: str) -> None:
    """Nor less than half of it, or the estimate would be of no use."""
    call = Call("torch", 300, 1500, 32, **(TORCH | MORE)[name])
    peak, said = call.peak, call.said
    assert peak <= said.total + said.logits / 4 + SMALL, said
    assert peak > said.total / 2, said


@pytest.mark.few(1)
@pytest.mark.parametrize("gradients", [True, False])
def test_ids_of_a_teacher_take_no_more_than_is_said(gradients: bool) -> None:
    """In 32 bits, partly padded and in tiles narrower than the vocabulary, as they take most."""
    N, V, D = 64, 1500, 32
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    leaves = [x.requires_grad_(gradients) for x in (hidden, weight)]
    labels = torch.zeros(N, dtype=torch.long)

    def peak_with(K: int) -> int:
        ids = torch.stack([torch.randperm(V)[:K] for _ in range(N)]).int()
        log_probs = torch.full((N, K), -9.0)
        log_probs[:, 1 + K // 2 :] = -torch.inf
        arguments = hidden, Head(weight), labels, TeacherTopK(ids, log_probs), Objective()

        def run() -> object:
            out = linear_distill_loss(*arguments, chunk_bytes=64 << 10, impl="torch")
            return torch.autograd.grad(out.loss, leaves) if gradients else out

        run()  # what a process takes once
        return peak_bytes(run)

    per_id = (peak_with(256) - peak_with(1)) / N / 255
    assert ID_BYTES / 2 < per_id <= ID_BYTES


def test_ignored_rows_take_no_logits() -> None:
    """Of 1024 rows 32 count: 14 MiB, where 125 are said of as many that all do."""
    N, V, D, labelled = 1024, 16384, 64, 32
    hidden, weight, theirs = (torch.randn(n, D) for n in (N, V, V))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    labels = torch.full((N,), -100)
    labels[:labelled] = 7
    teacher = TeacherHidden(torch.randn(N, D), Head(theirs))

    def run() -> object:
        out = linear_distill_loss(hidden, Head(weight), labels, teacher, Objective(), impl="torch")
        return torch.autograd.grad(out.loss, leaves)

    run()  # what a process takes once
    peak = peak_bytes(run)
    said, most = (
        linear_memory_bytes(n, V, D, teacher="hidden", teacher_width=D, impl="torch").total
        for n in (labelled, N)
    )
    assert said / 1.5 < peak < 1.5 * said < most


TRITON: dict[str, dict[str, Any]] = {
    "joint": {},
    "teacher's ids, no gradients": {"teacher": "top_k", "gradients": ()},
    "hidden alone": {"gradients": ("hidden",)},
    "fp32 weight": {"dtype": torch.bfloat16, "weight_dtype": torch.float32, "teacher": None},
}


@pytest.mark.skipif("triton" not in IMPLS, reason="triton is not installed")
@pytest.mark.parametrize("name", TRITON)
def test_the_kernels_take_no_more_than_is_said(name: str) -> None:
    """Slabs, sums and gradients are tensors; what interpreted kernels hold is NumPy's, unseen."""
    call = Call("triton", 6, 1100, 96, chunk_bytes=60 << 10, **TRITON[name])
    peak, said = call.peak, call.said.total
    assert peak <= said + SMALL, call.said
    assert peak > 0.5 * said, call.said


def test_no_memory_grows_with_tokens_times_vocabulary() -> None:
    sizes = (8192, 128256, 2048)
    for device in ("cpu", "cuda"):
        one = linear_memory_bytes(*sizes, teacher="hidden", teacher_width=4096, device=device)
        many = linear_memory_bytes(
            10 * sizes[0], *sizes[1:], teacher="hidden", teacher_width=4096, device=device
        )
        assert one.logits == many.logits
        assert one.total < 4 * sizes[0] * sizes[1]


@pytest.mark.skipif("triton" not in IMPLS, reason="triton is not installed")
def test_the_device_decides_like_a_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fp32 sum of the weight's gradient is the kernels' alone."""
    monkeypatch.setattr("sad_kernels._dispatch.INTERPRETED", False)
    sums = {
        (device, impl): linear_memory_bytes(8, 64, 16, device=device, impl=impl).weight_sum
        for device, impl in [("cpu", "auto"), ("cuda", "auto"), ("cuda", "torch")]
    }
    assert sums == {("cpu", "auto"): 0, ("cuda", "auto"): 4 * 64 * 16, ("cuda", "torch"): 0}
    wide = linear_memory_bytes(8, 64, 16, dtype=torch.float64, device="cuda")
    assert wide.weight_sum == 0  # the kernels take no float64


def test_refusals() -> None:
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "num_tokens must be an int", {"num_tokens": 8.0}),
        (ValueError, "vocab_size must be at least 1", {"vocab_size": 0}),
        (ValueError, "teacher must be one of", {"teacher": "topk"}),
        (ValueError, "teacher_width must be at least 1", {"teacher": "hidden"}),
        (ValueError, "gradients must be one of", {"gradients": ("head",)}),
        (ValueError, "chunk_bytes must be at least 1", {"chunk_bytes": 0}),
        (ValueError, "impl must be one of", {"impl": "cuda"}),
        (TypeError, "dtype must be", {"dtype": torch.int64}),
        (ValueError, "divergence must be one of", {"divergence": "kl"}),
    ]
    sizes: dict[str, Any] = {"num_tokens": 8, "vocab_size": 64, "hidden_size": 16}
    for error, message, change in refused:
        with pytest.raises(error, match=f"{message}.*, got .*; "):
            linear_memory_bytes(**(sizes | change))
