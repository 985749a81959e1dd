"""The two networks of a run: the student with its loss inside its forward, and the frozen teacher.

The loss belongs inside the root module's forward because that is where the head's weight is whole
when parameters are sharded: nothing outside ever touches a piece of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from sad_kernels import DistillOutput, Objective, TeacherHidden, linear_distill_loss
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.data.batch import Batch, LossCounts
from sad.losses.base import Terms, View
from sad.losses.layout import layout_of
from sad.losses.structural import StructuralLosses
from sad.models.heads import split_head, with_valid_vocab
from sad.optim.precision import Precision
from sad.teachers.frozen import TeacherOutput

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


class StepOutput(NamedTuple):
    """A micro-batch's loss and what it is made of."""

    loss: Tensor  # [] differentiable; the window's sum of these is its loss
    distill: DistillOutput
    terms: Terms


class StructuredStudent(nn.Module):
    """A student whose forward pass returns all of its loss, structural terms included.

    The root module of a run, like ``StudentWithLoss``, which it calls.
    """

    def __init__(self, student: StudentWithLoss, structural: StructuralLosses) -> None:
        super().__init__()
        self.student = student
        self.structural = structural

    def forward(
        self,
        batch: Batch,
        seen: TeacherOutput,
        objective: Objective,
        weights: Mapping[str, float],  # of the structural losses
        counts: LossCounts,  # of the whole accumulation window
    ) -> StepOutput:
        """Each term is divided by the number of its units in the window."""
        structural = self.structural
        names = structural.active(weights)
        with structural.student_capture(names).capturing() as activations:
            hidden = self.student.hidden(batch)
        teacher = seen.teacher if objective.kd_weight else None
        out = self.student.loss(hidden, batch, teacher, objective, max(counts.targets, 1))
        view = View(hidden, seen.targets[0].hidden, activations, seen.activations, layout_of(batch))
        terms = structural.terms(names, view)
        loss = out.loss
        for name, weight in structural.weights(weights).items():
            count = max(getattr(counts, structural.unit_of(name)), 1)
            loss = loss + weight * (terms[name].sum / count)
        return StepOutput(loss, out, terms)
