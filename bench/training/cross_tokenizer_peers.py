r"""Other people's losses between tokenizers, eager, for comparison: shared strings, ULD and GOLD.

At boundaries ``p`` and ``q`` are the next-token distributions of teacher and student, and ``p_(i)``
their entries in falling order. All weigh CE at every target and their own term beside it, but for
the first, which weighs like the ``prefix`` loss.

==============  ====================================================================================
shared strings  forward KL over the tokens that both have, by their strings, and one outcome for all
                others
ULD             ``sum_i |p_(i) - q_(i)|``, the shorter side padded with zeros (arXiv 2402.12030)
GOLD            of each group: the first distributions, times the probabilities of the later tokens;
                JSD over the shared strings and ULD over the others, weighted by the share of the
                teacher's tokens that are shared (TRL's GOLD trainer, ``hybrid``)
==============  ====================================================================================

ULD and GOLD hold the logits of both sides whole.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from sad_kernels import DistillOutput, Head, Objective, TeacherHidden, linear_distill_loss
from torch import Tensor

from sad.data.alignment import Side
from sad.data.batch import Batch
from sad.data.outcomes import OutcomeTables, shared_outcomes
from sad.losses.cross_tokenizer import CrossTokenizerLoss, Target

SMALL = 1e-8  # added to probabilities whose logarithm is taken


def shared_strings(student: Side, teacher: Side) -> OutcomeTables:
    """The tokens of equal strings, and one outcome for the others."""
    tables = shared_outcomes(student, teacher)
    ours, theirs = (
        np.where(_is_shared(side, table, tables), table, tables.count).astype(np.int32)
        for side, table in ((student, tables.student), (teacher, tables.teacher))
    )
    return replace(
        tables,
        student=ours,
        teacher=theirs,
        count=tables.count + 1,
        sizes=np.append(tables.sizes, 0),
        shorter=np.append(tables.shorter, -1),
    )


def _is_shared(side: Side, table: np.ndarray, tables: OutcomeTables) -> np.ndarray:
    """Whether each token is the string of its outcome, bool [V]; special tokens are."""
    size = tables.sizes[table]
    return (size == side.bytes.sizes) | (size == 0)


class UldLoss(CrossTokenizerLoss):
    """CE, and ULD at boundaries."""

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
        if not training:
            return super().__call__(hidden, head, batch, teacher, objective, num_items, training)
        assert isinstance(teacher, TeacherHidden), "it needs whole distributions"
        text = replace(objective, kd_weight=0.0)
        out = linear_distill_loss(hidden, head, batch.labels, None, text, num_items=num_items)
        distance = self.distance(hidden, head, batch, teacher)
        loss = out.loss + objective.kd_weight * distance / num_items
        return out._replace(loss=loss, kd=distance.detach())

    def distance(self, hidden: Tensor, head: Head, batch: Batch, teacher: TeacherHidden) -> Tensor:
        """The sum over the batch's boundaries."""
        (ours, theirs), _ = self._log_probs(hidden, head, batch, teacher)
        return difference_of_sorted(theirs.exp(), ours.exp()).sum()

    def _log_probs(
        self, hidden: Tensor, head: Head, batch: Batch, teacher: TeacherHidden
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Log-probabilities at boundaries, [n, V_s] and [n, V_t], and those of the later tokens of
        the group that begins at each, [n] both."""
        assert batch.theirs is not None
        at = batch.theirs.boundaries
        groups = batch.theirs.groups, batch.theirs.teacher_groups
        first = at.flatten().nonzero()[:, 0]
        teacher_first = (
            torch.arange(len(at), device=at.device)[:, None] * teacher.hidden.shape[1]
            + batch.theirs.positions
        )[at]
        found, later = [], []
        for states, side, labels, group, begins in (
            (hidden, head, batch.labels, groups[0], first),
            (teacher.hidden, teacher.head, batch.theirs.batch.labels, groups[1], teacher_first),
        ):
            logs = all_log_probs(states, side)
            known = logs.gather(1, labels.flatten().clamp(min=0)[:, None])[:, 0]
            counts = (group >= 0).flatten()
            counts[begins] = False  # the first token of a group is not a later one
            sums = known.new_zeros(batch.labels.numel())
            sums = sums.index_add(0, group.flatten().clamp(min=0), known * counts)
            found.append(logs[begins])
            later.append(sums[first])  # a group has the number of its boundary
        return (found[0], found[1]), (later[0], later[1])


class GoldLoss(UldLoss):
    """CE, and the hybrid loss of GOLD at boundaries; the tables are those of ``shared_strings``."""

    def distance(self, hidden: Tensor, head: Head, batch: Batch, teacher: TeacherHidden) -> Tensor:
        (ours, theirs), later = self._log_probs(hidden, head, batch, teacher)
        q, p = ours.exp() * later[0].exp()[:, None], theirs.exp() * later[1].exp()[:, None]
        rest = self.tables.count - 1
        student, teachers = self.outcomes.student.long(), self.outcomes.teacher.long()
        of_student = torch.argsort(student)[: int((student < rest).sum())]
        of_teacher = torch.argsort(teachers)[: int((teachers < rest).sum())]
        a, b = p[:, of_teacher], q[:, of_student]
        middle = ((a + b) / 2 + SMALL).log()
        jsd = (a * ((a + SMALL).log() - middle) + b * ((b + SMALL).log() - middle)).sum(1) / 2
        others = difference_of_sorted(p[:, teachers == rest], q[:, student == rest])
        share = len(of_teacher) / len(teachers)
        return (share * jsd + (1 - share) * others).sum()


def all_log_probs(hidden: Tensor, head: Head) -> Tensor:
    """Log-probabilities of every position, [N, V]."""
    assert head.softcap is None and head.bias is None
    vocab = head.valid_vocab or len(head.weight)
    states = hidden.flatten(0, 1).to(head.weight.dtype)
    return (states @ head.weight[:vocab].T * head.logit_scale).float().log_softmax(1)


def difference_of_sorted(p: Tensor, q: Tensor) -> Tensor:
    """``sum_i |p_(i) - q_(i)|`` of each row, [n]."""
    width = max(p.shape[1], q.shape[1])
    p, q = (
        F.pad(side.sort(1, descending=True).values, (0, width - side.shape[1])) for side in (p, q)
    )
    return (p - q).abs().sum(1)
