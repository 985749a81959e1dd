"""Distillation in other people's trainers: transformers, TRL, accelerate, or a plain loop.

``DistillModel`` is a student whose forward pass returns its distillation loss, so that whatever
wraps a model (DDP, autocast, a trainer) wraps the loss with it:

    class Distiller(DistillMixin, transformers.Trainer): ...
    Distiller(DistillModel(student, teacher, objective), arguments, train_dataset=rows).train()

Given the number of targets of the whole optimizer step as ``num_items_in_batch``, the losses of its
micro-batches on all ranks add up to the mean over these targets. Trainers that average over ranks
or micro-batches need that factor back; the mix-ins see to it, and ``sad/README.md`` has the line
for accelerate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sad_kernels import Head, Objective, TeacherHidden, linear_distill_loss
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.errors import UnfitError, UsageError
from sad.models.heads import Backbone, split_head, with_valid_vocab

__all__ = ["DistillMixin", "DistillModel", "DistillSFTMixin"]

INPUTS = ("input_ids", "labels", "attention_mask", "position_ids")
"""What ``DistillModel.forward`` takes of a batch."""


class DistillModel(nn.Module):
    """A causal language model whose forward pass returns its distillation loss.

    ``student`` and ``teacher`` are causal models of transformers (the student may be a PEFT model)
    that share a tokenizer; ``valid_vocab`` is the number of its ids, for heads that are padded
    to different widths. The teacher is frozen, in eval mode, and no submodule: no optimizer,
    checkpoint or wrapper sees it. It follows its inputs to their device. Attributes that this
    class has not are those of the student.

    Raises ``UnfitError`` for a model whose head cannot be taken apart, for heads that do not fit
    each other or ``valid_vocab``, and for a teacher that is the student itself.
    """

    # transformers.Trainer reads these two: targets are counted in labels[:, 1:], which forward
    # scores, and the count of a whole optimizer step is passed on to forward.
    loss_type = "ForCausalLM"
    accepts_loss_kwargs = True

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        objective: Objective,
        *,
        valid_vocab: int | None = None,
    ) -> None:
        super().__init__()
        if teacher is student:
            raise UnfitError(
                "teacher must be another model than the student, got the same object; load it again"
            )
        widths = [split_head(model)[1].vocab_size for model in (student, teacher)]
        if valid_vocab is None and widths[0] != widths[1]:
            raise UnfitError(
                f"the heads of student and teacher must be equally wide, got {widths[0]} and "
                f"{widths[1]}; pass valid_vocab, the number of ids of the tokenizer that they share"
            )
        self.student = student
        self.objective = objective
        self.valid_vocab = valid_vocab
        # In a tuple, which nn.Module does not look into.
        self._teacher = (teacher.requires_grad_(False).eval(),)
        for model in (student, teacher):
            self._split(model)  # raises where valid_vocab is too large

    @property
    def teacher(self) -> PreTrainedModel:
        """The frozen teacher."""
        return self._teacher[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "student":  # asked for before __init__ has set it
                raise
            return getattr(self.student, name)

    def forward(
        self,
        input_ids: Tensor,  # [B, L]
        labels: Tensor,  # [B, L]
        attention_mask: Tensor | None = None,  # [B, L]
        position_ids: Tensor | None = None,  # [B, L]
        num_items_in_batch: int | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch, from labels that are not shifted yet, as transformers has them.

        Position i is scored against ``labels[:, i + 1]``, and not at all where that is -100.

            loss = sum over targets of the objective / num_items_in_batch

        ``num_items_in_batch`` is the number of targets in all micro-batches of an optimizer step,
        on all ranks; by default that of this batch. Positions that restart separate documents
        packed into one row. ``attention_mask`` is only looked at: a causal model needs none for
        padding on the right, whose labels are -100.

        Returns ``loss`` [], differentiable, and ``kd`` [], the mean divergence over the targets of
        this batch, in nats. Raises ``UsageError`` for padding on the left, and ``UnfitError`` for
        positions that a model does not take.
        """
        if attention_mask is not None:
            _require_right_padding(attention_mask)
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        teacher: TeacherHidden | None = None
        if self.objective.kd_weight:
            teacher = self._teacher_target(input_ids, position_ids)
        hidden, head = self._hidden(self.student, input_ids, position_ids)
        out = linear_distill_loss(
            hidden, head, labels, teacher, self.objective, num_items=num_items_in_batch
        )
        return {"loss": out.loss, "kd": out.kd / out.num_tokens.clamp(min=1)}

    @torch.no_grad()
    def _teacher_target(self, input_ids: Tensor, position_ids: Tensor | None) -> TeacherHidden:
        if self.teacher.device != input_ids.device:
            self.teacher.to(input_ids.device)  # pyright: ignore[reportArgumentType]
        return TeacherHidden(*self._hidden(self.teacher, input_ids, position_ids))

    def _hidden(
        self, model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None
    ) -> tuple[Tensor, Head]:
        """Final hidden states [B, L, D] and the head that belongs to them."""
        # Split on each call: a parameter that was replaced or unsharded meanwhile is the one used.
        backbone, head = self._split(model)
        if position_ids is not None and not backbone.takes_positions:
            raise UnfitError(
                f"position_ids must be left out for {type(model).__name__}, got some, which its "
                "layers do not take; put one document into each row"
            )
        hidden = backbone(input_ids, position_ids)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # it leaves the residual stream of Llamas in fp32
            hidden = hidden.to(torch.get_autocast_dtype(device))
        return hidden, head

    def _split(self, model: PreTrainedModel) -> tuple[Backbone, Head]:
        backbone, head = split_head(model)
        if self.valid_vocab is not None:
            head = with_valid_vocab(head, self.valid_vocab)
        return backbone, head


