"""Checkpoints: what a run saves, how it reaches the disk whole, and how it is read back."""

from sad.checkpoint.store import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

__all__ = ["Checkpoint", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]
