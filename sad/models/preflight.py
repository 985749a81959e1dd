"""Checks of models and loss before a run: training relies on what is tested here.

For each model, in eval mode and in the dtype of its weights:

* Its embedding and its head hold finite numbers.
* It runs rows of ``max_length`` tokens. A table of positions may be shorter.
* ``causality``: hidden states are finite and do not depend on later tokens.
* ``head``: ``Head(hidden)`` reproduces the model's own logits. This catches the softcaps, scales
  and biases of families that the tables of ``sad.models.heads`` do not know, or no longer know.
* ``packing``, where rows hold several documents: document B after document A has the hidden states
  of B alone. Positions that restart achieve that in most families; in OPT, BLOOM, GPT-OSS, Falcon
  and all recurrent ones B still sees A.

Then ``loss`` and ``loss_gradient``: what training computes for a few targets, against the
definitions in ``sad_kernels.reference``, evaluated in float64.

A model that fails is refused. There is no slower path to fall back to: its numbers would differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from sad_kernels import (
    Head,
    Objective,
    TeacherHidden,
    TeacherLogits,
    linear_distill_loss,
    reference,
)
from sad_kernels._tiles import LogitStorage
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sad.errors import UnfitError, is_out_of_memory, one_line
from sad.models.heads import (
    Backbone,
    eval_no_grad,
    isolation_tolerance,
    relative_error,
    require_causal,
    require_finite_hidden,
    require_finite_tables,
    require_head,
    rounding_tolerance,
    split_head,
    with_valid_vocab,
)

POSITIONS = 64
"""Largest number of tokens in a probe of a model."""

TARGETS = 16
"""Largest number of targets whose loss is compared."""

SLICE = 4096
"""Rows of a head that are upcast to float64 at a time."""


def check_models_and_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    input_ids: Tensor,  # [B, L]
    objective: Objective,
    *,
    valid_vocab: int,
    packing: bool,
    compute_dtype: torch.dtype = torch.float32,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    chunk_bytes: int | None = None,
    impl: str = "auto",
    logits: LogitStorage = "exact",
    run_teacher: Callable[[Tensor], TeacherHidden] | None = None,
) -> dict[str, float]:
    """Check both models and the loss on the first row of a batch; return the relative errors.

    Their names are ``student/causality``, ``student/head``, ``student/packing``, the same for the
    teacher, ``loss`` and ``loss_gradient``. The student's hidden states, for the loss, are computed
    within ``autocast``, as in training. Weights, gradients, training modes and random states
    keep every bit. The models may be on different devices. A teacher that was checked before, and
    cannot be taken apart any more, is given as ``run_teacher``: [1, l] -> its answer, [1, l, D].

    Raises ``UnfitError`` with the check that failed, its error and the remedy.
    """
    errors = _prefixed("student", check_model(student, input_ids, packing=packing))
    row = probe_row(input_ids)
    with autocast():
        hidden, head = _hidden_and_head(student, row, valid_vocab)
    require_finite_hidden(student, hidden.to(compute_dtype))
    target = None
    if teacher is not None:
        errors |= _prefixed("teacher", check_model(teacher, input_ids, packing=packing))
        teacher_hidden, teacher_head = _hidden_and_head(teacher, row, valid_vocab)
        target = TeacherHidden(
            teacher_hidden.to(hidden.device), _moved(teacher_head, hidden.device)
        )
    if run_teacher is not None:
        answer = run_teacher(row.to(hidden.device))
        target = TeacherHidden(answer.hidden[0, :-1][:TARGETS], answer.head)
    labels = row[0, 1 : 1 + TARGETS].to(hidden.device)
    return errors | check_loss(
        hidden.to(compute_dtype), head, labels, target, objective, chunk_bytes, impl, logits
    )


def check_model(model: PreTrainedModel, input_ids: Tensor, *, packing: bool) -> dict[str, float]:
    """Check a model on the first row of a batch [B, L]; return the relative errors.

    Their names are ``causality``, ``head`` and, for packed rows, ``packing``. Raises
    ``UnfitError`` for an error above its tolerance.
    """
    backbone, head = split_head(model)
    row = probe_row(input_ids).to(head.weight.device)
    require_finite_tables(model)
    with eval_no_grad(model):
        require_length(model, backbone, input_ids[:1].to(row.device))
        errors = {
            "causality": require_causal(model, backbone, row),
            "head": require_head(model, backbone, head, row),
        }
        if packing:
            errors["packing"] = require_isolation(model, backbone, row)
    return errors


def probe_row(input_ids: Tensor) -> Tensor:
    """The beginning of a batch's first row, [1, l] with l from 4 to ``POSITIONS``."""
    return input_ids[:1].repeat(1, 4)[:, : max(4, min(POSITIONS, input_ids.shape[1]))]


