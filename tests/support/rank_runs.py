"""Tiny models, text, and configurations of runs that are the same on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sad.config.schema import DistillConfig
from support.chat import byte_tokenizer, say, write_records
from support.tiny import save_tiny, tiny_gpt2, tiny_llama, write_texts

CASES: dict[str, dict[str, Any]] = {
    "kd": {},
    "structural": {
        "feature": {"weight": 0.5},
        "attention": {"weight": 0.5},
        "relations": {"weight": 0.2},
        "layerwise": {"weight": 0.2},
        "use_curriculum": False,
    },
    "baseline": {"baseline": True},
    "taid": {"taid": {"enabled": True}},
    "conversations": {
        "data": "chat",
        "student": "chat student",
        "teacher": "chat teacher",
        "max_length": 64,
    },
}
"""What several ranks must train as one process does."""


@dataclass
class Material:
    """Models and texts in ``folder``."""

    folder: Path

    def config(self, case: str, run_dir: Path, **keys: Any) -> DistillConfig:
        chosen = CASES[case] | keys
        text = chosen.pop("data", "texts")
        base: dict[str, Any] = {
            "teacher": "teacher",
            "student": "student",
            "data": {
                "train": str(self.folder / text),
                "eval_fraction": 0.3,
                "cache_dir": str(self.folder / "cache"),
            },
            "max_length": 32,
            "max_steps": 6,
            "global_batch_size": 10,
            "gradient_accumulation_steps": 2,
            "learning_rate": 4e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "ema_decay": 0.95,
            "per_device_eval_batch_size": 2,
            "max_eval_rows": 5,
            "save_steps": 2,
            "eval_steps": 3,
            "logging_steps": 1,
            "device": "cpu",
            "output_dir": str(run_dir),
        }
        config = base | chosen
        for role in ("teacher", "student"):
            config[role] = str(self.folder / config[role])
        return DistillConfig(**config)


def make_material(folder: Path) -> Material:
    """Save the models and texts of all cases."""
    save_tiny(folder / "teacher", tiny_llama(seed=1, tie_word_embeddings=False))
    save_tiny(folder / "student", tiny_llama(seed=2))
    dropout = {f"{name}_pdrop": 0.1 for name in ("resid", "embd", "attn")}
    save_tiny(folder / "dropout", tiny_gpt2(seed=4, **dropout))
    write_texts(folder / "texts", count=24)
    tokenizer = byte_tokenizer()
    for role, seed in (("chat teacher", 5), ("chat student", 6)):
        model = tiny_llama(seed=seed, vocab_size=len(tokenizer))
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    (folder / "chat").mkdir()
    turns = [say(f"user: {i}", f"assistant: {i * i}") for i in range(60)]
    write_records(folder / "chat" / "chat.jsonl", *({"messages": turn} for turn in turns))
    return Material(folder)