def _require_right_padding(attention_mask: Tensor) -> None:
    """Raise ``UsageError`` if a token follows padding in its row. Waits for the device."""
    if torch.compiler.is_compiling():
        return
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise UsageError(
            "attention_mask must have its padding on the right, got a token behind padding; set "
            "the tokenizer's padding_side to 'right'"
        )


class DistillMixin:
    """Makes a ``transformers.Trainer`` of a ``DistillModel`` save and load its student.

        class Distiller(DistillMixin, transformers.Trainer): ...

    Its folders then hold what ``student.save_pretrained`` writes. Gradients are right without it.

    Raises ``UsageError`` for options that would replace the loss or need logits, and where several
    GPUs are visible to one process, over which Trainer would copy the student only.
    """

    model: Any
    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _require_own_loss(self)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None:
            state_dict = {name.removeprefix("student."): x for name, x in state_dict.items()}
        with self._student_as_model():
            super()._save(output_dir, state_dict)  # pyright: ignore

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if model is not None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore
            return
        with self._student_as_model():
            super()._load_from_checkpoint(resume_from_checkpoint)  # pyright: ignore

    def _load_best_model(self) -> None:
        with self._student_as_model():
            super()._load_best_model()  # pyright: ignore

    @contextmanager
    def _student_as_model(self) -> Iterator[None]:
        """Within, ``self.model`` is the student alone, whose names are those in its files."""
        whole = self.model
        self.model = self.accelerator.unwrap_model(whole).student  # pyright: ignore
        try:
            yield
        finally:
            self.model = whole


class DistillSFTMixin(DistillMixin):
    """Makes TRL's ``SFTTrainer`` distil: its data handling, the loss of ``DistillModel``.

        class Distiller(DistillSFTMixin, trl.SFTTrainer): ...
        Distiller(student, arguments, train_dataset=..., teacher=teacher, objective=objective)

    ``model``, the first argument, is the student, as TRL takes it; ``teacher``, ``objective`` and
    ``valid_vocab`` are those of ``DistillModel``. TRL's entropy and token accuracy are not logged:
    they need logits.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        objective: Objective,
        valid_vocab: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        model = DistillModel(self.model, teacher, objective, valid_vocab=valid_vocab)
        self.model = self.model_wrapped = model
        # Trainer has read these of the student; see DistillModel.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """The loss that Trainer computes: TRL's own would read logits of the model."""
        from transformers import Trainer

        # Padding-free batches also have lengths, which repeat what the positions say.
        inputs = {name: inputs[name] for name in INPUTS if name in inputs}
        trainer: Any = self
        return Trainer.compute_loss(trainer, model, inputs, return_outputs, num_items_in_batch)


def _require_own_loss(trainer: Any) -> None:
    args = trainer.args
    if args.label_smoothing_factor:
        raise UsageError(
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}; set "
            "label_smoothing of the Objective"
        )
    for name in ("compute_loss_func", "compute_metrics"):
        if getattr(trainer, name) is not None:
            raise UsageError(
                f"{name} must be None, got a function; logits, which it needs, do not exist"
            )
    if args.n_gpu > 1:
        raise UsageError(
            f"a process must see one GPU, got {args.n_gpu}; start one for each with torchrun, or "
            "set CUDA_VISIBLE_DEVICES"
        )
