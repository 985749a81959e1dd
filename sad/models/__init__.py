"""Teacher and student models: loading, splitting off the head, experts, checks before a run."""

from sad.models.heads import split_head, with_valid_vocab

__all__ = ["split_head", "with_valid_vocab"]
