"""The student as a root module: its forward pass returns the loss, structural terms included.

The loss is computed inside ``forward`` because that is where a sharded head's weight is whole
(FSDP2 gathers parameters around the root module's forward): nothing outside may touch a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from sad_kernels import (
    DistillOutput,
    Objective,
    TeacherHidden,
    linear_distill_loss,
)
from sad_kernels._tiles import LogitStorage
from torch import Tensor, nn
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.data.batch import Batch, LossCounts
from sad.errors import UsageError
from sad.losses.balance import NAME as BALANCE
from sad.losses.balance import FamilyBalanceLoss, build_balance_loss, run_with_routers
from sad.losses.base import LossInputs, LossTerms
from sad.losses.capture import Capture
from sad.losses.cross_tokenizer import CrossTokenizerLoss, Target, TeacherLikelihood
from sad.losses.layout import layout_of
from sad.losses.structural import StructuralLosses
from sad.models.compiled import compile_and_check, eager
from sad.models.heads import split_head, with_valid_vocab
from sad.optim.precision import Precision
from sad.teachers.frozen import TeacherOutput

ContextFactory = Callable[[], AbstractContextManager[object]]

T = TypeVar("T")

LossWeights = Mapping[str, float]
"""Weight of each loss by its name in the configuration; a loss that is not named is off."""

NO_WEIGHTS: LossWeights = {}


class StepOutput(NamedTuple):
    """The loss of a micro-batch and its parts."""

    loss: Tensor  # [] differentiable; the sum over a window's micro-batches is the window's loss
    distill: DistillOutput
    terms: LossTerms  # structural terms and diagnostics, unweighted


class StudentWithLoss(nn.Module):
    """A student whose forward pass returns the loss of a batch: its logits never exist whole.

    ``structural`` are the run's structural losses, if it has any: they belong to the root module,
    whose forward pass computes them, and not to ``model``, which is what is exported.

    ``comparison`` stands for the loss on logits where the teacher has another tokenizer.

    ``balance`` is the auxiliary loss of a mixture-of-experts student, ``balance_note`` says in the
    run's header what became of it.

    ``valid_vocab`` is the number of ids the tokenizer can produce; ``autocast`` is entered around
    the layers, and their hidden states are cast to ``compute_dtype`` before the loss.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        valid_vocab: int,
        *,
        structural: StructuralLosses | None = None,
        comparison: CrossTokenizerLoss | None = None,
        balance: FamilyBalanceLoss | None = None,
        balance_note: str = "",
        compute_dtype: torch.dtype = torch.float32,
        autocast: ContextFactory = nullcontext,
        chunk_bytes: int | None = None,
        impl: str = "auto",
        logits: LogitStorage = "exact",
    ) -> None:
        super().__init__()
        self.model = model
        self.structural = structural
        self.comparison = comparison
        self.balance = balance
        self.balance_note = balance_note
        self.valid_vocab = valid_vocab
        self.compute_dtype = compute_dtype
        self.autocast = autocast
        self.chunk_bytes = chunk_bytes
        self.impl = impl
        self.logits: LogitStorage = logits
        self._compiled = False

    def compile_layers(self, batch: Batch, backend: str = "inductor") -> float:
        """Compile the model's layers for rows like those of ``batch``; see ``sad.models.compiled``.

        Returns the relative difference of hidden states that this makes. Raises ``UsageError`` for
        experts that are balanced: their routers are read inside the layers.
        """
        if self.balance is not None:
            raise UsageError(
                f"torch_compile must be false for {type(self.model).__name__} here, got experts "
                "with a load-balancing loss, which looks into the layers; leave it out"
            )
        self._compiled = True
        return compile_and_check(
            self.model, batch.input_ids, batch.position_ids, self.autocast, backend
        )

    def forward(
        self,
        batch: Batch,
        teacher: TeacherOutput | None,
        objective: Objective,
        counts: LossCounts,
        weights: LossWeights = NO_WEIGHTS,
    ) -> StepOutput:
        """The objective's sum over the batch's targets, plus the weighted structural terms.

        Each sum is divided by its units in ``counts``, those of the *whole* accumulation window:
        adding the gradients of the window's micro-batches then gives the gradient of the mean over
        the window. Structural losses without a weight are neither captured nor computed.
        """
        num_items = max(counts.targets, 1)
        targets = teacher.targets if teacher is not None and objective.kd_weight else ()
        kd_weights = teacher.kd_weights if teacher is not None and targets else None
        active = self.active_losses(weights)
        terms: LossTerms = {}
        if self.structural is None or teacher is None or not active:
            hidden, terms = self._hidden(batch)
            distill = self._distill(hidden, batch, targets, objective, num_items, kd_weights)
        else:
            # Hooks listen during this one forward pass of the layers and are gone before the loss.
            with self.structural.student_capture(active).capturing() as activations:
                hidden, terms = self._hidden(batch)
            distill = self._distill(hidden, batch, targets, objective, num_items, kd_weights)
            target = teacher.targets[0]
            assert isinstance(target, TeacherHidden)  # others have no states to compare with
            inputs = LossInputs(
                student_hidden=hidden,
                teacher_hidden=target.hidden,
                student=activations,
                teacher=teacher.activations,
                layout=layout_of(batch),
            )
            terms |= self.structural.terms(active, inputs)
        loss = distill.loss
        for name, weight in self.term_weights(weights).items():
            if name in terms:
                count = max(getattr(counts, self._unit_of(name)), 1)
                loss = loss + weight * (terms[name].sum / count)
        return StepOutput(loss, distill, terms)

    def within(self, run: Callable[[], T]) -> T:
        """``run()``, as in a forward pass: where a split model can be run and its head be read."""
        return run()

    def active_losses(self, weights: LossWeights) -> tuple[str, ...]:
        """The structural losses whose weight is above 0."""
        return () if self.structural is None else self.structural.active(weights)

    @property
    def term_names(self) -> tuple[str, ...]:
        """Every term of the loss besides those on logits."""
        structural = () if self.structural is None else self.structural.names
        return structural if self.balance is None else (*structural, BALANCE)

    @property
    def diagnostics(self) -> tuple[str, ...]:
        """What the structural losses report besides their terms, for the train record."""
        return () if self.structural is None else self.structural.diagnostics

    def term_weights(self, weights: LossWeights) -> dict[str, float]:
        """Term -> weight, of ``term_names`` those whose weight is above 0."""
        structural = {} if self.structural is None else self.structural.weights(weights)
        return structural if self.balance is None else structural | {BALANCE: self.balance.coef}

    def _unit_of(self, term: str) -> str:
        if term == BALANCE or self.structural is None:
            return "tokens"
        return self.structural.unit_of(term)

    def teacher_capture(self, weights: LossWeights) -> Capture | None:
        """What the active structural losses need from inside the teacher; None for nothing."""
        active = self.active_losses(weights)
        if self.structural is None or not active:
            return None
        return self.structural.teacher_capture(active)

    def hidden(self, batch: Batch) -> Tensor:  # [B, L, D]
        """Final hidden states, in the dtype that the loss computes in."""
        return self._hidden(batch)[0]

    def _hidden(self, batch: Batch) -> tuple[Tensor, LossTerms]:
        """Final hidden states, and the term of the auxiliary loss if there is one."""
        # Split on each call: a parameter that was replaced or unsharded meanwhile is the one used.
        backbone, _ = split_head(self.model)
        terms: LossTerms = {}
        as_it_is = self._compiled and not self.training
        with self.autocast(), eager() if as_it_is else nullcontext():
            if self.balance is None:
                hidden = backbone(batch.input_ids, batch.position_ids)
            else:
                hidden, routers = run_with_routers(backbone, batch.input_ids, batch.position_ids)
                terms[BALANCE] = self.balance.term(routers, batch)
        # Autocast leaves the residual stream of Llama-like models in fp32.
        return hidden.to(self.compute_dtype), terms

    def _distill(
        self,
        hidden: Tensor,  # [B, L, D]
        batch: Batch,
        targets: Sequence[Target],
        objective: Objective,
        num_items: int,
        kd_weights: Tensor | None,  # [B, L]
    ) -> DistillOutput:
        """The loss on logits, against no teacher, one target or several.

        With several targets the divergence, ``kd`` and ``agree`` are means over them.
        """
        _, head = split_head(self.model)
        head = with_valid_vocab(head, self.valid_vocab)
        if self.comparison is not None and targets:
            (target,) = targets
            training = self.training
            return self.comparison(hidden, head, batch, target, objective, num_items, training)

        def against(target: Target | None, objective: Objective) -> DistillOutput:
            assert not isinstance(target, TeacherLikelihood), "it is compared above"
            return linear_distill_loss(
                hidden,
                head,
                batch.labels,
                target,
                objective,
                num_items=num_items,
                kd_token_weights=kd_weights,
                chunk_bytes=self.chunk_bytes,
                impl=self.impl,
                logits=self.logits,
            )

        if len(targets) <= 1:
            return against(targets[0] if targets else None, objective)
        first = replace(objective, kd_weight=objective.kd_weight / len(targets))
        rest = replace(first, ce_weight=0.0, z_loss=0.0)  # these do not depend on the target
        outs = [against(target, rest if i else first) for i, target in enumerate(targets)]
        return outs[0]._replace(
            loss=torch.stack([out.loss for out in outs]).sum(),
            kd=torch.stack([out.kd for out in outs]).mean(),
            agree=torch.stack([out.agree for out in outs]).mean(),
        )