def require_length(model: PreTrainedModel, backbone: Backbone, row: Tensor) -> None:
    """Raise ``UnfitError`` if a row [1, L] is too long for the model to run at all.

    Families that compute positions run rows of any length, whether or not they learned to. Those
    with a table of positions fail, on a GPU by a device assertion after which the process cannot
    use the GPU any more. A row within the model's ``max_position_embeddings`` is not tried.
    """
    length = row.shape[1]
    declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if declared is not None and length <= declared:
        return
    try:
        backbone(row, torch.arange(length, device=row.device)[None]).sum().item()
    except (IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UnfitError(
            f"max_length must be at most what {type(model).__name__} can run "
            f"(max_position_embeddings {declared}), got {length} ({one_line(error)}); lower it"
        ) from error


def known_positions(model_config: PreTrainedConfig) -> int | None:
    """The number of positions that a model learned, scaled rotary embeddings included; None if its
    configuration does not say."""
    text: Any = model_config.get_text_config()
    declared = getattr(text, "max_position_embeddings", None)
    if not isinstance(declared, int):
        return None
    # By layer type in families with several kinds of attention.
    scaling = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in (scaling, *scaling.values()) if isinstance(kind, Mapping)]
    scaled = [
        int(kind["factor"] * kind.get("original_max_position_embeddings", declared))
        for kind in kinds
        if isinstance(kind.get("factor"), int | float)
    ]
    return max([declared, *scaled])


def require_known_positions(teacher: PreTrainedConfig, longest: int) -> None:
    """Raise ``UnfitError`` if documents reach positions that the teacher never learned.

    Where positions are computed it would run all the same, and teach what it makes of them.
    """
    known = known_positions(teacher)
    if known is not None and longest > known:
        raise UnfitError(
            f"max_length must be at most the {known} positions that the teacher knows "
            f"(max_position_embeddings), got a document of {longest} in a row; lower it to "
            f"{known}, or choose another teacher"
        )


def require_isolation(model: PreTrainedModel, backbone: Backbone, row: Tensor) -> float:
    """Measure how much the second document of a packed row [1, L] depends on the first.

    Returns the relative difference of its hidden states from those without the first; raises
    ``UnfitError`` above ``isolation_tolerance``.
    """
    length = row.shape[1]
    half = length // 2
    # The second half of the row is a document of its own: its positions start at 0 again.
    restarting = torch.cat([torch.arange(half), torch.arange(length - half)])[None].to(row.device)
    alone = backbone(row[:, half:], restarting[:, half:])
    error = relative_error(backbone(row, restarting)[:, half:], alone)
    tolerance = isolation_tolerance(alone.dtype)
    if not error <= tolerance:
        raise UnfitError(
            f"{type(model).__name__} must keep the documents packed into one row apart, got a "
            f"relative change of {error:.1e} by the document before (tolerance {tolerance:.0e}); "
            "set packing: false"
        )
    return error


