"""Argument checks: shapes, dtypes, devices and ranges, before any work is done.

A bad shape, dtype or option raises here, in one form: what must hold, what came, what to do. A bad
value inside a tensor is not looked for, which would cost a pass over it and a wait for the device:
it turns its own row's loss into NaN.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sad_kernels._divergence_table import DIVERGENCES
from sad_kernels._rows import RowLayout, RowTargets, ShardSpec, arithmetic_dtype, num_rows
from sad_kernels.objective import (
    Head,
    Objective,
    Teacher,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    require_leaf,
    require_no_grad,
    require_valid_vocab,
)
from sad_kernels.outcomes import Outcomes
from sad_kernels.vocab import VocabShard, rank_and_group, require_shard

Reduction = Literal["mean", "sum", "none"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_rows(name: str, x: object, *, may_be_empty: bool = False) -> Tensor:
    """Require a floating-point tensor [..., features], and return it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}; pass a torch.Tensor")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; convert them"
        )
    if x.ndim == 0:
        raise ValueError(f"{name} must have shape [..., features], got a scalar; pass rows")
    if x.shape[-1] == 0 and not may_be_empty:
        raise ValueError(f"{name} must have at least one column, got {shape(x)}; check the slice")
    require_plain(name, x)
    return x


def require_plain(name: str, x: Tensor) -> None:
    """Refuse what no loss can be computed of: distributed tensors, and forward-mode derivatives."""
    if torch.compiler.is_compiling():  # which traces neither question
        return
    if is_distributed(x):
        raise TypeError(
            f"{name} must be a plain tensor, got {type(x).__name__}; pass its to_local(), and for "
            "a head or logits split over ranks by columns also VocabShard.of(it), as "
            "Head(..., shard=...) or vocab_shard="
        )
    if _has_tangent(x):
        raise NotImplementedError(
            f"{name} must not carry a forward-mode derivative, got a dual tensor (jvp); a loss has "
            "a backward only: call torch.func.grad or vjp, or the function of this name in "
            "sad_kernels.reference"
        )


def is_distributed(x: Tensor) -> bool:
    """Whether x is a DTensor, or another kind of tensor that is spread over processes."""
    return type(x).__module__.startswith("torch.distributed")


def _has_tangent(x: Tensor) -> bool:
    """Whether x carries a forward-mode derivative, in ``torch.autograd.forward_ad`` or a jvp."""
    if forward_ad._current_level < 0:
        return False
    try:
        return forward_ad.unpack_dual(x).tangent is not None
    except RuntimeError:  # under vmap a tangent cannot be looked for: there is a jvp, so refuse
        return True


def require_labels(labels: object, x: Tensor, name: str) -> Tensor:
    """Require a tensor of one integer per row of ``x`` [..., columns], and return it."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an integer tensor, got {type(labels).__name__}; pass one")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {labels.dtype}; pass class ids")
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have one entry per row of {name} {shape(x)}, got {shape(labels)}; "
            f"pass labels of shape {tuple(x.shape[:-1])}"
        )
    require_device("labels", labels, x, name)
    return labels


def require_device(what: str, tensor: Tensor, x: Tensor, name: str) -> None:
    """Require a plain tensor on the device of ``x``."""
    require_plain(what, tensor)
    if tensor.device != x.device:
        raise ValueError(
            f"{what} must be on the device of {name}, {x.device}, got {tensor.device}; move them"
        )


def require_head(head: object, hidden: Tensor, whose: str = "") -> Head:
    """Require a head for hidden states [..., D]: of one dtype, or fp32 beside 16-bit states."""
    if not isinstance(head, Head):
        raise TypeError(f"{whose}head must be a Head, got {type(head).__name__}; wrap the weight")
    weight, bias = head.weight, head.bias
    require_plain(f"{whose}head weight", weight)
    if bias is not None:
        require_plain(f"{whose}head bias", bias)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{whose}hidden must have the {weight.shape[1]} features of its head's weight "
            f"{shape(weight)}, got {shape(hidden)}; pass the states before the output embedding"
        )
    mixed = hidden.dtype.itemsize == 2 and weight.dtype == torch.float32
    if weight.dtype != hidden.dtype and not mixed:
        raise TypeError(
            f"{whose}head weight must have the dtype of its hidden states, {hidden.dtype}, or be "
            f"float32 beside 16-bit states, got {weight.dtype}; convert one of them"
        )
    require_device(f"{whose}head weight", weight, hidden, f"{whose}hidden")
    if bias is not None:
        if bias.dtype not in FLOATS:
            raise TypeError(
                f"{whose}head bias must be a floating-point tensor, got {bias.dtype}; convert it"
            )
        require_device(f"{whose}head bias", bias, hidden, f"{whose}hidden")
    return head


def require_objective(objective: object, teacher: object, *, has_labels: bool) -> Objective:
    """Require an objective that can be computed with this teacher, and with or without labels."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective must be an Objective, got {type(objective).__name__}; build one"
        )
    if teacher is None and objective.kd_weight > 0:
        raise ValueError(
            f"teacher must be given for kd_weight > 0, got None with {objective.kd_weight}; "
            "pass a teacher, or an objective with kd_weight=0"
        )
    if not has_labels and objective.ce_weight > 0:
        raise ValueError(
            f"labels must be given for ce_weight > 0, got None with {objective.ce_weight}; "
            "pass labels, or an objective with ce_weight=0"
        )
    if isinstance(teacher, TeacherTopK):
        if objective.teacher_share != 1:
            raise ValueError(
                "teacher_share must be 1 for a TeacherTopK, whose logits are not known, got "
                f"{objective.teacher_share}; pass TeacherHidden or TeacherLogits"
            )
        for name in objective.divergences:
            if teacher.tail == "zero" and DIVERGENCES[name].needs_full_support:
                raise ValueError(
                    f"divergence must not be {name} for a teacher with tail='zero', got {name}; "
                    "it is infinite there: use tail='bucket' or another divergence"
                )
    return objective


