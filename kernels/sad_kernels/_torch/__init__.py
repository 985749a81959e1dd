"""Losses as PyTorch operations over tiles of logits: the implementation for any device."""
