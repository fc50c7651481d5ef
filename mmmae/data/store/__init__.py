"""Preprocessed subjects on disk: memory-mapped caches, and shards."""
