"""Mixed precision: dtypes of parameters, computation and gradients, master weights, loss scale.

====================================  ============  ====================  ======================
configuration                         parameters    computation           bytes per parameter
====================================  ============  ====================  ======================
neither ``bf16`` nor ``fp16``         fp32          fp32                  16
``bf16`` or ``fp16``                  fp32          autocast; with fp16   16
                                                    a GradScaler
``param_dtype: bfloat16``,            bf16          bf16; fp32 masters    18
``master_weights: true``                            and gradients
``param_dtype: bfloat16``,            bf16          bf16                  8
``master_weights: false``
====================================  ============  ====================  ======================

Bytes are those of parameters, gradients and AdamW's moments; an EMA adds 4. The last form loses
small updates: one below half a bf16 step of its weight, 1/512 to 1/256 of the weight, does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from sad.config.schema import DistillConfig
from sad.ema import ModelEMA
from sad.errors import UsageError
from sad.optim.optimizer import build_adamw, can_update, clip_gradients, guarded_step


class UpdateResult(NamedTuple):
    """Outcome of an optimizer step, on the device."""

    norm: Tensor  # [] norm of the whole gradient before clipping
    ok: Tensor  # [] bool: gradient and update were finite, and it was applied
    skipped: Tensor  # [] bool: not applied, and not because the loss scale was too high


class MasterWeights:
    """fp32 copies of bf16 parameters, which the optimizer trains in their place.

    Gradients accumulate in fp32 too: over 64 micro-batches, adding in bf16 errs by 0.8 %. A
    parameter of another dtype is its own master.

    ``tensors`` are the masters by parameter name, ``separate`` those of them that are copies. The
    model's parameters are the masters rounded to bf16.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._rounded = {n: p for n, p in parameters.items() if p.dtype == torch.bfloat16}
        self.separate: dict[str, Tensor] = {
            name: nn.Parameter(p.detach().float()) for name, p in self._rounded.items()
        }
        self.tensors: dict[str, Tensor] = {**parameters, **self.separate}
        for parameter in self._rounded.values():
            parameter.grad_dtype = torch.float32

    def take_gradients(self) -> None:
        """Move the gradients of the model's parameters to their masters."""
        for name, parameter in self._rounded.items():
            self.separate[name].grad, parameter.grad = parameter.grad, None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's parameters."""
        for name, parameter in self._rounded.items():
            parameter.copy_(self.separate[name])

    def zero_grad(self) -> None:
        """Drop the gradients of the model; the optimizer drops those of the masters."""
        for parameter in self._rounded.values():
            parameter.grad = None


def structural_loss_parameters(structural: nn.Module | None) -> dict[str, Tensor]:
    """Parameters of structural losses, under names that no parameter of a model has."""
    named = () if structural is None else structural.named_parameters()
    return {f"structure/{name}": parameter for name, parameter in named}


class Precision:
    """The mixed-precision policy of a run: autocast, loss scaling, master weights, optimizer steps.

    Call ``build_optimizer`` before ``build_ema``. Then, for every micro-batch, run the forward pass
    under ``autocast()`` and ``backward(loss)``; at the end of a window ``step`` and ``zero_grad``.
    """

    def __init__(
        self,
        config: DistillConfig,
        device: torch.device | str = "cpu",
        *,
        sharded: bool = False,
    ) -> None:
        """``sharded``: parameters are split over ranks, and gathered in the compute dtype."""
        self.config = config
        self._sharded = sharded
        self.device = torch.device(device)
        self.param_dtype: torch.dtype = getattr(torch, config.param_dtype)
        self.compute_dtype = self.param_dtype
        if self.param_dtype == torch.float32 and (config.bf16 or config.fp16):
            self.compute_dtype = torch.bfloat16 if config.bf16 else torch.float16
        self.scaler = GradScaler(self.device.type, enabled=self.compute_dtype == torch.float16)
        self.masters: MasterWeights | None = None
        self._parameters: dict[str, Tensor] = {}

    def autocast(self) -> AbstractContextManager[object]:
        """Context of the forward pass: matrix products of fp32 parameters in the compute dtype."""
        if self.compute_dtype == self.param_dtype or self._sharded:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def build_optimizer(self, model: nn.Module, structural: nn.Module | None = None) -> Optimizer:
        """AdamW over the trainable parameters of ``model``, or their fp32 masters, and over those
        of the structural losses, which are fp32.

        Raises ``UsageError`` for float16 parameters: their gradients underflow, and a GradScaler
        cannot unscale them.
        """
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in trainable.items():
            if parameter.dtype == torch.float16:
                raise UsageError(
                    f"trainable parameters must be float32 or bfloat16, got float16 for {name}; "
                    "use param_dtype: float32 with fp16: true"
                )
        if self.param_dtype == torch.bfloat16 and self.config.master_weights:
            self.masters = MasterWeights(trainable)
        # By the names of the model's parameters: checkpoints store the optimizer's state by name.
        trained: dict[str, Tensor] = dict(trainable)
        if self.masters is not None:
            trained = self.masters.tensors
        projectors = structural_loss_parameters(structural)
        self._parameters = trained | projectors
        return build_adamw(self.config, trained, projectors)

    def build_ema(self, model: nn.Module) -> ModelEMA:
        """The moving average of ``model``; with master weights, of these."""
        masters = None if self.masters is None else self.masters.separate
        return ModelEMA(
            model,
            self.config.ema_decay,
            self.config.ema_warmup,
            masters=masters,
            device=self.config.ema_device,
        )

    @property
    def optimizer_parameters(self) -> dict[str, Tensor]:
        """Tensors that the optimizer trains, by parameter name; structural losses' are prefixed."""
        return self._parameters

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss``, in fp16 multiplied by the loss scale."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, max_grad_norm: float) -> UpdateResult:
        """Unscale and clip the window's gradient, and update the weights if that is finite.

        No sync if the optimizer is a fused AdamW. A gradient that overflows because the loss scale
        is too high is expected now and then: the scale is lowered, and ``skipped`` stays false
        until it has fallen below 1.
        """
        # The order matters: masters need the gradients before they are unscaled and clipped, the
        # scaler learns from unscale_ whether any overflowed, and the model is rounded last.
        if self.masters is not None:
            self.masters.take_gradients()
        self.scaler.unscale_(optimizer)
        norm = clip_gradients(self._parameters.values(), max_grad_norm)
        ok = can_update(optimizer, norm, max_grad_norm)
        guarded_step(optimizer, ok)
        self.scaler.update()
        if self.masters is not None:
            self.masters.publish()
        return UpdateResult(norm, ok, skipped=~ok & self._is_no_overflow(norm))

    def zero_grad(self, optimizer: Optimizer) -> None:
        """Drop every gradient of the window."""
        optimizer.zero_grad(set_to_none=True)
        if self.masters is not None:
            self.masters.zero_grad()

    @property
    def loss_scale(self) -> float:
        """The factor on the loss in fp16, else 1. Waits for the device."""
        return self.scaler.get_scale()

    def state_dict(self) -> dict[str, Any]:
        """The GradScaler's scale and its counters; empty without fp16."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the loss scale of ``state``; of one without, with the initial scale."""
        if state:
            self.scaler.load_state_dict(state)

    def _is_no_overflow(self, norm: Tensor) -> Tensor:
        """Whether a high loss scale, [] bool, is no reason for a step that is not applied."""
        if not self.scaler.is_enabled():
            return torch.ones_like(norm, dtype=torch.bool)
        return norm.isfinite() | (self.scaler.scale(torch.ones_like(norm)) < 1.0)
