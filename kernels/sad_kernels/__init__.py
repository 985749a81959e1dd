"""Losses for distilling language models over large vocabularies, and fused EMA."""

from sad_kernels import reference
from sad_kernels.ce import cross_entropy
from sad_kernels.ema import ema_swap_, ema_update_
from sad_kernels.kd import distill_loss, kl_div
from sad_kernels.linear import linear_cross_entropy, linear_distill_loss
from sad_kernels.memory import LinearMemory, linear_memory_bytes
from sad_kernels.objective import (
    DistillOutput,
    Head,
    Objective,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
)

__version__ = "0.1.0"

__all__ = [
    "DistillOutput",
    "Head",
    "LinearMemory",
    "Objective",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherTopK",
    "cross_entropy",
    "distill_loss",
    "ema_swap_",
    "ema_update_",
    "kl_div",
    "linear_cross_entropy",
    "linear_distill_loss",
    "linear_memory_bytes",
    "reference",
]
