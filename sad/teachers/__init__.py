"""Teachers: what the student learns from."""
