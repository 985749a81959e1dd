"""The frozen teacher: final hidden states and its head, never logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from sad_kernels import Head, TeacherHidden, TeacherTopK
from transformers import PreTrainedModel

from sad.data.batch import Batch
from sad.losses.base import Activations, Projections
from sad.losses.capture import Capture
from sad.models.heads import split_head, with_valid_vocab

T = TypeVar("T")


class TeacherOutput(NamedTuple):
    """A teacher's forward pass over a batch, or several of them: targets and captured tensors."""

    targets: tuple[TeacherHidden | TeacherTopK, ...]
    """One per forward pass; the student's divergence is the mean over them."""
    activations: Activations = Activations()
    """Of the first pass; empty unless something was to be captured."""


class Teacher(Protocol):
    """What gives a batch its targets: a model that runs, or the folder that one has left."""

    @property
    def model(self) -> Any:
        """The model whose layers losses look into, or what stands for it; None without one."""

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        """The targets of a batch, and what ``capture`` collects inside the teacher's model."""
        ...

    def release(self) -> None:
        """Called when nobody needs the targets any more."""


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
    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        """Run the teacher once. ``capture`` collects activations of this teacher's model.

        Everything returned is on the student's device and carries no gradient.
        """
        if capture is None:
            return TeacherOutput((self._target(batch),))
        with capture.capturing() as activations:
            target = self._target(batch)
        return TeacherOutput((target,), _to_device(activations, self.device))

    def head(self) -> Head:
        """The teacher's head, on the student's device."""
        return self._head

    def within(self, run: Callable[[], T]) -> T:
        """``run()``, while the model can be run and its head be read."""
        return run()

    def release(self) -> None:
        """Called when nobody needs the targets any more, after the student's backward pass."""

    def _target(self, batch: Batch) -> TeacherHidden:
        moved = batch.to(self._layers_device)
        hidden = self._backbone(moved.input_ids, moved.position_ids)
        return TeacherHidden(hidden.to(self.device), self.head())


def _to_device(activations: Activations, device: torch.device) -> Activations:
    """The same activations on ``device``; tensors that are there already are not copied."""
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