def build_student(
    config: DistillConfig,
    model: PreTrainedModel,
    valid_vocab: int,
    precision: Precision,
    teacher: PreTrainedModel | None = None,
    comparison: CrossTokenizerLoss | None = None,
) -> StudentWithLoss:
    """``model`` with the losses of ``config``; the structural ones only if a ``teacher`` is given,
    and that on logits by ``comparison`` if the teacher has another tokenizer.

    Raises ``UnfitError`` if the student's head cannot be taken apart or is narrower than the
    vocabulary, for a structural loss that the two models cannot supply, and for an auxiliary loss
    that the student's family has not.
    """
    with_valid_vocab(split_head(model)[1], valid_vocab)
    balance, balance_note = build_balance_loss(config, model)
    return StudentWithLoss(
        model,
        valid_vocab,
        structural=build_structural(config, model, teacher),
        comparison=comparison,
        balance=balance,
        balance_note=balance_note,
        compute_dtype=precision.compute_dtype,
        autocast=precision.autocast,
        chunk_bytes=config.chunk_bytes,
        impl=config.impl,
        logits=config.loss_logits,
    )


def build_structural(
    config: DistillConfig, student: PreTrainedModel, teacher: PreTrainedModel | None
) -> StructuralLosses | None:
    """The structural losses that have a weight in ``config``; None without any, or a teacher.

    Raises ``UnfitError`` for a loss that the models cannot supply.
    """
    if not config.structural_weights or teacher is None:
        return None
    return StructuralLosses(config, student, teacher)
