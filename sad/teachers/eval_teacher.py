"""A frozen teacher for evaluations, which keeps its hidden states from one to the next."""

from __future__ import annotations

import hashlib

from sad_kernels import TeacherHidden
from torch import Tensor
from transformers import PreTrainedModel

from sad.data.batch import Batch
from sad.distributed.world import ALONE, World
from sad.losses.capture import Capture
from sad.teachers.frozen import FrozenTeacher, TeacherOutput


class EvalTeacher:
    """A teacher for evaluations, which all score the same rows: they share its forward passes.

    Its final hidden states lie in host memory, up to ``cache_bytes`` of them, a batch whole or not
    at all; for the batches beyond, and for all with 0, the teacher runs each time. What it returns
    has the same bits either way.

    ``teacher`` must give the same hidden states throughout: gates that are trained or sampled
    (``sad.teachers.policy``) do not, and take ``cache_bytes=0``.

    All ranks of ``world`` score equally many batches: the teacher runs for all or for none of them.
    """

    def __init__(self, teacher: FrozenTeacher, cache_bytes: int, world: World = ALONE) -> None:
        self.teacher = teacher
        self.cache_bytes = cache_bytes
        self.world = world
        self.kept_bytes = 0
        self._kept: dict[bytes, Tensor] = {}  # hidden states

    @property
    def model(self) -> PreTrainedModel:
        return self.teacher.model

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput[TeacherHidden]:
        """As ``FrozenTeacher.forward``. With a ``capture`` the teacher runs: the activations inside
        it are not kept."""
        if capture is not None or not self.cache_bytes:
            return self.teacher.forward(batch, capture)
        key = _key(batch)
        if not self.world.any(key not in self._kept):
            hidden = self._kept[key].to(self.teacher.device)
            weights = self.teacher.kd_weights(batch)
            target = TeacherHidden(hidden, self.teacher.head())
            return TeacherOutput((target,), kd_weights=weights)
        output = self.teacher.forward(batch)
        (target,) = output.targets
        assert isinstance(target, TeacherHidden)
        size = target.hidden.untyped_storage().nbytes()
        if key not in self._kept and self.kept_bytes + size <= self.cache_bytes:
            self.kept_bytes += size
            self._kept[key] = target.hidden.to("cpu")
        return output

    def release(self) -> None:
        """As ``FrozenTeacher.release``."""
        self.teacher.release()


def _key(batch: Batch) -> bytes:
    """A hash of what the teacher reads of a batch."""
    digest = hashlib.blake2b(repr(batch.input_ids.shape).encode(), digest_size=16)
    for tensor in (batch.input_ids, batch.position_ids):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.digest()
