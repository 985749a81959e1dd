"""The two networks of a run: the student with its loss inside its forward, and the frozen teacher.

The loss belongs inside the root module's forward because that is where the head's weight is whole
when parameters are sharded: nothing outside ever touches a piece of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from sad_kernels import DistillOutput, Head, Objective, TeacherHidden, linear_distill_loss
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.capture import Capture, Captured
from sad.config import DistillConfig
from sad.data import Batch
from sad.losses.relations import Projections
from sad.models import split_head, with_valid_vocab
from sad.precision import Precision

Targets = TeacherHidden | Sequence[TeacherHidden] | None
"""One teacher's answer, several, or none."""

ContextFactory = Callable[[], AbstractContextManager[object]]


class StudentWithLoss(nn.Module):
    """A student whose forward pass returns the loss of a batch: its logits never exist whole.

    ``valid_vocab`` is the number of ids the tokenizer can produce; ``autocast`` is entered around
    the layers, and their hidden states are cast to ``compute_dtype`` before the loss.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        valid_vocab: int,
        *,
        compute_dtype: torch.dtype = torch.float32,
        autocast: ContextFactory = nullcontext,
        chunk_bytes: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.valid_vocab = valid_vocab
        self.compute_dtype = compute_dtype
        self.autocast = autocast
        self.chunk_bytes = chunk_bytes
        self.impl = impl

    def forward(
        self, batch: Batch, teacher: Targets, objective: Objective, num_items: int
    ) -> DistillOutput:
        """The objective's weighted sum over the batch's targets divided by ``num_items``.

        ``num_items`` is the number of targets in the whole accumulation window: adding the
        gradients of its micro-batches then gives the gradient of their mean over tokens.
        """
        return self.loss(self.hidden(batch), batch, teacher, objective, num_items)

    def hidden(self, batch: Batch) -> Tensor:  # [B, L, D]
        """Final hidden states, in the dtype that the loss computes in."""
        # Split on each call: a parameter that was replaced or unsharded meanwhile is the one used.
        backbone, _ = split_head(self.model)
        with self.autocast():
            hidden = backbone(batch.input_ids, batch.position_ids)
        # Autocast leaves the residual stream of Llama-like models in fp32.
        return hidden.to(self.compute_dtype)

    def loss(
        self,
        hidden: Tensor,  # [B, L, D]
        batch: Batch,
        teacher: Targets,
        objective: Objective,
        num_items: int,
    ) -> DistillOutput:
        """What ``forward`` returns, from hidden states that are there already.

        With several targets the divergence, ``kd`` and ``agree`` are means over them.
        """
        _, head = split_head(self.model)
        head = with_valid_vocab(head, self.valid_vocab)

        def against(target: TeacherHidden | None, objective: Objective) -> DistillOutput:
            return linear_distill_loss(
                hidden,
                head,
                batch.labels,
                target,
                objective,
                num_items=num_items,
                chunk_bytes=self.chunk_bytes,
                impl=self.impl,
            )

        if teacher is None or isinstance(teacher, TeacherHidden):
            return against(teacher, objective)
        first = replace(objective, kd_weight=objective.kd_weight / len(teacher))
        rest = replace(first, ce_weight=0.0, z_loss=0.0)  # these do not depend on the target
        outs = [against(target, rest if i else first) for i, target in enumerate(teacher)]
        return outs[0]._replace(
            loss=torch.stack([out.loss for out in outs]).sum(),
            kd=torch.stack([out.kd for out in outs]).mean(),
            agree=torch.stack([out.agree for out in outs]).mean(),
        )


def build_student(
    config: DistillConfig, model: PreTrainedModel, valid_vocab: int, precision: Precision
) -> StudentWithLoss:
    """The student as ``config`` wants its loss computed.

    Raises ``UnfitError`` if its head cannot be taken apart or is narrower than the vocabulary.
    """
    with_valid_vocab(split_head(model)[1], valid_vocab)
    return StudentWithLoss(
        model,
        valid_vocab,
        compute_dtype=precision.compute_dtype,
        autocast=precision.autocast,
        chunk_bytes=config.chunk_bytes,
        impl=config.impl,
    )


class Seen(NamedTuple):
    """A teacher's answers to a batch, one or several, and what was captured inside of it."""

    targets: tuple[TeacherHidden, ...]
    captured: Captured

    @property
    def teacher(self) -> TeacherHidden | tuple[TeacherHidden, ...]:
        return self.targets[0] if len(self.targets) == 1 else self.targets


class FrozenTeacher:
    """A teacher that yields final hidden states and its head, never logits.

    Its layers may live on another device than the student (``teacher_device``); its head stays
    with the student, so that hidden states travel and weights do not.
    """

    def __init__(self, model: PreTrainedModel, valid_vocab: int, *, device: torch.device) -> None:
        self.model = model
        self.device = device
        self._backbone, head = split_head(model)
        self._layers_device = next(model.parameters()).device
        weight = head.weight.detach().to(device)
        bias = None if head.bias is None else head.bias.detach().to(device)
        self._head: Head = with_valid_vocab(replace(head, weight=weight, bias=bias), valid_vocab)

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the student's backward
    def __call__(self, batch: Batch) -> TeacherHidden:
        there = batch.to(self._layers_device)
        hidden = self._backbone(there.input_ids, there.position_ids)
        return TeacherHidden(hidden.to(self.device), self._head)

    def observe(self, batch: Batch, capture: Capture | None = None) -> Seen:
        """The same, with a look inside: ``capture`` is one of this model."""
        if capture is None:
            return Seen((self(batch),), Captured())
        with capture.armed() as captured:
            target = self(batch)
        return Seen((target,), _moved(captured, self.device))


def _moved(captured: Captured, device: torch.device) -> Captured:
    """On the student's device; what is there stays where it is."""
    return Captured(
        hidden={i: x.to(device) for i, x in captured.hidden.items()},
        attention={
            i: x._replace(query=x.query.to(device), key=x.key.to(device))
            for i, x in captured.attention.items()
        },
        projections={
            i: Projections(*(part.to(device) for part in x))
            for i, x in captured.projections.items()
        },
        routers={i: x.to(device) for i, x in captured.routers.items()},
    )
