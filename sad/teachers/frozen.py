"""The frozen teacher: final hidden states and its head, never logits."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from sad_kernels import Head, TeacherHidden
from transformers import PreTrainedModel

from sad.data.batch import Batch
from sad.losses.base import Activations, Projections
from sad.losses.capture import Capture
from sad.models.heads import split_head, with_valid_vocab


class TeacherOutput(NamedTuple):
    """A teacher's answers to a batch, one or several, and what was captured inside of it."""

    targets: tuple[TeacherHidden, ...]
    activations: Activations

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

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        """The same, with a look inside: ``capture`` is one of this model."""
        if capture is None:
            return TeacherOutput((self(batch),), Activations())
        with capture.capturing() as activations:
            target = self(batch)
        return TeacherOutput((target,), _moved(activations, self.device))


def _moved(activations: Activations, device: torch.device) -> Activations:
    """On the student's device; what is there stays where it is."""
    return Activations(
        hidden={i: x.to(device) for i, x in activations.hidden.items()},
        attention={
            i: x._replace(query=x.query.to(device), key=x.key.to(device))
            for i, x in activations.attention.items()
        },
        projections={
            i: Projections(*(part.to(device) for part in x))
            for i, x in activations.projections.items()
        },
        routers={i: x.to(device) for i, x in activations.routers.items()},
    )
