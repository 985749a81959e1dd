"""The load-balancing loss that the family of a mixture-of-experts student is trained with.

``E sum_e f_e P_e`` over the tokens of all layers (Switch, arXiv 2101.03961): transformers adds it
to a model's own loss where ``output_router_logits`` is set. Without it the router of a student that
is trained for long may forget experts. Here it is transformers' own function, by micro-batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.data.batch import Batch
from sad.errors import UnfitError, one_line
from sad.losses.base import LossTerm
from sad.models.heads import Backbone, eval_no_grad, inner_model, split_head

NAME = "router_aux"
"""The term's name in the log."""

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names that configurations have for the loss's weight, and for the number of experts."""


class FamilyBalanceLoss:
    """The auxiliary loss of a student's family, with its weight ``coef``."""

    def __init__(self, model: PreTrainedModel, loss: Callable[..., Tensor], coef: float) -> None:
        self.coef = coef
        self._loss = loss
        sizes: Any = model
        self._experts = (sizes.num_experts, sizes.num_experts_per_tok)

    def term(self, router_logits: tuple[Tensor, ...], batch: Batch) -> LossTerm:
        """The loss of a micro-batch times its tokens, its unit: padding does not count.

        A function of the micro-batch as a whole: a window has the mean over its micro-batches.
        """
        column = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        mask = column < batch.lengths[:, None]
        value = self._loss(router_logits, *self._experts, mask)
        return LossTerm(value * batch.counts.tokens, batch.counts.tokens)


def run_with_routers(
    backbone: Backbone, input_ids: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Hidden states, and the router logits [B L, E] of each layer that has experts."""
    output = backbone.run(input_ids, position_ids, output_router_logits=True)
    return output.last_hidden_state, tuple(output.router_logits or ())


def build_balance_loss(
    config: DistillConfig, model: PreTrainedModel
) -> tuple[FamilyBalanceLoss | None, str]:
    """The auxiliary loss that a run gives its student, if any, and a line on it for the header.

    Raises ``UnfitError`` if the configuration asks for one that the student's family has not.
    """
    model = inner_model(model)  # adapters train the family's model
    name, asked = type(model).__name__, config.router_aux_loss_coef
    text_config = model.config.get_text_config()
    theirs = next((getattr(text_config, k, None) for k in _COEFFICIENTS if _has(text_config, k)), 0)
    coef = theirs or 0.0 if asked is None else asked
    if not any(_has(text_config, key) for key in _EXPERTS):
        if asked:
            raise UnfitError(
                f"router_aux_loss_coef must be 0 for a student without experts, got {asked} for "
                f"{name}; leave it out"
            )
        return None, ""
    if not coef:
        return None, "" if asked is None else "no auxiliary loss"
    if asked is None and config.router.weight and config.router.balance_weight:
        return None, "no auxiliary loss of the family's: router.balance_weight stands for it"
    loss, reason = _family_loss(model)
    if loss is None:
        if asked:
            raise UnfitError(
                f"router_aux_loss_coef must be 0 for {name}, got {asked}: {reason}; leave it out"
            )
        return None, f"the auxiliary loss of {name} (weight {coef:g}) is left out: {reason}"
    return FamilyBalanceLoss(model, loss, coef), f"{coef:g} of the auxiliary loss of {name}"


def _has(config: Any, key: str) -> bool:
    value = getattr(config, key, None)
    return isinstance(value, int | float) and value > 0


def _family_loss(model: PreTrainedModel) -> tuple[Callable[..., Tensor] | None, str]:
    """transformers' function for this family, or why it cannot be used."""
    module = sys.modules[type(model).__module__]
    loss = getattr(module, "load_balancing_loss_func", None)
    if loss is None or not all(
        hasattr(model, key) for key in ("num_experts", "num_experts_per_tok")
    ):
        return None, "transformers has no such loss for it"
    backbone, head = split_head(model)
    ids = torch.zeros((1, 4), dtype=torch.int64, device=head.weight.device)
    with eval_no_grad(model):
        try:
            _, logits = run_with_routers(backbone, ids, None)
        except Exception as error:  # whatever a foreign forward may raise
            return None, f"its router logits cannot be read ({one_line(error)})"
    return (loss, "") if logits else (None, "its router logits cannot be read")
