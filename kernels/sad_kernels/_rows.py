"""What both implementations share of a loss: its specification, its rows, their reduction.

In this order: ``LossSpec`` says what to compute for each row, ``RowTargets`` with what each row is
compared and how much it counts; ``RowLayout`` flattens the leading dimensions of the inputs to rows
and back; ``RowResults`` holds one number of each kind per row; and the functions at the end reduce
these to what the public functions return.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels.objective import DistillOutput, Objective
from sad_kernels.vocab import Bounds

# --- What is computed ----------------------------------------------------------------------------


class ShardSpec(NamedTuple):
    """A ``VocabShard`` as operators take it: without a process group, but with its name."""

    bounds: Bounds
    rank: int
    group: str
    sum_dhidden: bool


class LossSpec(NamedTuple):
    """What a loss computes for each row, without any tensor."""

    objective: Objective
    vocab: int
    """Columns of the logits that count, of all shards; labels lie in [0, vocab)."""
    ignore_index: int
    compute_ce: bool
    """Whether CE, z-loss and entropy are computed; in ``kl_div`` labels only say which rows count.
    Without any labels CE is 0."""
    compute_metrics: bool
    """Whether entropy, correct and agree are computed."""
    shard: ShardSpec | None = None
    """Which of the columns are here; None: all."""
    num_outcomes: int = 0
    """How many outcomes are compared in the place of columns; 0: columns."""
    teacher_columns: int = 0
    """Columns of the teacher's logits that count, where outcomes are compared."""

    @property
    def first(self) -> int:
        """The column that is the first one here."""
        return 0 if self.shard is None else self.shard.bounds[self.shard.rank][0]

    @property
    def widths(self) -> list[int]:
        """How many columns that count each shard has."""
        if self.shard is None:
            return [self.vocab]
        return [min(b, self.vocab) - min(a, self.vocab) for a, b in self.shard.bounds]

    @property
    def width(self) -> int:
        """How many columns that count are here."""
        return self.vocab if self.shard is None else self.widths[self.shard.rank]

    @property
    def column_counts(self) -> tuple[int, int, int]:
        """Columns of student and teacher, and outcomes: widths of what is worked on by row."""
        return self.vocab, self.teacher_columns, self.num_outcomes

    @property
    def widest(self) -> int:
        """The largest width: what is cut by it is cut alike on all ranks."""
        return max(self.widths)


class LogitTransform(NamedTuple):
    """What turns stored numbers into logits: ``softcap(logit_scale * x)``, see ``Head``."""

    logit_scale: float = 1.0
    softcap: float | None = None


class RowTargets(NamedTuple):
    """What the rows are compared with, beside a teacher, and how much each counts."""

    labels: Tensor | None = None
    """[N] int64, ``ignore_index`` in rows that do not count; None: all rows count."""
    soft: Tensor | None = None
    """[N, >= V] probabilities of the classes that are here, in the place of labels."""
    class_weight: Tensor | None = None
    """[>= V] factors on the classes of CE, of all shards, in the dtype of the arithmetic."""
    token_weights: Tensor | None = None
    """[N] factors on CE and z-loss, in the dtype of the arithmetic; None: 1."""
    kd_weights: Tensor | None = None
    """[N] factors on the divergence, likewise; the teacher's row is not read where it is 0."""
    other_rows: Tensor | None = None
    """[N] bool, the rows of the objective's ``other_divergence``."""
    outcomes: Tensor | None = None
    """[>= V] int32, the outcome of each of the student's columns; None: columns are compared."""
    teacher_outcomes: Tensor | None = None
    """[>= V_t] int32, of each of the teacher's; as the classes' weights not by row."""

    def at(self, rows: slice) -> RowTargets:
        """Those of some rows; what is by class or column is that of all."""
        some = RowTargets(*(None if x is None else x[rows] for x in self))
        return some._replace(**{name: getattr(self, name) for name in NOT_BY_ROW})


NOT_BY_ROW = ("class_weight", "outcomes", "teacher_outcomes")
"""The fields of ``RowTargets`` that are the same for all rows."""


# --- In which layout -----------------------------------------------------------------------------


