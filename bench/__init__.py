"""The bench suite: `pytest bench/ --benchmark`."""
