"""Training benchmarks: the trainer against other trainers, and the cost and gain of its parts."""
