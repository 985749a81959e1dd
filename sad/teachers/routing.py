"""Routing of mixture-of-experts teachers for distillation (arXiv 2502.12947).

A frozen mixture of experts shows its student the outputs of k of its E experts. To show more:

* **Student-aware routing.** All experts are active, and the teacher's *gates*, nothing else of it,
  are trained to bring the teacher closer to the student. Per window: first the gates minimise
  ``KL(p_T || sg p_S) + 0.01 * mean over layers of cv^2(sum over tokens of gate)`` at T = 1, then a
  new teacher forward under ``all_experts`` gives the student its target. ``cv^2 = var / mean^2``
  keeps all experts in use; a balance loss on counts would be constant with all of them active.
* **Knowledge augmentation.** ``augmented`` samples other experts in each of several teacher
  forwards, whose losses are averaged.

Cost of the first, beside a step with the plain teacher: one more teacher forward, one backward
through the teacher with its activations recomputed, and E / k times the experts' FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from sad_kernels import Head, Objective, TeacherHidden, linear_distill_loss
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sad.checkpoint.state import (
    Form,
    check_optimizer,
    check_tensors,
    form_of,
    load_optimizer,
    load_tensors,
    optimizer_state,
)
from sad.data.batch import Batch, LossCounts
from sad.errors import CheckpointError, UsageError
from sad.expected import alike, checkpoint_errors
from sad.losses._rows import upcast
from sad.losses.layout import layout_of
from sad.losses.router import gate_variation, gates
from sad.models.experts import (
    MoeBlock,
    all_experts,
    choosing_experts,
    expert_weights,
    reading_routers,
    require_callable,
    require_moe,
)
from sad.models.heads import split_head, with_valid_vocab
from sad.optim.optimizer import can_update, clip_gradients, guarded_step
from sad.optim.precision import MasterWeights, UpdateResult

# The kernels' teacher never gets a gradient, so teacher and student change places:
# KL(student || teacher) of theirs is KL(p_T || p_S) of ours.
_OBJECTIVE = Objective(kd_weight=1.0, divergence="reverse_kl", temperature=1.0)


class RoutingLoss(NamedTuple):
    """The gates' loss on one micro-batch; detached, on the device."""

    kl: Tensor  # [] nats: KL(p_T || p_S) summed over the targets
    balance: Tensor  # [] cv^2, mean over layers, before its weight


