"""Triton: launches, executors in place of a GPU, autotuning, compilation, sums of partial sums."""
