"""Tests, in the rooms of the code that they test, and what they have in common."""
