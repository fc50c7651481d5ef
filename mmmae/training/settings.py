"""How a pretraining run goes."""

from __future__ import annotations

import dataclasses
import math

from ..model.fast import COMPILE_MODES
from .graph import CUDA_GRAPH_CHOICES

# What may change when a run goes on, of its settings and its config: it does not change the run's losses, apart from
# rounding. So may the number of processes and the batch of each, as long as their product stays; and the steps between
# checkpoints, as long as no validation comes with them.
FREE_SETTINGS = (
    "batch",
    "workers",
    "checkpoint_every",
    "report_every",
    "pictures_every",
    "device",
    "log_every",
    "strategy",
    "compile",
    "cuda_graph",
    "activation_checkpointing",
)
PRECISIONS, STRATEGIES = ("32", "bf16", "16"), ("ddp", "fsdp")
MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # record CUDA graphs of their own


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """How a run goes.

    Args:
        steps: optimiser steps.
        batch: samples a forward pass of one process takes.
        accumulate: forward passes whose mean gradient makes one step. Each contrasts its own samples (of all
            processes) alone: accumulation saves memory, it does not add negatives.
        learning_rate: the peak, after the warm-up.
        warmup: steps of linear warm-up; the cosine to 0 follows.
        weight_decay: of matrices and kernels; biases, norms, positions and the mask token have none.
        clip: largest norm of the gradient.
        ema: decay a step of the exponential moving average of the weights, which is what is validated and saved in the
            end; 0 keeps none.
        precision: `32`, or `bf16` and `16` for autocast, the latter with a loss scaler.
        crop: smallest share of an image's area that a random crop keeps; 1 does not crop.
        flip: mirror and transpose subjects at random, all images of one alike.
        validation: subjects held out, on which the loss is measured whenever a checkpoint is written.
        patience: validations without a lower loss after which the run ends; 0 never ends it.
        seed: of weights, orders, masks, crops and flips, below 2^31.
        workers: processes that read data, of each training process; 0 reads in the training process.
        checkpoint_every: steps between checkpoints.
        log_every: steps between readings of the losses. On a GPU each reading is a wait, and the losses of all steps
            since the last are written then; on the CPU, where it is none, every step is read at once.
        report_every: steps between measurements of the features and of the contrast.
        pictures_every: steps between pictures of what is predicted; 0 draws one at the end alone.
        device: `auto`, `cpu`, `cuda` and what else Lightning knows.
        strategy: of several processes: `ddp` keeps the whole model in each, `fsdp` (FSDP2) a share of its weights,
            gradients and optimiser states.
        compile: hand the transformer blocks to `torch.compile`, True for its default mode or the name of another:
            `reduce-overhead`, `max-autotune`, `max-autotune-no-cudagraphs`.
        cuda_graph: record a whole step as one CUDA graph and replay it: `auto` where that is possible, `on` to raise
            where it is not, `off` never. It needs one process on a GPU, and no loss scaler.

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is allowed.
    """

    steps: int = 120
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-4
    warmup: int = 12
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "32"
    crop: float = 1.0
    flip: bool = False
    validation: int = 0
    patience: int = 0
    seed: int = 0
    workers: int = 0
    checkpoint_every: int = 50
    log_every: int = 50
    report_every: int = 50
    pictures_every: int = 0
    device: str = "auto"
    strategy: str = "ddp"
    compile: bool | str = False
    cuda_graph: str = "auto"

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "accumulate", "checkpoint_every", "log_every", "report_every")
        for field in (*positive, "warmup", "workers", "validation", "patience", "pictures_every"):
            smallest = 1 if field in positive else 0
            if getattr(self, field) < smallest:
                raise ValueError(f"{field} is {getattr(self, field)}, expected a whole number >= {smallest}")
        for field in ("learning_rate", "clip"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}, expected a number > 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, expected a number >= 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}, expected a number in [0, 1)")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}, expected a number in (0, 1]")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup}, expected less than steps = {self.steps}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, expected 0..2^31-1")
        for field, allowed in (
            ("precision", PRECISIONS),
            ("strategy", STRATEGIES),
            ("compile", (False, True, *COMPILE_MODES)),
            ("cuda_graph", CUDA_GRAPH_CHOICES),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}, must be one of {', '.join(map(str, allowed))}")
        reason = self.graph_refused
        if self.cuda_graph == "on" and reason is not None:
            raise ValueError(f"cuda_graph is 'on', but {reason}; expected 'auto' or 'off'")
        if self.patience > 0 and self.validation == 0:
            raise ValueError(f"patience is {self.patience}, which needs held-out subjects: validation is 0")
        if self.strategy == "fsdp" and self.ema > 0:
            raise ValueError(f"ema is {self.ema}, which is kept of whole weights: strategy is 'fsdp', expected 'ddp'")
        if self.strategy == "fsdp" and self.precision == "16":
            raise ValueError(
                "precision is '16', whose loss scaler looks at whole gradients: with 'fsdp' it must be 'bf16'"
            )

    @property
    def compile_mode(self) -> str | None:
        """Return the mode of `torch.compile`, or None where nothing is compiled."""
        return ("default" if self.compile else None) if isinstance(self.compile, bool) else self.compile

    @property
    def graph_refused(self) -> str | None:
        """Return the reason in these settings why steps can't be recorded as CUDA graphs, or None."""
        if self.precision == "16":
            return "precision is '16', whose loss scaler looks at every step"
        if self.compile_mode in MODES_WITH_GRAPHS:
            return f"compile is {self.compile!r}, which records CUDA graphs of its own"
        return None
