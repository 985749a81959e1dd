"""Which keys go together with ``cross_tokenizer``, a teacher with another tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sad.config.values import require

if TYPE_CHECKING:
    from sad.config.schema import DistillConfig


def check_cross_tokenizer(config: DistillConfig) -> None:
    """Raise ``ConfigError`` for a key that has no meaning with or without ``cross_tokenizer``."""
    mode = config.cross_tokenizer
    require(
        "teacher_tokenizer",
        "be left out without cross_tokenizer",
        config.teacher_tokenizer,
        "teacher and student share one tokenizer otherwise, which tokenizer names",
        holds=mode is not None or config.teacher_tokenizer is None,
    )
    require(
        "prefix_inside",
        "be false unless cross_tokenizer is prefix",
        config.prefix_inside,
        "leave it out",
        holds=mode == "prefix" or not config.prefix_inside,
    )
    require(
        "likelihood_weight",
        "be 0 unless cross_tokenizer is prefix",
        config.likelihood_weight,
        "leave it out",
        holds=mode == "prefix" or not config.likelihood_weight,
    )
    if mode is None:
        return
    objective = config.objective()
    losses = ", ".join(config.structural_weights)
    refusals = (
        (
            "teacher",
            "be given with cross_tokenizer",
            config.teacher,
            "name a model; with teacher_cache, its tokenizer in teacher_tokenizer is enough",
            config.teacher is not None or config.teacher_tokenizer is not None,
        ),
        (
            "likelihood_weight",
            "be 0 with a teacher_cache",
            config.likelihood_weight,
            "it holds outcomes or likelihoods, not both: leave it out, or teacher_cache",
            config.teacher_cache is None or not config.likelihood_weight,
        ),
        (
            "prefix_inside",
            "be false with a teacher_cache",
            config.prefix_inside,
            "its logits inside the teacher's tokens are not there: leave it out, or teacher_cache",
            config.teacher_cache is None or not config.prefix_inside,
        ),
        (
            "vocab_map",
            "be left out with cross_tokenizer",
            config.vocab_map,
            "it is for vocabularies of a common base: keep one of both",
            config.vocab_map is None,
        ),
        (
            "student_init",
            "be random or pretrained with cross_tokenizer",
            config.student_init,
            "a student of the teacher's layers has its embeddings, and so its tokenizer",
            config.student_init != "layers",
        ),
        (
            "routing.mode",
            "be teacher with cross_tokenizer",
            config.routing.mode,
            "leave it out",
            config.routing.mode == "teacher",
        ),
        (
            "taid.enabled",
            "be false with cross_tokenizer",
            config.taid.enabled,
            "its target is a mixture over one vocabulary: leave it out",
            not config.taid.enabled,
        ),
        (
            "cross_tokenizer",
            "be left out with structural losses",
            mode,
            f"they compare token by token: leave {losses} out",
            not config.structural_weights,
        ),
        (
            "divergence",
            "be forward_kl with cross_tokenizer",
            config.divergence,
            "leave it out",
            config.divergence == "forward_kl",
        ),
        (
            "z_loss",
            "be 0 with cross_tokenizer prefix",
            config.z_loss,
            "it would weigh less where teacher and student are compared: leave it out",
            mode != "prefix" or not objective.z_loss,
        ),
    )
    for key, expectation, value, remedy, holds in refusals:
        require(key, expectation, value, remedy, holds=holds)
