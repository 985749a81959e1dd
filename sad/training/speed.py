"""How much of a device's peak training uses, for the train records."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.models.flops import bf16_peak, forward_flops, training_flops
from sad.training.inputs import RunInputs


@dataclass(frozen=True)
class Speed:
    """What turns targets per second into tokens per second and rank, and into MFU.

    Model FLOP utilisation (MFU) is ``positions / s x (student + teacher) / (ranks x peak)``, with
    the operations per position of ``training_flops`` and ``forward_flops``. Positions are those of
    whole rows, of which a share are targets; ``peak`` is the device's on dense bf16 matrices,
    whatever the dtype of the run. What gradient checkpointing computes again does not count.
    """

    ranks: int
    positions_per_target: float
    student_flops: int
    teacher_flops: int
    peak: float | None
    """None for a device whose peak is not known."""

    @classmethod
    def of(cls, config: DistillConfig, student: PreTrainedModel, inputs: RunInputs) -> Speed:
        rows, length = inputs.train_rows, config.max_length
        frozen = inputs.frozen_teacher
        teacher = 0 if frozen is None else forward_flops(frozen.model, length)
        return cls(
            ranks=inputs.world.size,
            positions_per_target=len(rows) * length / max(int(rows.num_targets.sum()), 1),
            student_flops=training_flops(student, length),
            teacher_flops=teacher,
            # Rows that the student writes have other positions, and other operations.
            peak=None if config.lmbda else peak_of(inputs.device),
        )

    def record(self, targets_per_second: float, *, with_teacher: bool) -> dict[str, float]:
        """What a train record says of the speed besides: ``tokens_per_second_per_rank`` on several
        ranks, ``mfu`` where the peak is known. ``with_teacher``: whether the teacher ran."""
        found = {}
        if self.ranks > 1:
            found["tokens_per_second_per_rank"] = targets_per_second / self.ranks
        if self.peak is not None:
            flops = self.student_flops + self.teacher_flops * with_teacher
            positions = targets_per_second * self.positions_per_target
            found["mfu"] = positions * flops / (self.ranks * self.peak)
        return found


def peak_of(device: torch.device) -> float | None:
    """Operations per second of a device on dense bf16 matrices, where they are known."""
    return bf16_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
