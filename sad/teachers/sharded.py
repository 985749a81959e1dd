"""A frozen teacher that is split over the ranks of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sad_kernels import Head, TeacherHidden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.data.batch import Batch
from sad.distributed.loading import fill
from sad.distributed.sharding import reshard, shard_frozen
from sad.distributed.world import World
from sad.models.heads import decoder_layers, read_head, split_head, with_valid_vocab
from sad.models.load import model_to_fill
from sad.teachers.frozen import FrozenTeacher, T


class ShardedTeacher(FrozenTeacher):
    """A frozen teacher whose layers and head are split, in place, over the ranks of ``mesh``.

    Its head is whole from ``forward`` or ``head`` on until ``release``: the student's backward pass
    reads it again.
    """

    def __init__(
        self, model: PreTrainedModel, valid_vocab: int, *, device: torch.device, mesh: DeviceMesh
    ) -> None:
        self.model = model
        self.device = device
        self._root = _Backbone(model)
        self._valid_vocab = valid_vocab
        with_valid_vocab(read_head(model), valid_vocab)
        output: Any = model.get_output_embeddings()
        tied = output.weight is model.get_input_embeddings().weight
        layers = list(decoder_layers(model))
        # A tied head is whole as long as the embedding is; another one is a unit of its own.
        shard_frozen(self._root, layers if tied else [*layers, output], mesh, keep_root=tied)
        self._unit = self._root if tied else output
        assert isinstance(self._unit, FSDPModule)
        self._unit.set_reshard_after_forward(False, recurse=False)  # but by ``release``
        register_fsdp_forward_method(self._root, "within")

    def head(self) -> Head:
        assert isinstance(self._unit, FSDPModule)
        self._unit.unshard()
        return with_valid_vocab(read_head(self.model), self._valid_vocab)

    def answer(self, input_ids: Tensor) -> TeacherHidden:
        """Hidden states [B, L, D] and head for rows [B, L] of one document each."""
        with torch.no_grad():
            return TeacherHidden(self._root(input_ids), self.head())

    def within(self, run: Callable[[], T]) -> T:
        def run_with_head() -> T:
            self.head()
            return run()

        try:
            return self._root.within(run_with_head)
        finally:
            self.release()

    def release(self) -> None:
        reshard(self._root)

    def _target(self, batch: Batch) -> TeacherHidden:
        return TeacherHidden(self._root(batch.input_ids, batch.position_ids), self.head())


def load_sharded_teacher(
    config: DistillConfig,
    valid_vocab: int,
    *,
    device: torch.device,
    world: World,
    say: Callable[[str], None],
) -> ShardedTeacher | None:
    """The teacher, of which no rank ever holds more than its part; None for one that can be loaded
    only whole (``say`` has been told why) and in a process of its own."""
    found = model_to_fill(config, "teacher", world, say)
    if found is None:
        return None
    model, weights = found
    assert world.mesh is not None
    teacher = ShardedTeacher(model, valid_vocab, device=device, mesh=world.mesh)
    fill(model, weights, device, world)
    return teacher


class _Backbone(nn.Module):
    """A model whose forward pass ends with its hidden states."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._backbone, _ = split_head(model)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return self._backbone(input_ids, position_ids)  # [B, L, D]

    def within(self, run: Callable[[], T]) -> T:
        """``run()`` as a forward pass: while what the root holds is whole."""
        return run()
