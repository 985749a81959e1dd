r"""The divergence from a teacher of another tokenizer inside its tokens.

Where a student has read up to a byte inside a token of the teacher's, the teacher has said nothing
since that token began. With d the bytes read since then, its last distribution conditioned on the
tokens that extend them,

    P(v | d) = P(v) / sum_{u extends d} P(u),   v = d + more,

says what comes next, and ``more`` counts for its longest prefix among the outcomes. Left out is
that the teacher might have spelled d in shorter tokens. For research: logits of these positions
exist, a few rows at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch
from sad_kernels import Head, Objective, TeacherHidden
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sad.data.batch import Batch
from sad.data.outcomes import OutcomeTables
from sad.data.token_bytes import TokenBytes

ROWS_AT_ONCE = 64


class InsidePlace(NamedTuple):
    """A position of the student's inside a token of the teacher's."""

    row: int
    at: int  # the student's position
    teacher_at: int  # the teacher's position before that token
    read: bytes  # of the token


class InsideTeacherTokens:
    """Where a student stands inside its teacher's tokens, and the divergence there."""

    def __init__(self, student: TokenBytes, teacher: TokenBytes, tables: OutcomeTables) -> None:
        self._student, self._teacher = student, teacher
        self._count = tables.count
        self._of_student = torch.from_numpy(tables.student).long()
        exact = zip(student.pieces, tables.student.tolist(), strict=True)
        self._outcomes = {piece: o for piece, o in exact if 0 < len(piece) == tables.sizes[o]}
        texts = ((p, i) for i, p in enumerate(teacher.pieces) if p and not teacher.special[i])
        self._sorted = sorted(texts)
        self._extensions: dict[bytes, tuple[Tensor, Tensor]] = {}

    def places(self, batch: Batch) -> list[InsidePlace]:
        """The positions with a target inside tokens that begin at or after a boundary."""
        theirs, found = batch.theirs, []
        assert theirs is not None
        labels, ids = batch.labels.cpu().numpy(), batch.input_ids.cpu().numpy()
        teacher_ids = theirs.batch.input_ids.cpu().numpy()
        positions = theirs.positions.cpu().numpy()
        for row in range(len(ids)):
            boundaries = np.flatnonzero(positions[row] >= 0).tolist()
            for begin, end in zip(boundaries, [*boundaries[1:], ids.shape[1]], strict=True):
                there, read = int(positions[row, begin]), b""
                taken = 0  # bytes since the boundary that the teacher has read whole tokens of
                for at in range(begin + 1, end):
                    if labels[row, at] < 0:
                        break  # the end of the document, or of the row
                    read += self._student.pieces[ids[row, at]]
                    while there + 1 < teacher_ids.shape[1]:
                        size = int(self._teacher.sizes[teacher_ids[row, there + 1]])
                        if taken + size > len(read):
                            break
                        there, taken = there + 1, taken + size
                    if taken < len(read):
                        found.append(InsidePlace(row, at, there, read[taken:]))
        return found

    def divergence(
        self,
        hidden: Tensor,  # [B, L, D_s]
        head: Head,
        teacher: TeacherHidden,
        places: list[InsidePlace],
        objective: Objective,
    ) -> Tensor:
        """The sum over ``places`` of the KL between outcomes, scaled as the objective's is."""
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(places), ROWS_AT_ONCE):
            part = places[start : start + ROWS_AT_ONCE]
            rows = torch.tensor([place.row for place in part], device=hidden.device)
            at = torch.tensor([place.at for place in part], device=hidden.device)
            with torch.no_grad():
                target = self._targets(teacher, part, objective.temperature)
            total = total + checkpoint(
                self._kl, hidden[rows, at], head, target, objective, use_reentrant=False
            )
        return total

    def _kl(self, hidden: Tensor, head: Head, target: Tensor, objective: Objective) -> Tensor:
        width = len(self._of_student)
        logits = head(hidden)[..., :width].float() / objective.temperature
        mass = logits.new_zeros(len(logits), self._count)
        mass = mass.index_add(1, self._of_student.to(hidden.device), logits.softmax(-1))
        log_ratio = torch.xlogy(target, target) - target * mass.clamp(min=1e-30).log()
        return objective.kd_scale * log_ratio.sum()

    def _targets(
        self, teacher: TeacherHidden, places: list[InsidePlace], temperature: float
    ) -> Tensor:  # [n, outcomes]
        device = teacher.hidden.device
        rows = torch.tensor([place.row for place in places], device=device)
        at = torch.tensor([place.teacher_at for place in places], device=device)
        logits = teacher.head(teacher.hidden[rows, at]).float() / temperature
        target = logits.new_zeros(len(places), self._count)
        for number, place in enumerate(places):
            ids, outcomes = (part.to(device) for part in self._extending(place.read))
            target[number].index_add_(0, outcomes, logits[number, ids].softmax(0))
        return target

    def _extending(self, read: bytes) -> tuple[Tensor, Tensor]:
        """The teacher's tokens that go on after ``read``, and the outcome of what follows."""
        if read not in self._extensions:
            ids, outcomes = [], []
            for text, token_id in self._sorted[bisect_left(self._sorted, (read, -1)) :]:
                if not text.startswith(read):
                    break
                outcome = self._outcome(text[len(read) :])
                if outcome is not None:
                    ids.append(token_id)
                    outcomes.append(outcome)
            self._extensions[read] = torch.tensor(ids), torch.tensor(outcomes)
        return self._extensions[read]

    def _outcome(self, text: bytes) -> int | None:
        """The number of the longest prefix of a text that is an outcome; None for none."""
        sizes = range(len(text), 0, -1)
        return next((self._outcomes[text[:n]] for n in sizes if text[:n] in self._outcomes), None)
