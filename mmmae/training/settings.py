"""The settings of a pretraining run: each field with its default and meaning, from which the options are made."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias, get_args

from ..checks import check_choice, check_number, check_whole
from ..model.fast import COMPILE_MODES, CompileMode
from ..precision import Precision
from .graph import CUDA_GRAPH_CHOICES, CUDAGraph

# Settings and config fields that may change when a run is resumed: they change its losses by rounding alone. So may the
# number of processes and the batch of each, if their product stays the same; and the steps between checkpoints, if no
# validation comes with them.
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
    "residual_stream",
)
Strategy: TypeAlias = Literal["ddp", "fsdp"]
MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # record CUDA graphs of their own


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """The settings of a pretraining run.

    Args:
        steps: optimiser steps
        batch: samples in a forward pass of one process
        accumulate: forward passes whose mean gradient makes one step; each contrasts only its own samples (of all
            processes): accumulation saves memory, it does not add negatives
        learning_rate: peak learning rate, after the warm-up
        warmup: steps of linear warm-up, before the cosine schedule to 0; None: a tenth of the steps
        weight_decay: AdamW's weight decay of matrices and kernels; biases, norms, position embeddings and the mask
            token have none
        clip: largest norm of the gradient
        ema: decay per step of the moving average of the weights, which is then what is validated and saved in the end;
            0: no average
        precision: 32 bits, or autocast to bf16 or 16 bits, the latter with a loss scaler; auto: bf16 on GPUs that have
            matrix units for it (compute capability 8.0 and above) and on CPUs where a short measurement shows that it
            is faster, else 32, and when resuming that of the run
        crop: smallest share of an image's area that a random crop keeps; 1: no crops
        flip: mirror and transpose subjects at random, all images of a subject alike
        validation: subjects held out to measure the loss on with each checkpoint
        patience: validations without a lower loss after which the run ends; 0: never
        seed: seed of weights, orders, masks, crops and flips, below 2^31
        workers: processes that read data for each training process; 0: the training process reads
        checkpoint_every: steps between checkpoints
        log_every: steps between readings of the losses from a GPU, each of which waits for it; the losses of all steps
            are written. On the CPU every step is read at once
        report_every: steps between measurements of the features and of the contrastive loss
        pictures_every: steps between pictures of the prediction; 0: one at the end
        device: auto, cpu, cuda, or another accelerator that Lightning knows
        strategy: with several processes, ddp keeps the whole model in each; fsdp (FSDP2) a share of its weights,
            gradients and optimiser states
        compile: compile the transformer blocks with torch.compile, in its default mode or the mode given
        cuda_graph: record a whole step as one CUDA graph and replay it: auto where possible, on to fail where it is
            not, off never; needs one process on a GPU and no loss scaler

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is expected.
    """

    steps: int = 120
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-4
    warmup: int | None = None
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.0
    precision: Precision = "auto"
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
    strategy: Strategy = "ddp"
    compile: bool | CompileMode = False
    cuda_graph: CUDAGraph = "auto"

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "accumulate", "checkpoint_every", "log_every", "report_every"):
            check_whole(field, getattr(self, field), 1)
        for field in ("workers", "validation", "patience", "pictures_every"):
            check_whole(field, getattr(self, field), 0)
        for field in ("learning_rate", "clip"):
            check_number(field, getattr(self, field), "> 0")
        check_number("weight_decay", self.weight_decay, ">= 0")
        check_number("ema", self.ema, "in [0, 1)")
        check_number("crop", self.crop, "in (0, 1]")
        if self.warmup is not None and not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup is {self.warmup}, expected a whole number >= 0, less than steps = {self.steps}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, expected 0..2^31-1")
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("strategy", self.strategy, get_args(Strategy))
        check_choice("compile", self.compile, (False, True, *COMPILE_MODES))
        check_choice("cuda_graph", self.cuda_graph, CUDA_GRAPH_CHOICES)
        reason = self.graph_refused
        if self.cuda_graph == "on" and reason is not None:
            raise ValueError(f"cuda_graph is 'on', but {reason}; expected 'auto' or 'off'")
        if self.patience > 0 and self.validation == 0:
            raise ValueError(f"patience is {self.patience}, which needs held-out subjects: validation is 0")
        if self.strategy == "fsdp" and self.ema > 0:
            raise ValueError(f"ema is {self.ema}, which averages whole weights: strategy is 'fsdp', expected 'ddp'")
        if self.strategy == "fsdp" and self.precision == "16":
            raise ValueError(
                "precision is '16', whose loss scaler needs whole gradients: with 'fsdp' it must be 'bf16'"
            )

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up, counted."""
        return self.steps // 10 if self.warmup is None else self.warmup

    @property
    def compile_mode(self) -> str | None:
        """The mode of `torch.compile`, or None where nothing is compiled."""
        return ("default" if self.compile else None) if isinstance(self.compile, bool) else self.compile

    @property
    def graph_refused(self) -> str | None:
        """The reason in these settings why steps can't be recorded as CUDA graphs, or None."""
        if self.precision == "16":
            return "precision is '16', whose loss scaler looks at every step"
        if self.compile_mode in MODES_WITH_GRAPHS:
            return f"compile is {self.compile!r}, which records CUDA graphs of its own"
        return None
