"""Training: a step that never waits for the device, and what it is made of."""

from .step import TrainingStep

__all__ = ["TrainingStep"]
