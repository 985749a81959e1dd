"""A teacher that reads its student's text in the tokens of its own tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from sad.data.batch import Batch
from sad.losses.capture import Capture
from sad.teachers.frozen import FrozenTeacher, TeacherOutput


class OtherTokenizerTeacher(FrozenTeacher):
    """A frozen teacher whose batches bring its own tokens, as ``Batch.theirs``.

    Its hidden states [B, L_t, D] are those of its own positions; the weights of the divergence
    are 1 where the student has read the same text, and 0 elsewhere.
    """

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        """Run the teacher once on its own tokens. Nothing can be captured beside the student's."""
        assert batch.theirs is not None and capture is None, "the configuration is checked"
        return super().forward(batch.theirs.batch)._replace(kd_weights=self.kd_weights(batch))

    def kd_weights(self, batch: Batch) -> Tensor | None:
        """1 at boundaries, else 0: fp32 [B, L]; None for a batch of the teacher's own tokens."""
        if batch.theirs is None:
            return None
        return batch.theirs.boundaries.to(torch.float32)

    def own_tokens(self, batch: Batch) -> Batch:
        return batch if batch.theirs is None else batch.theirs.batch
