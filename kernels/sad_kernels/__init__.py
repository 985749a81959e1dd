"""Distillation losses for language models with large vocabularies, and a fused EMA.

Functions of logits: ``cross_entropy``, ``kl_div``, ``distill_loss``. Functions of hidden states and
a head, which never hold all logits: ``linear_cross_entropy``, ``linear_distill_loss``, and
``linear_memory_bytes`` for what they take. ``Objective`` says what is minimised, ``Head`` and
``Teacher*`` wrap the tensors, ``Outcomes`` say what tokens of two tokenizers have in common, and
``VocabShard`` says which columns of a vocabulary that is split over processes they hold.
``ema_update_`` and ``ema_swap_`` keep a moving average of a model.
``reference`` defines all of it in eager PyTorch.

Each name is imported on first use: ``import sad_kernels`` itself imports neither torch nor Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of _HOME, for type checkers and editors
    from sad_kernels import reference as reference
    from sad_kernels.ce import cross_entropy as cross_entropy
    from sad_kernels.ema import ema_swap_ as ema_swap_
    from sad_kernels.ema import ema_update_ as ema_update_
    from sad_kernels.kd import distill_loss as distill_loss
    from sad_kernels.kd import kl_div as kl_div
    from sad_kernels.linear import linear_cross_entropy as linear_cross_entropy
    from sad_kernels.linear import linear_distill_loss as linear_distill_loss
    from sad_kernels.memory import LinearMemory as LinearMemory
    from sad_kernels.memory import linear_memory_bytes as linear_memory_bytes
    from sad_kernels.objective import DistillOutput as DistillOutput
    from sad_kernels.objective import Head as Head
    from sad_kernels.objective import Objective as Objective
    from sad_kernels.objective import TeacherHidden as TeacherHidden
    from sad_kernels.objective import TeacherLogits as TeacherLogits
    from sad_kernels.objective import TeacherTopK as TeacherTopK
    from sad_kernels.outcomes import Outcomes as Outcomes
    from sad_kernels.vocab import VocabShard as VocabShard

__version__ = "0.1.0"

_HOME = {
    "DistillOutput": "sad_kernels.objective",
    "Head": "sad_kernels.objective",
    "LinearMemory": "sad_kernels.memory",
    "Objective": "sad_kernels.objective",
    "Outcomes": "sad_kernels.outcomes",
    "TeacherHidden": "sad_kernels.objective",
    "TeacherLogits": "sad_kernels.objective",
    "TeacherTopK": "sad_kernels.objective",
    "VocabShard": "sad_kernels.vocab",
    "cross_entropy": "sad_kernels.ce",
    "distill_loss": "sad_kernels.kd",
    "ema_swap_": "sad_kernels.ema",
    "ema_update_": "sad_kernels.ema",
    "kl_div": "sad_kernels.kd",
    "linear_cross_entropy": "sad_kernels.linear",
    "linear_distill_loss": "sad_kernels.linear",
    "linear_memory_bytes": "sad_kernels.memory",
}
"""Public name -> the module that has it."""

__all__ = [*_HOME, "reference"]  # pyright: ignore[reportUnsupportedDunderAll]  # reads the above


def _import(name: str) -> Any:
    """Import a public name, or a module that has some, and keep it for the next time."""
    path = f"{__name__}.{name}"
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name == "reference" or path in _HOME.values():
        value = import_module(path)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # a name that does not exist stays an error to type checkers
    __getattr__ = _import


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
