"""Targets that other programs have written: their formats, and what is checked of them."""
