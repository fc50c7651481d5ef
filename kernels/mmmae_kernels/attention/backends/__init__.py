"""The implementations of attention, one module each."""
