"""How a fine-tuning run goes."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """How a run goes.

    Args:
        mode: `full` trains encoder and head; `probe` freezes the encoder and trains the head alone.
        epochs: passes over the training subjects.
        batch: samples a step.
        learning_rate: the peak, of the head; the encoder's blocks have less of it, see `layer_decay`.
        layer_decay: factor from each block to the one before it, as in BEiT and MAE; 1 treats all alike.
        warmup: share of the steps in which the learning rate rises; half a cosine to 0 follows.
        weight_decay: of matrices and kernels; biases, norms and positions have none.
        clip: largest norm of the gradient.
        class_weights: of the loss: `none`, `balanced` (in inverse proportion to how frequent a class is among the
            training labels), or one number a class.
        augment: flip and transpose subjects, and their labels, at random.
        keep: `best` keeps the epoch that scores best on the validation subjects, `last` the last one, and scores no
            other.
        seed: of head, orders and augmentation, below 2^31.
        workers: processes that read data; 0 reads in the training process.
        device: `auto`, `cpu`, `cuda` and what else Lightning knows.

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is allowed.
    """

    mode: str = "full"
    epochs: int = 20
    batch: int = 8
    learning_rate: float = 1e-3
    layer_decay: float = 0.75
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip: float = 1.0
    class_weights: str | tuple[float, ...] = "none"
    augment: bool = False
    keep: str = "best"
    seed: int = 0
    workers: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for field, allowed in (("mode", ("full", "probe")), ("keep", ("best", "last"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}, must be one of {', '.join(allowed)}")
        for field, smallest in (("epochs", 1), ("batch", 1), ("workers", 0)):
            if getattr(self, field) < smallest:
                raise ValueError(f"{field} is {getattr(self, field)}, expected a whole number >= {smallest}")
        for field in ("learning_rate", "clip"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}, expected a number > 0")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}, expected a number in (0, 1]")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}, expected a share of the steps in [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, expected a number >= 0")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, expected 0..2^31-1")
        self._check_class_weights()

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        if isinstance(weights, str):
            known = weights in ("none", "balanced")
        else:
            object.__setattr__(self, "class_weights", tuple(float(weight) for weight in weights))
            known = len(weights) > 0 and all(0 <= weight < math.inf for weight in weights) and any(weights)
        if not known:
            raise ValueError(f"class_weights is {weights!r}, expected none, balanced or a number >= 0 for each class")
