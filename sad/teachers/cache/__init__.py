"""The teacher cache: a teacher's targets written to disk once, so that students are trained from a
folder. ``sparse`` (K ids with their weights per token) and ``hidden`` (final hidden states) turn
tensors into records and back; they touch no file."""
