"""Subjects as they are trained on, written once: memory-mapped caches and shards."""
