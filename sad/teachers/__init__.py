"""Teachers: frozen models, and policies that decide which of their passes are the targets."""
