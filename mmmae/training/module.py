"""The Lightning module of pretraining: steps and their figures, optimiser, schedule, and the stop at NaN."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from ..data import Batch
from ..model.fast import FastModel
from ..model.inputs import Output, is_distributed
from .diagnosis import largest_activation
from .distributed import compile_blocks, gather_objects, shard
from .figures import Figures, StepFigures
from .reports import Throughput, measure_contrast, measure_features
from .settings import PretrainSettings
from .step import TrainingStep, clip_divisor

VALIDATION_SEED = 2**63 - 1  # used by no training step; held-out subjects have the same masks each time


class Pretraining(lightning.LightningModule):
    """A masked autoencoder, its optimiser and its schedule.

    A single process without a loss scaler trains by `mmmae.TrainingStep`, and Lightning only counts steps. Several
    processes, or a loss scaler, train as Lightning does. Neither waits for the device before figures are read.

    Args:
        model: the model to train.
        settings: of the run.
        run: the description of the run by `describe`, written into checkpoints.
        throughput: measures the speed, if given.
    """

    def __init__(
        self, model: FastModel, settings: PretrainSettings, run: dict[str, Any], throughput: Throughput | None = None
    ) -> None:
        super().__init__()
        self.run = run
        self.model, self.settings, self.throughput = model, settings, throughput
        self.configured = self.begun = False
        self.step: TrainingStep | None = None
        self.figures: Figures | None = None
        self.begin = 0  # first step of this process
        self.names: list[list[str]] = []  # this process's subjects in each step that was not read yet
        self.rates: list[float] = []  # learning rates of these steps
        self.last: dict[str, float] = {}  # figures of the last step that was read

    def configure_model(self) -> None:
        """Compile and shard the model as the settings say; Lightning may call this twice."""
        if self.configured:
            return
        self.configured = True
        if self.settings.compile_mode is not None:
            compile_blocks(self.model, self.settings.compile_mode)
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        """Prepare the training step and the figures."""
        settings, self.begin = self.settings, self.global_step
        self.begun = True
        if trains_by_itself(settings, self.trainer.world_size):
            self.step = TrainingStep(
                self.model,
                self.optimizers(use_pl_optimizer=False),  # type: ignore[arg-type]
                clip=settings.clip,
                accumulate=settings.accumulate,
                autocast=torch.bfloat16 if settings.precision == "bf16" else None,
                seed=self._seed(self.begin * settings.accumulate),
                read_every=settings.log_every,
                cuda_graph="off" if settings.graph_refused is not None else settings.cuda_graph,
            )
            self.figures = self.step.figures
        else:
            self.figures = Figures(self.device, settings.log_every, settings.accumulate)
        if self.throughput is not None:
            self.throughput.start(self.device)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch to the device without waiting; `TrainingStep` copies its own batches."""
        if self.step is not None and self.trainer.training:
            return batch
        return batch.to(device, non_blocking=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Do a forward pass; its masks depend on (seed, pass, sample) only.

        Returns:
            The loss for Lightning to train on, or None if `TrainingStep` did the whole step.
        """
        accumulate = self.settings.accumulate
        number = batch_idx % accumulate
        if number == 0:
            self.names.append([])
            self.rates.append(self.optimizers(use_pl_optimizer=False).param_groups[0]["lr"])  # type: ignore[union-attr]
        self.names[-1] += batch.names
        if self.throughput is not None:
            self.throughput.samples += len(batch)
        reports = self.global_step % self.settings.report_every == 0 and number == 0
        if self.step is not None:
            complete = self.step(batch.hsi, batch.aux, batch.present, batch.valid)
            if reports:
                self._report(batch, self.step.latent)
            if complete:
                self._read_if_due()
            return None
        assert self.figures is not None
        seed = self._seed(self.global_step * accumulate + number)
        output = self.model(batch.hsi, batch.aux, batch.present, batch.valid, seed=seed)
        self.figures.add_pass(output, first=number == 0)
        if reports:
            self._report(batch, output.latent)
        return output.loss  # type: ignore[no-any-return]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step as Lightning does, or only call the closure, in which `TrainingStep` does the whole step."""
        if self.step is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        elif optimizer_closure is not None:
            optimizer_closure()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Reset gradients, unless `TrainingStep` does."""
        if self.step is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the losses of held-out subjects, under the same masks in every validation."""
        with self._autocast():
            output: Output = self.model(
                batch.hsi, batch.aux, batch.present, batch.valid, seed=VALIDATION_SEED - batch_idx
            )
        names = ("loss", "loss_reconstruction", "loss_contrastive")
        losses = torch.stack([getattr(output, name).to(torch.float32) for name in names])
        if is_distributed():
            distributed.all_reduce(losses)
            losses /= distributed.get_world_size()
        for name, value in zip(names, losses, strict=True):
            self.log(f"validation_{name}", value, on_epoch=True, batch_size=len(batch), sync_dist=True)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm over all parameters; let the optimizer skip a step that is not finite."""
        assert self.figures is not None
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        scaler = self.settings.precision == "16"  # skips steps by itself, and begins with too large a scale
        self.figures.close(norm, norm_counts=not scaler)
        if scaler:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        else:
            optimizer.grad_scale, optimizer.found_inf = clip_divisor(norm, self.settings.clip), self.figures.broken
        self.figures.count()
        self._read_if_due()

    def on_validation_start(self) -> None:
        """Write the figures of the steps before."""
        self._read()

    def on_train_end(self) -> None:
        """Write the figures of the last steps."""
        self._read()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description of the run; raise ValueError if a step before was not finite."""
        self._read()
        checkpoint["run"] = self.run

    def configure_optimizers(self) -> Any:
        """Return AdamW with betas (0.9, 0.95) as in MAE, and a linear warm-up followed by a cosine."""
        settings = self.settings
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for name, p in named if _decays(name, p)], "weight_decay": settings.weight_decay},
            {"params": [p for name, p in named if not _decays(name, p)], "weight_decay": 0.0},
        ]
        # The fused one would unscale gradients itself, after the clipping.
        fused = settings.precision != "16"
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, settings.warmup_steps, settings.steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _seed(self, number: int) -> int:
        """Return the seed of a forward pass; passes of a run are numbered from 0."""
        return self.settings.seed * 2**32 + number

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return autocast for forward passes outside of `TrainingStep`, if Lightning does not apply it."""
        if self.step is None or self.step.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.step.autocast)

    def _report(self, batch: Batch, latent: Tensor) -> None:
        """Write the feature and contrast figures of this step."""
        batch = batch.to(self.device, non_blocking=True)
        with self._autocast():
            figures = measure_features(latent) | measure_contrast(self.model, batch, latent)
        for logger in self.loggers:
            logger.log_metrics(figures, self.global_step)

    def _read_if_due(self) -> None:
        """Read figures after a complete step, which Lightning has not counted yet, if it is time to."""
        step = self.global_step + 1
        if not reading_waits(self.device) or step % self.settings.log_every == 0 or step == self.settings.steps:
            self._read()

    def _read(self) -> None:
        """Read and write the figures since the last call; raise ValueError at the first step that is not finite."""
        rows = [] if self.figures is None else self.figures.read()
        if not rows:
            return
        names, self.names = self.names[: len(rows)], self.names[len(rows) :]
        rates, self.rates = self.rates[: len(rows)], self.rates[len(rows) :]
        speed = {} if self.throughput is None else self.throughput.read()
        for row, subjects, rate in zip(rows, names, rates, strict=True):
            step = self.begin + row.step
            if not row.finite:
                self._stop(row, step, subjects)
            figures = row._asdict()
            del figures["step"], figures["finite"]
            self.last = {**figures, "learning_rate": rate, **speed}
            for logger in self.loggers:
                logger.log_metrics({**self.last, "epoch": self.current_epoch}, step)

    def _stop(self, row: StepFigures, step: int, names: list[str]) -> None:
        """Raise ValueError with subjects, files and layer; every process calls this in the same step."""
        subjects = self._subjects(names)
        if math.isfinite(row.loss):
            raise ValueError(
                f"the norm of the gradient is {row.gradient_norm} in step {step + 1}, of {subjects}, though the loss "
                "is finite; the weights and the last checkpoint are from before"
            )
        # No step since has changed a weight, so its forward passes can be repeated.
        accumulate = self.settings.accumulate
        found = []
        for number in range(step * accumulate, (step + 1) * accumulate):
            batch = self.trainer.datamodule.training_batch(number).to(self.device)  # type: ignore[attr-defined]
            with self._autocast():
                found.append(largest_activation(self.model, batch, self._seed(number)))
        where = next((sentence for sentence in found if "not finite" in sentence), found[0])
        raise ValueError(
            f"the loss is {row.loss} in step {step + 1}, of {subjects}; {where}; "
            "a lower learning rate may help, and the last checkpoint is from before"
        )

    def _subjects(self, names: list[str]) -> str:
        """Return the names of a step's subjects on all processes, with their source files if there are any."""
        names = [name for of_rank in gather_objects(names) for name in of_rank]
        subjects = self.trainer.datamodule.subjects  # type: ignore[attr-defined]
        files = [", ".join(map(str, subjects.files(subjects.names.index(name)).values())) for name in names]
        return ", ".join(f"{name} ({paths})" if paths else name for name, paths in zip(names, files, strict=True))


def trains_by_itself(settings: PretrainSettings, ranks: int) -> bool:
    """Return whether a run trains by `TrainingStep`: a single process without a loss scaler does."""
    return ranks == 1 and settings.precision != "16"


def reading_waits(device: torch.device) -> bool:
    """Return whether the host waits when it reads a number from the device."""
    return device.type != "cpu"


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Return the learning rate at a step over its peak: a linear warm-up, then half a cosine to 0 after `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * share))


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and "pos_embed" not in name and name != "mask_token"