def check_loss(
    hidden: Tensor,  # [n, D]
    head: Head,
    labels: Tensor,  # [n]
    teacher: TeacherHidden | None,
    objective: Objective,
    chunk_bytes: int | None = None,
    impl: str = "auto",
    logits: LogitStorage = "exact",
) -> dict[str, float]:
    """Check the loss and its gradient by ``hidden`` against the definitions in float64.

    Returns ``loss``, the error relative to the loss or to 1 nat, and ``loss_gradient``, the error
    relative to the gradient's largest entry or to what one wrong token of probability 1
    contributes: nearly equal models have hardly a gradient. Raises ``UnfitError`` above
    ``rounding_tolerance``.
    """
    hidden = hidden.detach().requires_grad_()
    out = linear_distill_loss(
        hidden,
        head,
        labels,
        teacher,
        objective,
        chunk_bytes=chunk_bytes,
        impl=impl,
        logits=logits,
    )
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    true_loss, true_gradient = _reference_loss(hidden.detach(), head, labels, teacher, objective)

    # A wrong token of probability 1 has the gradient 1 / n by its logit, and by an entry of its
    # hidden state at most that times the largest weight.
    one_token = float(head.weight.abs().max()) * abs(head.logit_scale) / len(labels)
    size = max(float(true_gradient.abs().max()), one_token)
    errors = {
        "loss": float((out.loss.detach().double() - true_loss).abs())
        / max(1.0, float(true_loss.abs())),
        "loss_gradient": float((gradient.double() - true_gradient).abs().max()) / size,
    }
    tolerance = rounding_tolerance(hidden.dtype)
    if math.isfinite(float(true_loss)) and not math.isfinite(float(out.loss.detach())):
        raise UnfitError(
            f"the loss must be finite, got {float(out.loss.detach())} in {hidden.dtype} where "
            f"float64 gives {float(true_loss):.3g}: the logits overflow; compute in bf16 or fp32"
        )
    for name, error in errors.items():
        if not error <= tolerance:
            raise UnfitError(
                f"linear_distill_loss must agree with its definition, got a relative error of "
                f"{error:.1e} in {name} (tolerance {tolerance:.0e}, impl {impl!r}, {hidden.dtype} "
                f"on {hidden.device}); try impl: torch, and report this"
            )
    return errors


def _prefixed(role: str, errors: dict[str, float]) -> dict[str, float]:
    return {f"{role}/{name}": error for name, error in errors.items()}


def _hidden_and_head(model: PreTrainedModel, row: Tensor, valid_vocab: int) -> tuple[Tensor, Head]:
    """Final hidden states [n, D] of a row's first targets, and the detached head."""
    backbone, head = split_head(model)
    device = head.weight.device
    with eval_no_grad(model):
        hidden = backbone(row.to(device))[0, :-1][:TARGETS]
    return hidden, _moved(with_valid_vocab(head, valid_vocab), device)


def _moved(head: Head, device: torch.device) -> Head:
    bias = None if head.bias is None else head.bias.detach().to(device)
    return replace(head, weight=head.weight.detach().to(device), bias=bias)


# The reference loss in float64, without a copy of the whole head in float64


def _reference_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: TeacherHidden | None,
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """The reference loss and its gradient by ``hidden`` [n, D]."""
    logits = _exact_logits(hidden, head).requires_grad_()
    known = None
    if teacher is not None:
        known = TeacherLogits(_exact_logits(teacher.hidden, teacher.head))
    loss = reference.distill_loss(logits, labels, known, objective).loss
    (by_logits,) = torch.autograd.grad(loss, logits)
    # The chain rule slice by slice; gradients by hidden states add up in the leaf.
    leaf = hidden.double().requires_grad_()
    for columns, part in _slices(head):
        part(leaf).backward(by_logits[:, columns])
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def _exact_logits(hidden: Tensor, head: Head) -> Tensor:  # [n, V]
    with torch.no_grad():
        return torch.cat([part(hidden.double()) for _, part in _slices(head)], dim=-1)


def _slices(head: Head) -> Iterator[tuple[slice, Head]]:
    """The head in float64, a few rows at a time."""
    for start in range(0, head.vocab_size, SLICE):
        columns = slice(start, min(start + SLICE, head.vocab_size))
        bias = None if head.bias is None else head.bias[columns].double()
        weight = head.weight[columns].double()
        yield columns, replace(head, weight=weight, bias=bias, valid_vocab=None)