def require_teacher(teacher: object, x: Tensor, name: str) -> None:
    """Require a teacher with one row per row of ``x``, on its device, without a gradient."""
    match teacher:
        case None:
            return
        case TeacherHidden(hidden=tensor, head=head):
            what = "teacher hidden"
            require_leaf("teacher head weight", head.weight)
            if head.bias is not None:
                require_leaf("teacher head bias", head.bias)
        case TeacherLogits(logits=tensor):
            what = "teacher logits"
        case TeacherTopK(log_probs=tensor, ids=ids):
            what = "teacher log_probs"
            require_device("teacher ids", ids, x, name)
        case _:
            raise TypeError(
                "teacher must be a TeacherHidden, TeacherLogits or TeacherTopK, "
                f"got {type(teacher).__name__}; wrap its tensors in one of these"
            )
    # An empty shard's logits: what is too narrow otherwise, the common vocabulary tells.
    require_rows(what, tensor, may_be_empty=isinstance(teacher, TeacherLogits))
    require_no_grad(what, tensor)
    if tensor.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{what} must have the rows of {name} {shape(x)}, got {shape(tensor)}; "
            f"pass shape {(*x.shape[:-1], '...')}"
        )
    require_device(what, tensor, x, name)
    if isinstance(teacher, TeacherHidden):
        require_head(teacher.head, teacher.hidden, "teacher ")


def row_targets(
    x: Tensor,  # [..., columns]
    name: str,  # of x, for messages
    layout: RowLayout,
    objective: Objective,
    *,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    kd_token_weights: Tensor | None = None,
    other_rows: Tensor | None = None,
) -> RowTargets:
    """Check what rows are compared with and how much each counts, and flatten it to rows."""
    if labels is not None:
        labels = layout.flat(require_labels(labels, x, name)).long()
    dtype = arithmetic_dtype(x)

    def weights(what: str, given: object) -> Tensor | None:
        if given is None:
            return None
        flat = _per_row(what, given, x, name, layout)
        if not flat.dtype.is_floating_point:
            raise TypeError(f"{what} must be a floating-point tensor, got {flat.dtype}; convert it")
        require_no_grad(what, flat)
        return flat.to(dtype)

    on_ce = weights("token_weights", token_weights)
    on_kd = on_ce if kd_token_weights is None else weights("kd_token_weights", kd_token_weights)
    other = None
    if other_rows is not None:
        other = _per_row("other_rows", other_rows, x, name, layout)
        if other.dtype != torch.bool:
            raise TypeError(f"other_rows must be a bool tensor, got {other.dtype}; pass a mask")
    if (other is None) != (objective.other_divergence is None):
        raise ValueError(
            "other_rows must be given together with the objective's other_divergence, got "
            f"{'no rows' if other is None else 'rows'} and {objective.other_divergence!r}; pass "
            "both or neither"
        )
    return RowTargets(labels, token_weights=on_ce, kd_weights=on_kd, other_rows=other)


