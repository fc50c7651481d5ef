"""Ahead-of-time compilation for GPUs that need not be here, with a report of what each kernel needs."""
