"""Reports of a run besides its losses: features, contrastive accuracy, speed and pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from ..config import MMMAEConfig
from ..cost import profile
from ..data import Batch
from ..data.subjects import Subjects
from ..model.fast import FastModel
from .pictures import draw, save_figure

FEATURE_TOKENS = 1024  # measured of a batch, at most
PRODUCT_SIZES, PRODUCT_ROUNDS, PRODUCT_SECONDS = (256, 1024, 4096), 5, 0.25


@torch.no_grad()
def measure_features(latent: Tensor) -> dict[str, float]:
    """Measure how much the features of a batch differ; both figures fall if the encoder collapses.

    Args:
        latent: `[B, K, D]`.

    Returns:
        `feature_rank`: the effective rank of the centred tokens, exp of the entropy of their normalised singular
        values (Roy and Vetterli, 2007), between 1 and D.
        `feature_std`: the standard deviation over samples of their mean token, mean over channels.
    """
    tokens = latent.flatten(0, 1).float()
    tokens = tokens[:: max(1, len(tokens) // FEATURE_TOKENS)]
    singular = torch.linalg.svdvals(tokens - tokens.mean(0))
    shares = singular / singular.sum().clamp(min=torch.finfo(torch.float32).tiny)
    rank = torch.special.entr(shares).sum().exp().item()
    return {"feature_rank": rank, "feature_std": latent.float().mean(1).std(0, correction=0).mean().item()}


@torch.no_grad()
def measure_contrast(model: FastModel, batch: Batch, latent: Tensor) -> dict[str, float]:
    """Measure the contrastive loss of each modality that at least two samples of this process's batch have.

    Returns:
        `contrastive_NAME`, the loss, and `contrastive_accuracy_NAME`, the share of samples whose own image is the
        nearest; chance is one over the number of samples.
    """
    figures: dict[str, float] = {}
    if not batch.aux:
        return figures
    queries = F.normalize(model.contrastive_head(latent.mean(dim=1)).float(), dim=-1)
    for name, image in batch.aux.items():
        has = batch.present[name]
        if int(has.sum()) < 2:
            continue
        with model.backend():
            keys = F.normalize(model.aux_encoders[name](image, has).float(), dim=-1)
        with torch.autocast(latent.device.type, enabled=False):
            logits = queries[has] @ keys[has].T / model.config.temperature
        own = torch.arange(len(logits), device=logits.device)
        figures[f"contrastive_{name}"] = F.cross_entropy(logits, own).item()
        figures[f"contrastive_accuracy_{name}"] = (logits.argmax(1) == own).float().mean().item()
    return figures


class Throughput:
    """Measures samples a second of all processes, including reading of data, and the share of the device's speed used.

    `share_of_products` is the model's multiply-adds a second, three times those of its forward pass a sample, over
    those of a large matrix product, measured at the start in the run's precision. Recomputation by activation
    checkpointing does not count, as in the "model FLOPs utilisation" of Chowdhery et al. (2022).

    Args:
        config: the model's config.
        precision: `32`, `bf16` or `16`.
        ranks: number of processes.
    """

    def __init__(self, config: MMMAEConfig, precision: str, ranks: int) -> None:
        self.macs = 3 * profile(config).pretraining.total.macs
        self.dtype = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[precision]
        self.ranks, self.samples = ranks, 0
        self.limit = self.last = 0.0

    def start(self, device: torch.device) -> None:
        """Measure the speed of a matrix product, and start the clock."""
        self.limit = product_speed(device, self.dtype)
        self.last = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return the figures since the last call; call it only when the device has finished its work."""
        now = time.perf_counter()
        speed = self.samples / (now - self.last)
        self.last, self.samples = now, 0
        return {"samples_per_second": speed * self.ranks, "share_of_products": speed * self.macs / self.limit}


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best multiply-adds a second of square matrix products, measured in about a quarter of a second.

    Where they are slow, as with half precision on some CPUs or on one thread, large products are left out.
    """
    tile = torch.randn(PRODUCT_SIZES[0], PRODUCT_SIZES[0], device=device).to(dtype)
    tile @ tile  # loads libraries
    best, start = 0.0, time.perf_counter()
    for size in PRODUCT_SIZES:
        factor = tile.repeat(size // len(tile), size // len(tile))
        for _ in range(PRODUCT_ROUNDS):
            begin = time.perf_counter()
            if best and begin - start + size**3 / best > PRODUCT_SECONDS:
                return best
            factor @ factor
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, size**3 / (time.perf_counter() - begin))
    return best


class Pictures(Callback):
    """Draws the prediction for the first subject every few steps, into files and TensorBoard."""

    def __init__(
        self, subjects: Subjects, folder: Path, every: int, seed: int, rgb: tuple[int, int, int] | None
    ) -> None:
        self.subjects, self.folder, self.every, self.seed, self.rgb = subjects, folder, every, seed, rgb

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw after every `every`-th step; all processes take part in the forward pass."""
        step = trainer.global_step
        if step % self.every or step == self.last_step:
            return
        self.last_step = step
        model = pl_module.model
        assert isinstance(model, FastModel)
        model.eval()
        figure = draw(model, self.subjects, seed=self.seed, rgb=self.rgb)
        model.train()
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(exist_ok=True)
        save_figure(figure, self.folder / f"step-{step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("reconstruction", figure, step)

    last_step = 0
