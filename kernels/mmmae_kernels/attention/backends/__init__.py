"""The backends of attention, one module each."""
