"""Conditions between the keys of on-policy training: refused here, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sad.config.values import require

if TYPE_CHECKING:
    from sad.config.schema import DistillConfig


def check_on_policy(config: DistillConfig) -> None:
    """Refuse what text that the student writes, or a student that is its own teacher, excludes.

    Raises ``ConfigError``.
    """
    if config.self_teacher is not None:
        _check_self_teacher(config)
    if not config.lmbda:
        return
    require(
        "teacher",
        "be given with lmbda above 0",
        config.teacher,
        "name a model, or let the student be its own with self_teacher",
        holds=config.has_teacher,
    )
    require(
        "max_completion_length",
        f"be below max_length ({config.max_length}) with lmbda above 0",
        config.max_completion_length,
        "a row holds the prompt as well: lower it, or raise max_length",
        holds=config.max_completion_length < config.max_length,
    )
    _refuse(
        config,
        "with lmbda above 0",
        ("teacher_cache", None, "it has no answer to text that is not written yet: name a teacher"),
        ("torch_compile", False, "the compiled layers take no cache of keys and values"),
        ("teacher_prefetch", 0, "what the teacher reads next is not written yet"),
        ("cross_tokenizer", None, "the teacher would have to read it in tokens of its own"),
        ("taid.enabled", False, "the mixture is one on the text's own tokens"),
        ("routing.mode", "teacher", "gates are trained on the text of data.train"),
    )


def _check_self_teacher(config: DistillConfig) -> None:
    _refuse(
        config,
        f"with self_teacher {config.self_teacher}",
        ("teacher", None, "name one of the two"),
        ("teacher_cache", None, "name one of the two"),
        ("torch_compile", False, "the teacher is the same layers as they are"),
        ("teacher_prefetch", 0, "one model cannot work on two micro-batches"),
    )
    require(
        "use_ema",
        "be true with self_teacher ema",
        config.use_ema,
        "the average is the teacher",
        holds=config.use_ema or config.self_teacher != "ema",
    )
    adapted = config.peft.enabled and config.peft.bias in (None, "none")
    require(
        "self_teacher",
        "be ema for a student without adapters, or with trained biases",
        config.self_teacher,
        "set peft.r, and leave peft.bias out: the base must stay as it is",
        holds=adapted or config.self_teacher != "base",
    )


def _refuse(config: DistillConfig, when: str, *keys: tuple[str, Any, str]) -> None:
    """Refuse any of these keys that is not at the value beside it."""
    for key, allowed, why in keys:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        words = "left out" if allowed is None else str(allowed).lower()
        require(key, f"be {words} {when}", value, why, holds=value == allowed)
