"""The frozen teacher: final hidden states and its head, never logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from sad_kernels import Head, TeacherHidden
from torch import Tensor
from transformers import PreTrainedModel

from sad.data.batch import Batch
from sad.data.vocab_map import VocabMap
from sad.losses.base import Activations, Projections
from sad.losses.capture import Capture
from sad.losses.cross_tokenizer import Target
from sad.models.heads import split_head, with_valid_vocab
from sad.teachers.vocabulary import mapped_head, read_weights, unknown_ids

T = TypeVar("T")


Target_co = TypeVar("Target_co", bound=Target, covariant=True)


class TeacherOutput(NamedTuple, Generic[Target_co]):
    """A teacher's forward pass over a batch, or several of them: targets and captured tensors."""

    targets: tuple[Target_co, ...]
    """One per forward pass; the student's divergence is the mean over them."""
    activations: Activations = Activations()
    """Of the first pass; empty unless something was to be captured."""
    kd_weights: Tensor | None = None  # fp32 [B, L]
    """Weights of the divergence: 0 where the teacher has no answer; None for 1 everywhere."""


class Teacher(Protocol):
    """What gives a batch its targets: a model that runs, or the folder that one has left."""

    @property
    def model(self) -> Any:
        """The model whose layers losses look into, or what stands for it; None without one."""

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput[Target]:
        """The targets of a batch, and what ``capture`` collects inside the teacher's model."""
        ...

    def release(self) -> None:
        """Called when nobody needs the targets any more."""


class FrozenTeacher:
    """A teacher that yields final hidden states and its head, never logits.

    Its layers may live on another device than the student (``teacher_device``); its head stays
    with the student, so that hidden states travel and weights do not.

    With a ``vocab_map`` it takes the student's ids and answers for them.
    """

    _ids: Tensor | None = None  # [V_s]: the teacher's id for each of the student's, or any
    _unknown: Tensor | None = None  # bool [V_s]: ids that it lacks; None for no such id

    def __init__(
        self,
        model: PreTrainedModel,
        valid_vocab: int,
        *,
        device: torch.device,
        vocab_map: VocabMap | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self._backbone, head = split_head(model)
        self._layers_device = next(model.parameters()).device
        weight = head.weight.detach().to(device)
        bias = None if head.bias is None else head.bias.detach().to(device)
        head = replace(head, weight=weight, bias=bias)
        if vocab_map is None:
            self._head: Head = with_valid_vocab(head, valid_vocab)
            return
        self._head = mapped_head(head, vocab_map)
        self._unknown = unknown_ids(self._head)
        self._ids = torch.from_numpy(vocab_map.teacher_ids).clamp(min=0).to(self._layers_device)
        self._full = with_valid_vocab(split_head(model)[1], vocab_map.teacher_vocab)

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the student's backward
    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput[TeacherHidden]:
        """Run the teacher once. ``capture`` collects activations of this teacher's model.

        Everything returned is on the student's device and carries no gradient.
        """
        weights = self.kd_weights(batch)
        if capture is None:
            return TeacherOutput((self._target(batch),), kd_weights=weights)
        with capture.capturing() as activations:
            target = self._target(batch)
        return TeacherOutput((target,), _to_device(activations, self.device), weights)

    def kd_weights(self, batch: Batch) -> Tensor | None:
        """As in ``TeacherOutput``, of this batch."""
        return None if self._unknown is None else read_weights(batch, self._unknown)

    def reads(self, input_ids: Tensor) -> Tensor:
        """The teacher's own ids for those of its student."""
        return input_ids if self._ids is None else self._ids[input_ids.to(self._ids.device)]

    def own_tokens(self, batch: Batch) -> Batch:
        """A batch's text as the teacher reads it, with the labels that it is scored by."""
        return batch._replace(input_ids=self.reads(batch.input_ids))

    @property
    def is_mapped(self) -> bool:
        """Whether its ids are not those of the student."""
        return self._ids is not None

    def answer(self, input_ids: Tensor) -> TeacherHidden:
        """Hidden states [B, L, D] and head for rows [B, L] of one document each."""
        with torch.no_grad():
            hidden = self._backbone(self.reads(input_ids.to(self._layers_device)))
        return TeacherHidden(hidden.to(self.device), self.head())

    @torch.no_grad()
    def mass_outside(self, batch: Batch) -> float:
        """The mean probability that it gives to ids which its student has not, over the targets of
        a batch that it can read; 0 without a map."""
        if self._ids is None:
            return 0.0
        scored = batch.labels >= 0
        weights = self.kd_weights(batch)
        if weights is not None:
            scored &= weights.to(scored.device) > 0
        hidden = self._target(batch).hidden[scored.to(self.device)]
        total = 0.0
        for part in hidden.split(64):
            every = self._full(part.to(self._full.weight.device)).float().logsumexp(-1)
            inside = self._head(part).float().logsumexp(-1)
            total += float((1 - (inside - every.to(inside.device)).exp()).clamp(min=0).sum())
        return total / max(len(hidden), 1)

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
        hidden = self._backbone(self.reads(moved.input_ids), moved.position_ids)
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
