"""Argument checks: shapes, dtypes, devices and ranges, before any work is done.

A bad shape, dtype or option raises here, in one form: what must hold, what came, what to do. A bad
value inside a tensor is not looked for, which would cost a pass over it and a wait for the device:
it turns its own row's loss into NaN.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sad_kernels._divergence_table import DIVERGENCES
from sad_kernels.objective import (
    Head,
    Objective,
    Teacher,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    require_no_grad,
    require_valid_vocab,
)

Reduction = Literal["mean", "sum", "none"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_rows(name: str, x: object) -> Tensor:
    """Require a floating-point tensor [..., features], and return it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}; pass a torch.Tensor")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; convert them"
        )
    if x.ndim == 0:
        raise ValueError(f"{name} must have shape [..., features], got a scalar; pass rows")
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one column, got {shape(x)}; check the slice")
    return x


def require_labels(labels: object, x: Tensor, name: str) -> Tensor:
    """Require a tensor of one integer per row of ``x``, and return it."""
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
    if tensor.device != x.device:
        raise ValueError(
            f"{what} must be on the device of {name}, {x.device}, got {tensor.device}; move them"
        )


def require_head(head: object, hidden: Tensor, whose: str = "") -> Head:
    """Require a head for hidden states [..., D]: of one dtype, or fp32 beside 16-bit states."""
    if not isinstance(head, Head):
        raise TypeError(f"{whose}head must be a Head, got {type(head).__name__}; wrap the weight")
    weight, bias = head.weight, head.bias
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


def require_objective(objective: object, teacher: object) -> Objective:
    """Require an objective whose divergence can be computed with this teacher."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective must be an Objective, got {type(objective).__name__}; build one"
        )
    if teacher is None and objective.kd_weight > 0:
        raise ValueError(
            f"teacher must be given for kd_weight > 0, got None with {objective.kd_weight}; "
            "pass a teacher, or an objective with kd_weight=0"
        )
    if isinstance(teacher, TeacherTopK):
        if objective.teacher_share != 1:
            raise ValueError(
                "teacher_share must be 1 for a TeacherTopK, whose logits are not known, got "
                f"{objective.teacher_share}; pass TeacherHidden or TeacherLogits"
            )
        name = objective.divergence
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
            require_no_grad("teacher head weight", head.weight)
            if head.bias is not None:
                require_no_grad("teacher head bias", head.bias)
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
    require_rows(what, tensor)
    require_no_grad(what, tensor)
    if tensor.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{what} must have the rows of {name} {shape(x)}, got {shape(tensor)}; "
            f"pass shape {(*x.shape[:-1], '...')}"
        )
    require_device(what, tensor, x, name)
    if isinstance(teacher, TeacherHidden):
        require_head(teacher.head, teacher.hidden, "teacher ")


def common_vocab(width: int, valid_vocab: int | None, teacher: Teacher | None) -> int:
    """The number of columns that count on both sides; raise if the two do not agree on it."""
    match teacher:
        case TeacherHidden(head=head):
            teacher_width, teacher_valid = head.weight.shape[0], head.valid_vocab
        case TeacherLogits(logits=logits):
            teacher_width, teacher_valid = logits.shape[-1], teacher.valid_vocab
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


def require_softcap(softcap: object) -> None:
    if softcap is None:
        return
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap must be a number or None, got {softcap!r}; pass a Python number")
    if not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be a finite number > 0, got {softcap}; or leave it at None")


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
