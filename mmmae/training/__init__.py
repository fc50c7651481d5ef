"""Training: a step that never waits for the device, and runs of pretraining and fine-tuning made of it."""

from .step import TrainingStep

__all__ = ["TrainingStep"]
