"""Calls of the losses with a vocabulary that is split over forked ranks, judged as whole ones.

Each rank is given the whole tensors of a ``Problem`` and takes its columns of them, within the
graph: so its gradients are those of the whole tensors, zero in the columns of other ranks, and add
up to what one process has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from sad_kernels import Head, TeacherHidden, TeacherLogits, VocabShard
from torch import Tensor
from torch import distributed as dist

from support.oracle import Outputs, Problem, bound, measure
from support.ranks import run_ranks

Bounds = tuple[tuple[int, int], ...]

SPLIT = ("dlogits", "dweight", "dbias")
"""Gradients of which each rank has its own columns; all else is the same on all ranks."""


def bounds_of(kind: str, V: int, ranks: int) -> Bounds:
    """``even``: of equal widths but for one; ``uneven``: single columns, and the rest; ``empty``:
    the first rank has no column, the last one the last column."""
    if kind == "even":
        ends = [round(V * rank / ranks) for rank in range(ranks + 1)]
    elif kind == "uneven":
        ends = [*range(ranks), V]
    else:
        ends = [0, 0, *(V - ranks + rank for rank in range(2, ranks)), V]
        ends = ends if ranks > 1 else [0, V]
    return tuple(pairwise(ends))


def sharded(ops: Any, shard: VocabShard) -> Any:
    """The public functions of whole tensors, computed from the columns of one shard."""
    columns = slice(shard.start, shard.stop)

    def head_of(head: Head) -> Head:
        bias = None if head.bias is None else head.bias[columns]
        return replace(head, weight=head.weight[columns], bias=bias, shard=shard)

    def teacher_of(teacher: Any) -> Any:
        match teacher:
            case TeacherHidden(hidden=hidden, head=head):
                return TeacherHidden(hidden, head_of(head))
            case TeacherLogits(logits=logits):
                return replace(teacher, logits=logits[..., columns])
        return teacher

    def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Any:
        if labels.dtype.is_floating_point:
            labels = labels[..., columns]
        return ops.cross_entropy(logits[..., columns], labels, vocab_shard=shard, **options)

    def kl_div(logits: Tensor, teacher: Tensor, **options: Any) -> Any:
        own = logits[..., columns], teacher[..., columns]
        return ops.kl_div(*own, vocab_shard=shard, **options)

    def distill_loss(logits: Tensor, labels: Any, teacher: Any, *rest: Any, **options: Any) -> Any:
        own = logits[..., columns], labels, teacher_of(teacher)
        return ops.distill_loss(*own, *rest, vocab_shard=shard, **options)

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Any:
        bias = None if bias is None else bias[columns]
        return ops.linear_cross_entropy(
            hidden, weight[columns], labels, bias=bias, vocab_shard=shard, **options
        )

    def linear_distill_loss(
        hidden: Tensor, head: Head, labels: Any, teacher: Any, *rest: Any, **options: Any
    ) -> Any:
        own = hidden, head_of(head), labels, teacher_of(teacher)
        return ops.linear_distill_loss(*own, *rest, **options)

    return SimpleNamespace(
        cross_entropy=cross_entropy,
        kl_div=kl_div,
        distill_loss=distill_loss,
        linear_cross_entropy=linear_cross_entropy,
        linear_distill_loss=linear_distill_loss,
    )


def measure_sharded(
    problems: Sequence[Problem], bounds: Bounds, impl: str, chunk_bytes: int | None = None
) -> list[Outputs]:
    """The outputs of each problem on ``len(bounds)`` ranks: their own columns put together, all
    else asserted to be the same on all of them to the bit."""
    of_ranks = run_ranks(len(bounds), _measure, problems, bounds, impl, chunk_bytes)
    return [_together(list(of_one)) for of_one in zip(*of_ranks, strict=True)]


def _measure(
    problems: Sequence[Problem], bounds: Bounds, impl: str, chunk_bytes: int | None
) -> list[Outputs]:
    shard = VocabShard(*bounds[dist.get_rank()], bounds)
    ops = sharded(bound(impl, chunk_bytes), shard)
    return [measure(problem, ops) for problem in problems]


def _together(ranks: list[Outputs]) -> Outputs:
    for name, first in ranks[0].items():
        same = [
            torch.equal(outputs[name].nan_to_num(1e9), first.nan_to_num(1e9)) for outputs in ranks
        ]
        assert name in SPLIT or all(same), f"{name} must be the same on all ranks, got {ranks}"
    return {
        name: sum((outputs[name] for outputs in ranks[1:]), first) if name in SPLIT else first
        for name, first in ranks[0].items()
    }
