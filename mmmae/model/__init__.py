"""The model: the reference that defines it, and the fast one."""
