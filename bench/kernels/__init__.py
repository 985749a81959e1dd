"""Losses and averages beside their peers: time, memory, error."""
