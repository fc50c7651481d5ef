"""Linear layer behind a GELU."""
