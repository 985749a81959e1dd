"""``torch.compile`` of a student: its decoder layers, one by one.

All alike layers share one graph, which is therefore made as soon for many layers as for few. The
mask that keeps the documents of a packed row apart is made outside of it, by transformers' own code
as it is without a compiler. Every shape has a graph of its own, so that a resumed run computes with
the same ones.

Evaluation runs the layers as they are: scores do not depend on the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.errors import UsageError, is_out_of_memory, one_line
from sad.models.heads import (
    decoder_layers,
    eval_no_grad,
    isolation_tolerance,
    relative_error,
    split_head,
)

ContextFactory = Callable[[], AbstractContextManager[object]]


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile the decoder layers of ``model`` in place; names of parameters stay as they are."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=False, backend=backend)


def eager() -> AbstractContextManager[object]:
    """Context in which compiled layers run as they are."""
    return torch.compiler.set_stance("force_eager")


def compile_and_check(
    model: PreTrainedModel,
    input_ids: Tensor,  # [B, L]
    position_ids: Tensor,  # [B, L]
    autocast: ContextFactory = nullcontext,
    backend: str = "inductor",
) -> float:
    """Compile the layers of ``model``, and compare hidden states of packed rows before and after.

    Returns the relative difference. The graphs of forward and backward are made here, in the mode
    that the model is in unless it has dropout. Raises ``UsageError`` if compiling fails, or above
    the tolerance of hidden states that must be equal but for rounding.
    """
    backbone, _ = split_head(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def hidden() -> Tensor:
        with autocast():
            return backbone(input_ids, position_ids)

    with eval_no_grad(model) if _has_dropout(model) else nullcontext(), torch.enable_grad():
        plain = hidden().detach()
        compile_layers(model, backend)
        try:
            out = hidden()
            torch.autograd.grad(out.float().sum(), parameters, allow_unused=True)
        except Exception as failure:  # whatever tracing, a compiler or a driver may raise
            if is_out_of_memory(failure):
                raise
            found = f"{type(failure).__name__} ({one_line(failure)})"
            raise _refusal(model, found) from failure
    error = relative_error(out.detach(), plain)
    tolerance = isolation_tolerance(plain.dtype)
    if not error <= tolerance:
        found = f"packed rows that differ by {error:.1e} (tolerance {tolerance:.0e})"
        raise _refusal(model, found)
    return error


def _has_dropout(model: PreTrainedModel) -> bool:
    config: Any = model.config.get_text_config()
    rates = [value for key, value in vars(config).items() if "dropout" in key or "pdrop" in key]
    layers = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    return any(isinstance(rate, float) and rate > 0 for rate in (*rates, *layers))


def _refusal(model: PreTrainedModel, found: str) -> UsageError:
    return UsageError(
        f"torch_compile must be false for {type(model).__name__} here, got {found}; leave it out"
    )
