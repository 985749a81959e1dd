r"""The loss on logits against a teacher with another tokenizer.

``prefix``: at boundaries, where both have read the same text, the forward KL of the distributions
over outcomes (``sad.data.outcomes``),

    KD = sum_o P(o) log(P(o) / Q(o)),   P(o), Q(o): the mass of the tokens that count for o.

Cross-entropy c and divergence k weigh c CE + k KD there, and (c + k) CE at all other targets: the
weights of what a target learns from sum to the same everywhere. Otherwise those with a teacher
would weigh more, or less, than those without one, which moves the optimum even where the text is
spelled in one way only.

``likelihood`` (ALM, arXiv 2503.20083): for each group, the text between two boundaries, the
summed log-probabilities ``t`` and ``s`` of its tokens on both sides, and the binary KL

    KD = e^t (t - s) + (1 - e^t) log((1 - e^t) / (1 - e^s)),   t, s <= -1e-6.

Cross-entropy has its weight at all targets. Of the teacher no more is needed than the likelihood of
the text. With a weight of its own this is a further term beside ``prefix``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from sad_kernels import (
    DistillOutput,
    Head,
    Objective,
    Outcomes,
    TeacherHidden,
    TeacherTopK,
    linear_cross_entropy,
    linear_distill_loss,
)
from torch import Tensor

from sad.data.batch import Batch
from sad.data.outcomes import OutcomeTables
from sad.losses.prefix_inside import InsideTeacherTokens

SUREST = -1e-6
"""Log-probability that a group has at most here: at 0 the divergence has no gradient."""


class TeacherLikelihood(NamedTuple):
    """What a teacher gives the text of each group, for the student's positions."""

    log_probs: Tensor  # fp32 [B, L]: summed over the group that begins there; else 0

    @classmethod
    def of(cls, batch: Batch, nll: Tensor) -> TeacherLikelihood:
        """From the negative log-probability of each of the teacher's own targets, [B, L_t]."""
        assert batch.theirs is not None
        groups = batch.theirs.teacher_groups
        known = groups >= 0
        sums = nll.new_zeros(batch.labels.numel()).index_add(0, groups[known], -nll[known])
        return cls(sums.float().view(batch.labels.shape))


Target = TeacherHidden | TeacherTopK | TeacherLikelihood
"""What a teacher may give a batch, of its own or another tokenizer."""


