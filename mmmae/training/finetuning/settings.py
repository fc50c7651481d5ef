"""The settings of a fine-tuning run: each field with its default and meaning, from which the options are made."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias, get_args

from ...checks import check_choice, check_number, check_whole
from ...model.heads import check_sides
from ...model.spectra import SIDES
from ...precision import Precision

Mode: TypeAlias = Literal["full", "probe", "head"]
Keep: TypeAlias = Literal["best", "last"]
Loss: TypeAlias = Literal["cross-entropy", "focal", "dice"]


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """The settings of a fine-tuning run.

    Args:
        mode: full trains encoder and head; probe freezes the encoder and trains the head alone; head leaves the encoder
            out and classifies pixels by their bands, which an encoder has to beat
        head_width: channels of the head of a segmentation, a multiple of 16
        head_sides: sides of the squares around each pixel whose mean spectra that head reads, odd numbers of pixels; 1,
            the pixel's own spectrum alone, suits few labels
        epochs: passes over the training subjects
        batch: samples per step
        learning_rate: peak learning rate, that of the head; blocks of the encoder have less, see layer_decay
        layer_decay: factor of the learning rate from each block to the one before it, as in BEiT and MAE; 1: none
        warmup: share of the steps with linear warm-up, before the cosine schedule to 0
        weight_decay: AdamW's weight decay of matrices and kernels; biases, norms and position embeddings have none
        clip: largest norm of the gradient
        loss: cross-entropy; focal, in which pixels that are easy count little; or dice, which adds 1 less the Dice
            coefficient of the classes to the cross-entropy
        class_weights: weights of the classes in the loss: none, balanced (in inverse proportion to the frequency of a
            class among the training labels), or one number per class
        augment: flip and transpose subjects, and their labels, at random
        keep: best keeps the model of the epoch that scores best on the validation subjects; last that of the last
            epoch, and scores no other
        precision: 32 bits, or autocast to bf16 or 16 bits, the latter with a loss scaler; auto: bf16 on GPUs that have
            matrix units for it (compute capability 8.0 and above) and on CPUs where a short measurement shows that it
            is faster, else 32
        seed: seed of head, orders, augmentation and validation subjects, below 2^31
        workers: processes that read data; 0: the training process reads
        device: auto, cpu, cuda, or another accelerator that Lightning knows

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is expected.
    """

    mode: Mode = "full"
    head_width: int = 64
    head_sides: tuple[int, ...] = SIDES
    epochs: int = 20
    batch: int = 8
    learning_rate: float = 1e-3
    layer_decay: float = 0.75
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip: float = 1.0
    loss: Loss = "cross-entropy"
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"
    augment: bool = False
    keep: Keep = "best"
    precision: Precision = "auto"
    seed: int = 0
    workers: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("loss", self.loss, get_args(Loss))
        check_choice("keep", self.keep, get_args(Keep))
        check_choice("precision", self.precision, get_args(Precision))
        for field, least in (("head_width", 16), ("epochs", 1), ("batch", 1), ("workers", 0)):
            check_whole(field, getattr(self, field), least)
        if self.head_width % 16:
            raise ValueError(f"head_width is {self.head_width}, expected a multiple of 16")
        object.__setattr__(self, "head_sides", check_sides("head_sides", self.head_sides))
        for field in ("learning_rate", "clip"):
            check_number(field, getattr(self, field), "> 0")
        check_number("layer_decay", self.layer_decay, "in (0, 1]")
        check_number("warmup", self.warmup, "in [0, 1)")
        check_number("weight_decay", self.weight_decay, ">= 0")
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
