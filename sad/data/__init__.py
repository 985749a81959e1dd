"""Text to packed rows of tokens: reading, splitting, tokenizing, packing, batching."""

from sad.data.batch import Batch, LossCounts

__all__ = ["Batch", "LossCounts"]
