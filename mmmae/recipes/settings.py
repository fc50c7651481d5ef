"""How a pretraining run goes."""

from __future__ import annotations

import dataclasses
import math

# What may change when a run goes on, of its settings and its config: it does not change the run's losses.
FREE_SETTINGS = ("workers", "checkpoint_every", "device", "activation_checkpointing")


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """How a run goes.

    Args:
        steps: optimiser steps.
        batch: samples a step and device.
        learning_rate: the peak, after the warm-up.
        warmup: steps of linear warm-up; the cosine to 0 follows.
        weight_decay: of matrices and kernels; biases, norms, positions and the mask token have none.
        clip: largest norm of the gradient.
        seed: of weights, orders and masks, below 2^31.
        workers: processes that read data; 0 reads in the training process.
        checkpoint_every: steps between checkpoints.
        device: `auto`, `cpu`, `cuda` and what else Lightning knows.

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is allowed.
    """

    steps: int = 120
    batch: int = 8
    learning_rate: float = 3e-4
    warmup: int = 12
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    workers: int = 0
    checkpoint_every: int = 50
    device: str = "auto"

    def __post_init__(self) -> None:
        for field, smallest in (("steps", 1), ("batch", 1), ("warmup", 0), ("workers", 0), ("checkpoint_every", 1)):
            if getattr(self, field) < smallest:
                raise ValueError(f"{field} is {getattr(self, field)}, allowed is a whole number >= {smallest}")
        for field in ("learning_rate", "clip"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}, allowed is a number > 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, allowed is a number >= 0")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup}, allowed is less than steps = {self.steps}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, allowed is 0..2^31-1")
