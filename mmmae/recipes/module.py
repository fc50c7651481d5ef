"""The model in training: losses of a step, optimiser, schedule, and what stops a run that has gone wrong."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from ..data import Batch
from ..fast import FastModel
from ..inputs import Output, is_distributed
from .diagnosis import largest_activation
from .distributed import compile_blocks, of_all_processes, shard
from .reports import measure_contrast, measure_features
from .settings import PretrainSettings

VALIDATION_SEED = 2**63 - 1  # no step of a run has it: held-out subjects have the same masks each time


class Pretraining(lightning.LightningModule):
    """A masked autoencoder, its optimiser and its schedule.

    Args:
        model: to train.
        settings: of the run.
        run: what goes into checkpoints, of `describe`.
    """

    def __init__(self, model: FastModel, settings: PretrainSettings, run: dict[str, Any]) -> None:
        super().__init__()
        self.run = run
        self.model, self.settings = model, settings
        self.configured = False
        self.names: list[str] = []  # of the subjects of this step so far

    def configure_model(self) -> None:
        """Compile the model, and share it among processes, where the settings say so; Lightning may call it twice."""
        if self.configured:
            return
        self.configured = True
        if self.settings.compile:
            compile_blocks(self.model)
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one forward pass, under a mask that (seed, pass, sample) alone decide."""
        accumulate = self.settings.accumulate
        seed = self.settings.seed * 2**32 + self.global_step * accumulate + batch_idx % accumulate
        self.names = batch.names if batch_idx % accumulate == 0 else self.names + batch.names
        output = self.model(batch.hsi, batch.aux, batch.present, batch.valid, seed=seed)
        figures = self._means(output)
        if not math.isfinite(figures["loss"]):
            self._stop(f"the loss is {figures['loss']}", batch, seed)
        self.log_dict(figures)
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        if self.global_step % self.settings.report_every == 0 and batch_idx % accumulate == 0:
            self._report(measure_features(output.latent) | measure_contrast(self.model, batch, output.latent))
        return output.loss  # type: ignore[no-any-return]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The losses of held-out subjects, under the masks of every validation."""
        output = self.model(batch.hsi, batch.aux, batch.present, batch.valid, seed=VALIDATION_SEED - batch_idx)
        for name, value in self._means(output).items():
            self.log(f"validation_{name}", value, on_epoch=True, batch_size=len(batch), sync_dist=True)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm over all parameters; stop before a step that would break the weights."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.log("gradient_norm", norm)
        if self.settings.precision != "16" and not torch.isfinite(norm):  # the loss scaler skips such a step
            raise ValueError(
                f"the norm of the gradient is {norm.item()} in step {self.global_step + 1}, of "
                f"{self._subjects()}, though the loss is finite; the weights and the last checkpoint "
                "are from before"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the run was made with."""
        checkpoint["run"] = self.run

    def configure_optimizers(self) -> Any:
        """AdamW with betas (0.9, 0.95) as in MAE, linear warm-up and cosine."""
        settings = self.settings
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for name, p in named if _decays(name, p)], "weight_decay": settings.weight_decay},
            {"params": [p for name, p in named if not _decays(name, p)], "weight_decay": 0.0},
        ]
        # The fused one unscales gradients on its own, behind the clipping.
        fused = settings.precision != "16"
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _report(self, figures: dict[str, float]) -> None:
        """Write figures of this step alone: what Lightning logs would be repeated in each step behind it."""
        for logger in self.loggers:
            logger.log_metrics(figures, self.global_step)

    def _means(self, output: Output) -> dict[str, float]:
        """The losses, as means over the processes: what one process with the joined batch would have."""
        names = ("loss", "loss_reconstruction", "loss_contrastive")
        losses = torch.stack([getattr(output, name).detach().to(torch.float32) for name in names])
        if is_distributed():
            distributed.all_reduce(losses)
            losses /= distributed.get_world_size()
        return dict(zip(names, losses.tolist(), strict=True))

    def _stop(self, what: str, batch: Batch, seed: int) -> None:
        """Raise ValueError with all that helps to find the reason; every process comes here in the same step."""
        subjects = self._subjects()
        where = largest_activation(self.model, batch, seed)
        raise ValueError(
            f"{what} in step {self.global_step + 1}, of {subjects}; {where}; "
            "a lower learning rate may help, and the last checkpoint is from before"
        )

    def _subjects(self) -> str:
        """The subjects of this step on all processes, with the files they are read from where the data set tells."""
        names = [name for of_rank in of_all_processes(self.names) for name in of_rank]
        subjects = self.trainer.datamodule.subjects  # type: ignore[attr-defined]
        if not hasattr(subjects, "files"):
            return ", ".join(names)
        files = [subjects.files(subjects.names.index(name)).values() for name in names]
        return ", ".join(f"{name} ({', '.join(map(str, paths))})" for name, paths in zip(names, files, strict=True))


def learning_rate_factor(step: int, settings: PretrainSettings) -> float:
    """Share of the peak learning rate at a step: linear up to the end of the warm-up, then half a cosine down to 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    share = (step - settings.warmup) / (settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * share))


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and "pos_embed" not in name and name != "mask_token"
