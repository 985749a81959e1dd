"""Campaigns of damage: everything that a user can do to a run, inflicted many times over."""
