"""Losses for distilling language models over large vocabularies, and fused EMA."""

__version__ = "0.1.0"
