"""Whole training runs: the trainer beside other trainers, and what its parts cost and gain."""
