"""A model's final norm: what lies between its last decoder layer and its head.

Its name, its formula (Gemma's RMSNorm multiplies by ``1 + weight``) and its dtype are the family's
own. So no name is looked up: one forward pass is watched, and the norm is the module that takes
what the last decoder layer gives and gives what the head takes. Where a family mixes the streams of
its layers besides, that is part of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.errors import UnfitError
from sad.models.heads import decoder_layers, eval_no_grad, split_head


class FinalNorm(NamedTuple):
    """The module, and what it is given in the model's own forward pass."""

    module: nn.Module
    width: int
    """Of the last layer's outputs, D except where a family has several streams of it."""
    dtype: torch.dtype
    device: torch.device

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """Final hidden states [n, D], which the model's head takes, of what its last decoder layer
        gives, [n, ``width``]."""
        # As a batch of one row: what families are given.
        return self.module(states.to(self.device, self.dtype)[None])[0]


def find_final_norm(model: PreTrainedModel, input_ids: Tensor) -> FinalNorm:
    """The final norm of ``model``, found with a row of tokens [1, L].

    Raises ``UnfitError`` for a model without one module that makes what the head takes of nothing
    but the last layer's output: a family that adds up several streams before its norm, projects
    behind it, or has no norm there. Raises as ``split_head``, too.
    """
    backbone, _ = split_head(model)
    try:
        layers = decoder_layers(model)
    except UnfitError as error:
        raise _without(model) from error
    inner = {id(module) for module in layers.modules()}
    given: list[Tensor] = []  # by the last decoder layer
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []  # of one tensor, and what it gave, since

    def note_layer(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        given[:] = [first] if isinstance(first, Tensor) else []
        calls.clear()

    def note_call(module: nn.Module, inputs: Any, output: Any) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, inputs[0], output))

    handles = [layers[-1].register_forward_hook(note_layer)]
    handles += [
        module.register_forward_hook(note_call)
        for module in backbone.layers.modules()
        if id(module) not in inner
    ]
    try:
        with eval_no_grad(model):
            final = backbone(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    for module, taken, made in calls:
        if given and _equal(taken, given[0]) and _equal(made, final):
            return FinalNorm(module, taken.shape[-1], taken.dtype, taken.device)
    raise _without(model)


def _without(model: PreTrainedModel) -> UnfitError:
    return UnfitError(
        f"{type(model).__name__} must have a final norm, one module between its last decoder layer "
        "and its head, got none that was found; take its most likely ids: --kind topk"
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers: some families give them other shapes."""
    return a.dtype == b.dtype and torch.equal(a.reshape(-1), b.reshape(-1))
