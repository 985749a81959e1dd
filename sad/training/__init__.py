"""One training run: inputs, student, loop, evaluation."""
