"""Training: one run from its inputs to its report, the loop, the root module, evaluation."""
