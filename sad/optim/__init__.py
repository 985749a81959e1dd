"""Optimizer, number formats and learning-rate schedule."""
