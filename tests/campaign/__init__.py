"""Interruptions and damage, inflicted on whole runs: what a run promises, and whether it holds."""
