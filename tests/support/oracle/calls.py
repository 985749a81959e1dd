"""One call of a public function: what is called with what, and its outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import sad_kernels
import torch
from sad_kernels import DistillOutput, reference
from sad_kernels._dispatch import HAS_TRITON, INTERPRETED
from torch import Tensor

IMPLS = ("torch", "triton") if HAS_TRITON else ("torch",)
"""The implementations under test. Every test of ``sad_kernels`` runs once for each."""

ALL = ("reference", *IMPLS)
"""The specification and its implementations, for values that were computed by hand."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

COUNTS = frozenset({"num_tokens", "correct", "agree"})
"""Outputs that are counted, not computed: they must be equal."""

Outputs = dict[str, Tensor]


def dtypes_of(impl: str) -> tuple[torch.dtype, ...]:
    """What an implementation takes, widest first: the kernels refuse float64."""
    return DTYPES[1:] if impl == "triton" else DTYPES


IN_FLOAT64 = tuple(impl for impl in IMPLS if torch.float64 in dtypes_of(impl))
"""The implementations whose derivatives finite differences can check."""

SLOW = ("triton",) if INTERPRETED else ()
"""Implementations that get fewer and smaller cases: an interpreted program takes milliseconds."""


@dataclass(frozen=True)
class Problem:
    """One call of one public function, with everything that is needed to judge it.

    ``call(ops, leaves)`` makes the call, where ``ops`` has the public functions as attributes
    (``reference``, or ``bound(impl)``) and ``leaves`` are the floating-point tensors, in whatever
    precision. Outputs are named like the fields of ``DistillOutput``, and gradients "d" + leaf.
    """

    case: str
    call: Callable[[Any, dict[str, Tensor]], Any]  # a loss, or a DistillOutput
    leaves: Mapping[str, Tensor]
    wrt: tuple[str, ...]  # the leaves that require a gradient
    upstream: Tensor  # of the loss's shape
    scales: Mapping[str, float | Tensor]  # S_r where it is not max|o| over the tensor
    magnitude: float = 1.0  # max(1, max|z|) where logits z are computed, as in the linear ops
    zeros: Mapping[str, Tensor] = field(default_factory=dict)  # masks of what is exactly zero


def bound(impl: str, chunk_bytes: int | None = None, logits: str = "exact") -> Any:
    """The public functions with their mechanics filled in, callable like ``reference``."""
    if impl == "reference":
        return reference
    linear: dict[str, Any] = {"impl": impl, "chunk_bytes": chunk_bytes, "logits": logits}
    return SimpleNamespace(
        cross_entropy=partial(sad_kernels.cross_entropy, impl=impl),
        kl_div=partial(sad_kernels.kl_div, impl=impl),
        distill_loss=partial(sad_kernels.distill_loss, impl=impl),
        linear_cross_entropy=partial(sad_kernels.linear_cross_entropy, **linear),
        linear_distill_loss=partial(sad_kernels.linear_distill_loss, **linear),
        rounds_products=impl == "triton",
        plain_forms=impl == "triton",
    )


def measure(problem: Problem, ops: Any, leaves: Mapping[str, Tensor] | None = None) -> Outputs:
    """Every output of the call, and the gradient of every leaf that requires one."""
    given = problem.leaves if leaves is None else leaves
    own = {name: x.detach().requires_grad_(name in problem.wrt) for name, x in given.items()}
    result = problem.call(ops, own)
    outputs = result._asdict() if isinstance(result, DistillOutput) else {"loss": result}
    loss = outputs["loss"]
    assert loss.requires_grad == bool(problem.wrt), "the loss requires a gradient iff a leaf does"
    assert not any(x.requires_grad for name, x in outputs.items() if name != "loss")
    if problem.wrt:
        wrt = [own[name] for name in problem.wrt]
        grads = torch.autograd.grad(loss, wrt, problem.upstream.to(loss.dtype))
        outputs |= {f"d{name}": grad for name, grad in zip(problem.wrt, grads, strict=True)}
    return {name: x.detach() for name, x in outputs.items()}
