"""Text to packed rows of tokens: reading, splitting, tokenizing, packing, batching."""
