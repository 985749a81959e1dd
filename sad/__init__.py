"""SAD, Student-Aware Distillation: turn a large language model into a small one on little memory.

``from sad import DistillConfig, distill`` runs a whole distillation. The parts for a training loop
of one's own are submodules: ``sad.accumulate``, ``sad.curriculum``, ``sad.ema``, ``sad.models``,
``sad.data``, ``sad.checkpoint``, ``sad.losses``, and ``sad.integrations`` for other people's
trainers. All of them are imported on first use, so ``import sad`` itself imports neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sad_kernels import __version__

    from sad.config.load import load_config
    from sad.config.schema import DistillConfig
    from sad.training.run import RunResult, distill

__all__ = ["DistillConfig", "RunResult", "__version__", "distill", "load_config"]

_HOME = {
    "DistillConfig": "sad.config.schema",
    "RunResult": "sad.training.run",
    "__version__": "sad_kernels",
    "distill": "sad.training.run",
    "load_config": "sad.config.load",
}
_SUBMODULES = frozenset(
    {
        "accumulate",
        "checkpoint",
        "config",
        "curriculum",
        "data",
        "ema",
        "errors",
        "integrations",
        "losses",
        "models",
    }
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _SUBMODULES:
        return import_module(f"sad.{name}")
    raise AttributeError(f"module 'sad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
