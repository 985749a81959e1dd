"""Short runs whose teacher has another tokenizer than its student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sad.config.schema import DistillConfig
from support.tiny import save_tiny, tiny_llama, tiny_run, tiny_tokenizer


def settings(folder: Path, **keys: Any) -> dict[str, Any]:
    """A run of two models with equal tokenizers, of 512 tokens."""
    found = tiny_run(folder, tiny_llama(seed=2), tiny_llama(seed=1))
    found["data"] |= {"cache_dir": str(folder / "rows")}
    objective = {"label_smoothing": 0.0, "temperature": 1.0, "kd_weight": 0.7}
    run = {"max_steps": 3, "max_eval_rows": 16, "device": "cpu", "learning_rate": 1e-3}
    return found | objective | run | keys


def with_bytes(folder: Path, **keys: Any) -> DistillConfig:
    """The same, with a student of another tokenizer than its teacher: 300 tokens."""
    found = settings(folder, **{"cross_tokenizer": "prefix"} | keys)
    student = tiny_llama(seed=2, vocab_size=300)
    found["student"] = save_tiny(folder / "student-300", student, tiny_tokenizer(300))
    return DistillConfig(**found)
