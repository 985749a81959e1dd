"""Teacher and student models: loading, splitting off the head, experts, checks before a run."""

from sad.models.heads import Backbone, split_head, with_valid_vocab
from sad.models.load import load_student, load_teacher

__all__ = ["Backbone", "load_student", "load_teacher", "split_head", "with_valid_vocab"]
