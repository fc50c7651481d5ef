"""Launching, autotuning and compiling Triton kernels, with or without a GPU."""