class RowLayout:
    """The order in which the leading dimensions of ``x`` [..., K] are flattened to rows [N, K].

    By falling stride, so that a transposed input is flattened without a copy: logits laid out
    [s, b, V] and seen as [b, s, V] would otherwise be copied whole.
    """

    def __init__(self, x: Tensor) -> None:
        self.order = _by_falling_stride(x)
        self.shape = [x.shape[dim] for dim in self.order]

    def rows(self, x: Tensor) -> Tensor:  # [..., K] -> [N, K]
        N = -1 if x.shape[-1] > 0 else num_rows(x)  # which no -1 tells of 0 columns
        return x.permute(*self.order, -1).reshape(N, x.shape[-1])

    def flat(self, labels: Tensor) -> Tensor:  # [...] -> [N]
        return labels.permute(self.order).flatten()

    def restore(self, rows: Tensor) -> Tensor:  # [N] -> [...]
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return rows.reshape(self.shape).permute(inverse)


def num_rows(x: Tensor) -> int:
    """N of a tensor [..., K]."""
    count = 1
    for size in x.shape[:-1]:
        count *= size
    return count


def _by_falling_stride(x: Tensor) -> list[int]:
    """The leading dimensions, largest stride first, equal ones in their own order."""
    # An insertion sort, because torch.compile cannot call sorted() on symbolic strides.
    order: list[int] = []
    for dim in range(x.ndim - 1):
        at = len(order)
        while at > 0 and x.stride(order[at - 1]) < x.stride(dim):
            at -= 1
        order.insert(at, dim)
    return order


# --- Results, and their reduction ----------------------------------------------------------------


class RowResults(NamedTuple):
    """The losses and metrics of the rows, each [N], 0 in rows that do not count."""

    loss: Tensor  # ce_weight * ce + kd_weight * kd + z_loss * z; the only one with a gradient
    ce: Tensor  # this and the next two with the weights of tokens
    kd: Tensor
    z: Tensor
    correct: Tensor
    agree: Tensor
    entropy: Tensor
    lse: Tensor  # at temperature 1


def count_valid(labels: Tensor | None, ignore_index: int, x: Tensor) -> Tensor:  # x: [..., K]
    """The number of rows of ``x`` that count, on the device, in the dtype of their loss."""
    dtype = arithmetic_dtype(x)
    if labels is None:
        return x.new_full((), num_rows(x), dtype=dtype)
    return (labels != ignore_index).sum(dtype=dtype)


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """float32 for 16-bit numbers, their own dtype for others."""
    return torch.promote_types(x.dtype, torch.float32)


def mean_divisor(
    spec: LossSpec, targets: RowTargets, x: Tensor, num_items: int | Tensor | None
) -> Tensor:  # []
    """What the mean of a cross-entropy divides by: ``num_items``, or the rows that count, or with
    class weights the sum of their labels' weights, as in torch."""
    labels, weight = targets.labels, targets.class_weight
    if labels is None or weight is None or num_items is not None:
        return divisor_of(count_valid(labels, spec.ignore_index, x), num_items)
    inside = (labels >= 0) & (labels < spec.vocab) & (labels != spec.ignore_index)
    total = weight[labels.where(inside, 0)].where(inside, 0).sum()
    return torch.where(total == 0, torch.ones_like(total), total)


def reduce_rows(loss: Tensor, divisor: Tensor | None, reduction: str, layout: RowLayout) -> Tensor:
    """The row losses [N] as "none" [...], "sum" [] or "mean" []: the sum over ``divisor``."""
    if reduction == "none":
        return layout.restore(loss)
    return loss.sum() if divisor is None else loss.sum() / divisor


def divisor_of(num_tokens: Tensor, num_items: int | Tensor | None) -> Tensor:
    """``num_items``, or the number of valid rows if it is None; at least 1, [] on the device."""
    if isinstance(num_items, int):
        return torch.full_like(num_tokens, max(num_items, 1))
    items = num_tokens if num_items is None else num_items.to(num_tokens.dtype)
    return items.clamp(min=1)


def distill_output(
    loss: Tensor, rows: RowResults, num_tokens: Tensor, layout: RowLayout
) -> DistillOutput:
    """The public result: the loss, and sums over the rows of everything else but ``lse``."""
    return DistillOutput(
        loss=loss,
        ce=rows.ce.sum(),
        kd=rows.kd.sum(),
        z=rows.z.sum(),
        num_tokens=num_tokens,
        correct=rows.correct.sum(),
        agree=rows.agree.sum(),
        entropy=rows.entropy.sum(),
        lse=layout.restore(rows.lse).flatten(),
    )
