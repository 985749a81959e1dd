"""Teachers: frozen models, policies that decide which of their passes are the targets, and a cache
of hidden states for evaluations."""
