"""Attacks on the trainer's promises, in numbers: each inflicts damage and counts what is lost."""