class CrossTokenizerLoss:
    """The loss of a batch against a teacher's hidden states [B, L_t, D_t] of its own tokens, or
    against what a cache holds for the student's positions: some outcomes [B, L, K], or the
    likelihood of each group [B, L].

    ``likelihood`` says whether training compares groups; else, and in evaluations, outcomes are
    compared at boundaries, and in training also ``inside`` the teacher's tokens if that is given,
    and groups with the weight ``likelihood_weight`` relative to the other term's.
    """

    def __init__(
        self,
        tables: OutcomeTables,
        device: torch.device,
        *,
        likelihood: bool = False,
        inside: InsideTeacherTokens | None = None,
        likelihood_weight: float = 0.0,
        chunk_bytes: int | None = None,
        impl: str = "auto",
    ) -> None:
        self.tables = tables
        self.outcomes = Outcomes(
            student=torch.from_numpy(tables.student).to(device),
            teacher=torch.from_numpy(tables.teacher).to(device),
            count=tables.count,
        )
        self.likelihood = likelihood
        self.inside = inside
        self.likelihood_weight = likelihood_weight
        self.chunk_bytes = chunk_bytes
        self.impl = impl

    def __call__(
        self,
        hidden: Tensor,  # [B, L, D_s]
        head: Head,
        batch: Batch,
        teacher: Target,
        objective: Objective,
        num_items: int,
        training: bool,
    ) -> DistillOutput:
        """The objective's sum over the batch's targets, divided by ``num_items``.

        ``kd`` and ``agree`` are sums over boundaries, or ``kd`` over groups. Without ``training``
        the parts are those of an evaluation, whose weights are left as they are.
        """
        if training and self.likelihood:
            return self._by_groups(hidden, head, batch, teacher, objective, num_items)
        assert not isinstance(teacher, TeacherLikelihood), "it says nothing of outcomes"
        out = self._by_outcomes(hidden, head, batch, teacher, objective, num_items, training)
        weight = objective.kd_weight * self.likelihood_weight
        if not (training and weight):
            return out
        more = self._divergence_of_groups(hidden, head, batch, teacher)
        return out._replace(loss=out.loss + weight * more / num_items)

    def _by_outcomes(
        self,
        hidden: Tensor,
        head: Head,
        batch: Batch,
        teacher: TeacherHidden | TeacherTopK,
        objective: Objective,
        num_items: int,
        training: bool,
    ) -> DistillOutput:
        assert batch.theirs is not None
        at_boundary = batch.theirs.boundaries
        token_weights, places = None, []
        if training:
            objective, share = shared_weight(objective)
            compared = at_boundary
            if self.inside is not None and objective.kd_weight:
                places = self.inside.places(batch)
                compared = at_boundary.clone()
                for place in places:
                    compared[place.row, place.at] = True
            token_weights = torch.where(compared, share, 1.0)
        # Rows that are no boundary weigh nothing, and nothing is read of the teacher's.
        target = teacher
        if isinstance(teacher, TeacherHidden):
            target = TeacherHidden(batch.theirs.at_students(teacher.hidden), teacher.head)
        out = linear_distill_loss(
            hidden,
            head,
            batch.labels,
            target,
            objective,
            outcomes=self.outcomes,
            num_items=num_items,
            token_weights=token_weights,
            kd_token_weights=at_boundary.to(torch.float32),
            chunk_bytes=self.chunk_bytes,
            impl=self.impl,
        )
        if not places or self.inside is None:
            return out
        assert isinstance(teacher, TeacherHidden), "the configuration is checked"
        more = self.inside.divergence(hidden, head, teacher, places, objective)
        loss = out.loss + objective.kd_weight * more / num_items
        return out._replace(loss=loss, kd=out.kd + more.detach())

    def _by_groups(
        self,
        hidden: Tensor,
        head: Head,
        batch: Batch,
        teacher: Target,
        objective: Objective,
        num_items: int,
    ) -> DistillOutput:
        kd_weight = objective.kd_weight
        out = linear_distill_loss(
            hidden,
            head,
            batch.labels,
            None,
            replace(objective, kd_weight=0.0),
            num_items=num_items,
            chunk_bytes=self.chunk_bytes,
            impl=self.impl,
        )
        divergence = self._divergence_of_groups(hidden, head, batch, teacher)
        loss = out.loss + kd_weight * divergence / num_items
        return out._replace(loss=loss, kd=divergence.detach())

    def _divergence_of_groups(
        self, hidden: Tensor, head: Head, batch: Batch, teacher: Target
    ) -> Tensor:
        """The sum of the binary KL over the batch's groups."""
        assert batch.theirs is not None
        groups = batch.theirs.groups
        labels = batch.labels.masked_fill(groups < 0, -100)
        nll = _nll(hidden, head, labels, self.chunk_bytes, self.impl)
        zeros = nll.new_zeros(batch.labels.numel())
        ours = zeros.index_add(0, groups.clamp(min=0).flatten(), -nll.flatten())
        if isinstance(teacher, TeacherHidden):
            teacher = likelihood(batch, teacher, self.chunk_bytes, self.impl)
        assert isinstance(teacher, TeacherLikelihood), "the configuration is checked"
        # Groups that there are not have the sum 0 on both sides, and no divergence.
        return binary_kl(teacher.log_probs.flatten(), ours).sum()


def likelihood(
    batch: Batch, teacher: TeacherHidden, chunk_bytes: int | None = None, impl: str = "auto"
) -> TeacherLikelihood:
    """What a teacher's hidden states [B, L_t, D] say of the text of each group."""
    assert batch.theirs is not None
    labels = batch.theirs.batch.labels.masked_fill(batch.theirs.teacher_groups < 0, -100)
    with torch.no_grad():
        nll = _nll(teacher.hidden, teacher.head, labels, chunk_bytes, impl)
    return TeacherLikelihood.of(batch, nll)


def _nll(hidden: Tensor, head: Head, labels: Tensor, chunk_bytes: int | None, impl: str) -> Tensor:
    """The negative log-probability of each label, [B, L]; 0 for -100."""
    return linear_cross_entropy(
        hidden,
        head.weight,
        labels,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        valid_vocab=head.valid_vocab,
        reduction="none",
        chunk_bytes=chunk_bytes,
        impl=impl,
    )


def shared_weight(objective: Objective) -> tuple[Objective, float]:
    """The objective whose cross-entropy weighs as much as both terms together, and the share of it
    that is left where both are there."""
    both = objective.ce_weight + objective.kd_weight
    if not both:
        return objective, 1.0
    return replace(objective, ce_weight=both), objective.ce_weight / both


def binary_kl(known: Tensor, ours: Tensor) -> Tensor:
    """KL of two events of log-probabilities ``known`` and ``ours``, both taken at ``SUREST``."""
    t, s = known.clamp(max=SUREST), ours.clamp(max=SUREST)
    rest_t, rest_s = torch.log(-torch.expm1(t)), torch.log(-torch.expm1(s))
    return t.exp() * (t - s) + rest_t.exp() * (rest_t - rest_s)
