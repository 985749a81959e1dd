"""Kernel benchmarks: time, memory and error of losses and EMA updates against their peers."""