def _per_row(what: str, x: object, rows: Tensor, name: str, layout: RowLayout) -> Tensor:  # [N]
    """A tensor of one entry per row, given in the rows' shape or flattened."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(x).__name__}; pass one entry per row")
    shapes = rows.shape[:-1], (num_rows(rows),)
    if tuple(x.shape) not in (tuple(each) for each in shapes):
        raise ValueError(
            f"{what} must have one entry per row of {name} {shape(rows)}, got {shape(x)}; "
            f"pass shape {tuple(shapes[0])}"
        )
    require_device(what, x, rows, name)
    return layout.flat(x.reshape(shapes[0]))


def class_weight(
    weight: object, x: Tensor, name: str, vocab: int, width: int, what: str = "weight"
) -> Tensor | None:  # [vocab]
    """Check the weights of classes: one for each that counts, or for each of ``width`` columns.

    Of all shards: a label may lie in any of them.
    """
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{what} must be a floating-point tensor, got {got}; pass one per class")
    if weight.ndim != 1 or weight.shape[0] not in (vocab, width):
        raise ValueError(
            f"{what} must have one entry for each of the {vocab} classes, got {shape(weight)}; "
            f"pass shape ({vocab},)"
        )
    require_no_grad(what, weight)
    require_device(what, weight, x, name)
    return weight[:vocab].to(arithmetic_dtype(x)).contiguous()


def soft_labels(labels: Tensor, logits: Tensor, layout: RowLayout) -> Tensor:  # [N, V]
    """Check the probabilities of classes that take the place of labels."""
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels that are probabilities must have the logits' shape {shape(logits)}, got "
            f"{shape(labels)}; pass integer labels for one class per row"
        )
    require_rows("labels", labels, may_be_empty=True)  # as the logits are, if they may be
    require_no_grad("labels", labels)
    require_device("labels", labels, logits, "logits")
    return layout.rows(labels)


def require_divisor(num_items: object, reduction: str, x: Tensor, name: str) -> None:
    """Require that ``num_items`` is only given for a mean, whose divisor it replaces."""
    require_num_items(num_items, x, name)
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"num_items must be None unless reduction='mean', got {num_items!r} with "
            f"{reduction!r}; leave it out"
        )


def shard_of_columns(
    name: str, shard: object, columns: int, teacher: Teacher | None, outcomes: object = None
) -> ShardSpec | None:
    """Check a shard of logits or a head of so many columns, and the teacher's: it has the same.

    Returns it as operators take it. Waits for no other rank.
    """
    require_shard(name, shard)
    if shard is None:
        other = teacher.head.shard if isinstance(teacher, TeacherHidden) else None
        if other is not None:
            raise ValueError(
                f"student and teacher must have equal bounds, got the whole vocabulary and "
                f"{other.bounds}; give the student's as {name}"
            )
        return None
    assert isinstance(shard, VocabShard)
    if outcomes is not None:
        raise ValueError(
            f"outcomes must be compared on whole rows of logits, got {name} {shard.start} to "
            f"{shard.stop}; gather the logits or the heads"
        )
    if columns != shard.width:
        raise ValueError(
            f"{name} must have the {columns} columns of the student's logits, got "
            f"{shard.start} to {shard.stop}; pass the logits of these columns alone"
        )
    match teacher:
        case TeacherHidden(head=head):
            bounds = None if head.shard is None else head.shard.bounds
            if bounds != shard.bounds:
                raise ValueError(
                    f"student and teacher must have equal bounds, got {shard.bounds} and "
                    f"{bounds or 'the whole vocabulary'}; give the teacher Head(..., shard=...)"
                )
        case TeacherLogits(logits=logits):
            if logits.shape[-1] != shard.width:
                raise ValueError(
                    f"teacher logits must have the {shard.width} columns of the shard, got "
                    f"{shape(logits)}; pass the logits of these columns alone"
                )
    return ShardSpec(shard.bounds, *rank_and_group(name, shard), bool(shard.sum_dhidden))


def common_vocab(
    width: int, valid_vocab: int | None, teacher: Teacher | None, shard: ShardSpec | None = None
) -> int:
    """The number of columns that count on both sides; raise if the two do not agree on it.

    Beside a shard ``width`` is that of the whole vocabulary, and a teacher's logits have as many.
    """
    match teacher:
        case TeacherHidden(head=head):
            teacher_width, teacher_valid = head.num_columns, head.valid_vocab
        case TeacherLogits(logits=logits):
            teacher_width = logits.shape[-1] if shard is None else width
            teacher_valid = teacher.valid_vocab
        case _:
            teacher_width, teacher_valid = width, None
    require_valid_vocab(valid_vocab, width)
    if valid_vocab is None and teacher_valid is None:
        if width != teacher_width:
            raise ValueError(
                f"student and teacher must have equally many columns, got {width} and "
                f"{teacher_width}; pass valid_vocab, the number of ids of their tokenizer"
            )
        return width
    if None not in (valid_vocab, teacher_valid) and valid_vocab != teacher_valid:
        raise ValueError(
            f"student and teacher must have one valid_vocab, got {valid_vocab} and "
            f"{teacher_valid}; pass the number of ids of their common tokenizer"
        )
    vocab = valid_vocab if valid_vocab is not None else teacher_valid
    assert vocab is not None
    require_valid_vocab(vocab, min(width, teacher_width))
    return vocab


class ComparedColumns(NamedTuple):
    """The columns that count on either side, and into how many outcomes they are summed up."""

    vocab: int
    num_outcomes: int = 0  # 0: columns are compared
    teacher_columns: int = 0


def compared_columns(
    width: int,
    valid_vocab: int | None,
    teacher: Teacher | None,
    shard: ShardSpec | None,
    objective: Objective,
    outcomes: object,
    x: Tensor,
    name: str,  # of x, for messages
) -> ComparedColumns:
    """``common_vocab``, or with outcomes the columns of each side, which then may differ."""
    if outcomes is None:
        return ComparedColumns(common_vocab(width, valid_vocab, teacher, shard))
    if not isinstance(outcomes, Outcomes):
        raise TypeError(
            f"outcomes must be an Outcomes, got {type(outcomes).__name__}; wrap the two tables"
        )
    if teacher is None:
        raise ValueError(
            "teacher must be given with outcomes, got None; pass a teacher or leave them out"
        )
    if objective.divergences != ("forward_kl",):
        raise ValueError(
            "divergence must be forward_kl for outcomes, got "
            f"{' and '.join(objective.divergences)}; pass Objective(divergence='forward_kl')"
        )
    if objective.teacher_share != 1:
        raise ValueError(
            "teacher_share must be 1 for outcomes, whose sides have other columns, got "
            f"{objective.teacher_share}; leave it out"
        )
    require_device("outcomes", outcomes.student, x, name)
    vocab = _columns_of_table("student", outcomes.student, width, valid_vocab)
    match teacher:
        case TeacherHidden(head=head):
            wide, valid = head.num_columns, head.valid_vocab
        case TeacherLogits(logits=logits, valid_vocab=valid):
            wide = logits.shape[-1]
        case _:
            return ComparedColumns(vocab, outcomes.count)
    columns = _columns_of_table("teacher", outcomes.teacher, wide, valid)
    return ComparedColumns(vocab, outcomes.count, columns)


def _columns_of_table(side: str, table: Tensor, width: int, valid_vocab: int | None) -> int:
    """How many columns of one side count; its table has an entry for each, or for all."""
    require_valid_vocab(valid_vocab, width)
    columns = width if valid_vocab is None else valid_vocab
    if table.shape[0] not in (columns, width):
        raise ValueError(
            f"the {side}'s outcomes must have one entry for each of its {columns} columns, got "
            f"{table.shape[0]}; pass the table of this tokenizer, or the valid_vocab it is for"
        )
    return columns


def with_outcomes(targets: RowTargets, outcomes: Outcomes | None) -> RowTargets:
    """The targets with the tables of checked outcomes."""
    if outcomes is None:
        return targets
    return targets._replace(outcomes=outcomes.student, teacher_outcomes=outcomes.teacher)


def require_reduction(reduction: object) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}; choose one of these"
        )


def require_int(name: str, value: object, low: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}; pass a Python int")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}; pass the size there is")


def require_float_dtype(name: str, dtype: object) -> None:
    if dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {dtype}; pass one of these"
        )


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}; choose one of "
            "these"
        )


def require_chunk_bytes(chunk_bytes: object) -> None:
    if chunk_bytes is None:
        return
    require_int("chunk_bytes", chunk_bytes)
    if isinstance(chunk_bytes, int) and chunk_bytes < 1:
        raise ValueError(
            f"chunk_bytes must be at least 1, got {chunk_bytes}; leave it at None for the default"
        )


def require_num_items(num_items: object, x: Tensor, name: str) -> None:
    if isinstance(num_items, Tensor):
        if num_items.ndim != 0:
            raise ValueError(
                f"num_items must be an int or a 0-d tensor, got shape {shape(num_items)}; sum it"
            )
        require_no_grad("num_items", num_items)
        require_device("num_items", num_items, x, name)
    elif num_items is not None:
        require_int("num_items", num_items)
        if isinstance(num_items, int) and num_items < 0:
            raise ValueError(f"num_items must be >= 0, got {num_items}; count the valid labels")


def shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
