"""Distillation losses for language models with large vocabularies, and a fused EMA.

Functions of logits: ``cross_entropy``, ``kl_div``, ``distill_loss``. Functions of hidden states and
a head, which never hold all logits: ``linear_cross_entropy``, ``linear_distill_loss``, and
``linear_memory_bytes`` for what they take. ``Objective`` says what is minimised, ``Head`` and
``Teacher*`` wrap the tensors. ``ema_update_`` and ``ema_swap_`` keep a moving average of a model.
``reference`` defines all of it in eager PyTorch.
"""

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