class StudentAwareRouter:
    """Trains the gates of a frozen mixture-of-experts teacher towards its student.

    ``model`` is the teacher, frozen but for its gates from here on, and left in eval mode. It may
    live on another device than the student's ``device``, and keeps its dtype: AdamW trains fp32
    masters of bf16 gates, for a step at a learning rate of 1e-6 would round away. The head is cut
    to ``valid_vocab``, the number of ids that the tokenizer can produce.

    Per window: ``backward`` for each micro-batch, then ``step``; then the student's own step, with
    the teacher's forward passes under ``sad.models.experts.all_experts(model)``.

    Raises ``UnfitError`` unless the teacher is of a family in ``sad.models.experts.SUPPORTED``, and
    ``UsageError`` for gates in float16, whose gradients underflow.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        valid_vocab: int,
        *,
        learning_rate: float,
        device: torch.device,
        balance_weight: float = 0.01,
        chunk_bytes: int | None = None,
        impl: str = "auto",
    ) -> None:
        self.model = model
        self.device = device
        self.balance_weight = balance_weight
        self.chunk_bytes = chunk_bytes
        self.impl = impl
        self._blocks = require_moe(model, "student-aware routing")
        self._gates = _gate_parameters(model, self._blocks)
        model.requires_grad_(False)
        for parameter in self._gates.values():
            parameter.requires_grad_(True)
        self._layers_device = next(iter(self._gates.values())).device
        self._backbone, head = split_head(model)
        self._head = with_valid_vocab(_detached(head, device), valid_vocab)
        self._masters = MasterWeights(self._gates)
        self.optimizer = AdamW(
            list(self._masters.tensors.values()), lr=learning_rate, weight_decay=0.0, fused=True
        )

    def gate_parameters(self) -> dict[str, nn.Parameter]:
        """The gates by their names in the model: all of it that requires a gradient."""
        return dict(self._gates)

    def backward(
        self,
        batch: Batch,
        student_hidden: Tensor,  # [B, L, D_s]
        student_head: Head,
        totals: LossCounts,
    ) -> RoutingLoss:
        """Add a micro-batch's gradient to the gates, all experts active.

        ``student_hidden`` are the student's final hidden states for this batch, on ``device``, in
        the dtype of its loss; no gradient reaches them or the head. ``totals`` are the units of the
        whole window, over all ranks: the divergence is its mean over targets, the balance the mean
        of the micro-batches' values weighted by their tokens. With several ranks, gradients of
        ``gate_parameters()`` are to be summed before ``step``.
        """
        moved = batch.to(self._layers_device)
        # To the kernels the student is the teacher here: see _OBJECTIVE.
        student = TeacherHidden(student_hidden.detach(), _detached(student_head, self.device))
        with all_experts(self.model), torch.enable_grad():
            with _activation_checkpointing(self.model), reading_routers(self._blocks) as logits:
                hidden = self._backbone(moved.input_ids, moved.position_ids)
            out = linear_distill_loss(
                hidden.to(self.device, self._head.weight.dtype),
                self._head,
                batch.labels.to(self.device),
                student,
                _OBJECTIVE,
                num_items=max(totals.targets, 1),
                chunk_bytes=self.chunk_bytes,
                impl=self.impl,
            )
            balance = gate_variation(
                [gates(logits[layer], block.kind) for layer, block in self._blocks.items()],
                layout_of(moved).tokens.flatten(),
            ).to(self.device)
            share = batch.counts.tokens / max(totals.tokens, 1)
            (out.loss + self.balance_weight * share * balance).backward()
        return RoutingLoss(out.kd, balance.detach())

    def step(self) -> UpdateResult:
        """Take one AdamW step on the masters; one that is not finite changes nothing.

        The gates become the rounded masters, and all gradients are dropped. Does not wait for the
        device.
        """
        self._masters.take_gradients()
        norm = clip_gradients(self._masters.tensors.values(), max_norm=0)
        ok = can_update(self.optimizer, norm, 0)
        guarded_step(self.optimizer, ok)
        self._masters.publish()
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateResult(norm, ok, skipped=~ok)

    def state_dict(self) -> dict[str, Any]:
        """State as ``optimizer``, plain values, and ``tensors``: live masters and moments by name.

        Raises ``RuntimeError`` between ``backward`` and ``step``, whose gradients it lacks.
        """
        if any(parameter.grad is not None for parameter in self._gates.values()):
            raise RuntimeError(
                "gates must have no gradient pending to be saved, got some between backward and "
                "step; call step first"
            )
        values, moments = optimizer_state(self.optimizer, self._masters.tensors)
        tensors = {f"{_GATE}{name}": tensor for name, tensor in self._masters.tensors.items()}
        tensors |= {f"{_MOMENT}{name}": tensor for name, tensor in moments.items()}
        return {"optimizer": values, "tensors": tensors}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ``CheckpointError`` unless ``load_state_dict`` can take this; nothing changes."""
        tensors: Mapping[str, Tensor] = state["tensors"]
        masters, moments = _WithPrefix(_GATE, tensors), _WithPrefix(_MOMENT, tensors)
        check_tensors(self._masters.tensors, masters, "gate")
        check_optimizer(self.optimizer, self._masters.tensors, state["optimizer"], moments)
        own, _ = optimizer_state(self.optimizer, self._masters.tensors)
        expected = [group["options"] for group in own["groups"]]
        options = [group["options"] for group in state["optimizer"]["groups"]]
        with checkpoint_errors():
            alike(expected)(options, "gate optimizer options")
        for name in tensors:
            if not name.startswith((_GATE, _MOMENT)):
                raise CheckpointError(
                    f"the checkpoint's tensors of the teacher's gates must be weights and moments, "
                    f"got {name!r}; resume from another checkpoint"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, bit for bit; every tensor is filled in place.

        Raises ``CheckpointError`` for the state of another teacher.
        """
        tensors: Mapping[str, Tensor] = state["tensors"]
        load_tensors(self._masters.tensors, _WithPrefix(_GATE, tensors), "gate")
        load_optimizer(
            self.optimizer,
            self._masters.tensors,
            state["optimizer"],
            _WithPrefix(_MOMENT, tensors),
        )
        self._masters.publish()


@contextmanager
def augmented(
    model: nn.Module,
    generator: torch.Generator,
    *,
    probability: float = 0.05,
) -> Iterator[None]:
    """Context in which teacher forwards mix other experts than the gate would choose.

    In each layer all experts but one see a token, the N - 1 of the paper, where N counts all
    experts of a layer: with ``probability``, independently per token and layer, drawn from the gate
    without replacement, else those that the gate prefers most (without limits on groups of
    experts). Their weights are ``expert_weights``. The generator alone decides the draws, on its
    own device: its state says how they go on.

    Forwards must not build a graph: recomputed activations would be drawn anew. Raises
    ``ValueError`` if one does and for arguments out of range, and ``UnfitError`` unless the model
    is of a family in ``sad.models.experts.SUPPORTED``.
    """
    blocks = require_moe(model, "knowledge augmentation")
    if not 0 <= probability <= 1:
        raise ValueError(
            f"the probability of drawn experts must lie in [0, 1], got {probability}; 0.05 is usual"
        )

    def choose(block: MoeBlock, logits: Tensor) -> tuple[Tensor, Tensor]:
        if logits.requires_grad:
            raise ValueError(
                "an augmented teacher must not build a graph, got logits that require a gradient; "
                "compute it under torch.no_grad()"
            )
        ids = _draw_experts(block, logits, block.num_experts - 1, probability, generator)
        return ids, expert_weights(block, logits, ids)

    with choosing_experts(blocks, choose):
        yield


_GATE, _MOMENT = "gate/", "optimizer/"  # prefixes of tensor names in a checkpoint


class _WithPrefix(Mapping[str, Tensor]):
    """Those tensors whose names begin with ``prefix``, by the rest of their names; read late."""

    def __init__(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        self._prefix = prefix
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def form(self, name: str) -> Form:
        return form_of(self._tensors, self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        names = (name for name in self._tensors if name.startswith(self._prefix))
        return (name.removeprefix(self._prefix) for name in names)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _detached(head: Head, device: torch.device) -> Head:
    bias = None if head.bias is None else head.bias.detach().to(device)
    return replace(head, weight=head.weight.detach().to(device), bias=bias)


def _gate_parameters(model: nn.Module, blocks: Mapping[int, MoeBlock]) -> dict[str, nn.Parameter]:
    for block in blocks.values():
        require_callable(block)
    routers = {id(p) for block in blocks.values() for p in block.router.parameters()}
    found = {name: p for name, p in model.named_parameters() if id(p) in routers}
    for name, parameter in found.items():
        if parameter.dtype == torch.float16:
            raise UsageError(
                f"the teacher's gates must be bfloat16 or float32 to be trained, got float16 for "
                f"{name}; set teacher_dtype: bfloat16"
            )
    return found


@contextmanager
def _activation_checkpointing(model: nn.Module) -> Iterator[None]:
    """Context in which forward passes keep the inputs of decoder layers only, for backward to redo.

    transformers' own switch works in training mode alone and makes embeddings require gradients for
    good. Here the layers, and nothing inside them, are in training mode: dropout stays off.
    """
    # Set past transformers' own switch, in the layers' attributes, and undone afterwards.
    ours = {
        "gradient_checkpointing": True,
        "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False),
        "training": True,
    }
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    theirs = [{k: v for k, v in vars(layer).items() if k in ours} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(ours)
        yield
    finally:
        for layer, before in zip(layers, theirs, strict=True):
            for name in ours:
                vars(layer).pop(name, None)
            vars(layer).update(before)


def _draw_experts(
    block: MoeBlock,
    logits: Tensor,  # [N, E]
    count: int,
    probability: float,
    generator: torch.Generator,
) -> Tensor:  # int64 [N, count]
    """Choose ``count`` experts per token: drawn with ``probability``, else the gate's top ones.

    Expert e arrives after an exponential time with rate g_e, and the first to arrive are drawn. The
    order of arrivals is that of draws without replacement, each in proportion to what is left of
    the gate (Plackett-Luce).
    """
    where = {"generator": generator, "device": generator.device}
    times = torch.empty(logits.shape, device=generator.device).exponential_(generator=generator)
    drawn = torch.rand((len(logits), 1), **where) < probability
    logits = upcast(logits)
    correction = getattr(block.router, "e_score_correction_bias", None)
    preference = logits if correction is None else logits.sigmoid() + correction
    arrival = gates(logits, block.kind).log() - times.to(logits.device).log()
    return torch.where(drawn.to(logits.device), arrival, preference).topk(count, dim=-1).indices
