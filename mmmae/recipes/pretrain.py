"""Pretraining on Lightning: a masked autoencoder, subjects, and a folder that holds all of the run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from ..config import MMMAEConfig
from ..data import Batch
from ..fast import FastModel, fast_model
from ..pretrained import write_atomically
from .pictures import save_picture
from .progress import StepProgress
from .sampling import StepSampler, SubjectData, Subjects
from .settings import PretrainSettings


class Pretraining(lightning.LightningModule):
    """A masked autoencoder, its optimiser and its schedule."""

    def __init__(self, model: FastModel, settings: PretrainSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one step, under a mask that (seed, step, sample) alone decide."""
        seed = self.settings.seed * 2**32 + self.global_step
        output = self.model(batch.hsi, batch.aux, batch.present, batch.valid, seed=seed)
        self.log("loss", output.loss.detach())
        self.log("loss_reconstruction", output.loss_reconstruction.detach())
        self.log("loss_contrastive", output.loss_contrastive.detach())
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return output.loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        """AdamW with betas (0.9, 0.95) as in MAE, linear warm-up and cosine."""
        settings = self.settings
        groups = [
            {"params": parameters, "weight_decay": decay}
            for decay, parameters in (
                (settings.weight_decay, [p for n, p in self.model.named_parameters() if _decays(n, p)]),
                (0.0, [p for n, p in self.model.named_parameters() if not _decays(n, p)]),
            )
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_factor(step: int, settings: PretrainSettings) -> float:
    """Share of the peak learning rate at a step: linear up to the end of the warm-up, then half a cosine down to 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    share = (step - settings.warmup) / (settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * share))


def pretrain(
    config: MMMAEConfig,
    subjects: Subjects,
    out: str | Path,
    settings: PretrainSettings | None = None,
    *,
    resume: str | Path | None = None,
    rgb: tuple[int, int, int] | None = None,
) -> FastModel:
    """Pretrain a model and leave the run's folder.

    The folder then holds `config.json`, `normalization.json`, `checkpoints/`, `logs/` (CSV, and TensorBoard where it is
    installed), `encoder/` for `mmmae.HSIEncoder.from_pretrained`, and `reconstruction.png`.

    Args:
        config: of the model; its bands and modalities are those of the subjects.
        subjects: a `PairedFolder`, `Phantom` or the like.
        out: the run's folder.
        settings: None means the defaults.
        resume: a checkpoint to go on from, or `auto` for the last one in `out` if there is one.
        rgb: bands that the picture shows as red, green and blue; None spreads three over the spectrum.

    Raises:
        ValueError: subjects and config do not fit, the folder holds another run, or a checkpoint is broken.
    """
    settings = settings or PretrainSettings()
    out = Path(out)
    _check_subjects(config, subjects, rgb)
    StepSampler(len(subjects), settings.batch, settings.steps, settings.seed)  # raises if a batch can't be filled
    path = _find_checkpoint(out, resume)
    normalization = subjects.normalization  # computed before workers start, and before the folder is made
    torch.manual_seed(settings.seed)
    model = fast_model(config)
    if path is not None:
        _check_checkpoint(path, model)  # before any work
    out.mkdir(parents=True, exist_ok=True)
    described = {"model": config.to_dict(), "settings": dataclasses.asdict(settings), "subjects": repr(subjects)}
    write_atomically(out / "config.json", lambda path: path.write_text(json.dumps(described, indent=2) + "\n"))
    normalization.save(out / "normalization.json")

    trainer = _trainer(out, settings)
    data = SubjectData(
        subjects, batch=settings.batch, steps=settings.steps, seed=settings.seed, workers=settings.workers
    )
    with warnings.catch_warnings():
        # Lightning advises more workers, whatever the machine; whoever wants them says --workers.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        # The data module, not the loader, holds the position in the data.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        trainer.fit(Pretraining(model, settings), datamodule=data, ckpt_path=path, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        model.hsi_encoder().save_pretrained(out / "encoder")
        save_picture(out / "reconstruction.png", model.eval(), subjects, seed=settings.seed, rgb=rgb)
    return model


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or not there, and that are never unpickled into objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside, then rename."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain values, and nothing else, onto the CPU."""
        return _read_checkpoint(Path(path))


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises what its unpickler or zip reader happens to raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no whole checkpoint: {reason}") from error
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")
    if not isinstance(checkpoint, dict) or any(part not in checkpoint for part in parts):
        raise ValueError(f"{path}: no checkpoint of a pretraining run, which has {', '.join(parts)}")
    return checkpoint


def _check_subjects(config: MMMAEConfig, subjects: Subjects, rgb: tuple[int, int, int] | None) -> None:
    if subjects.bands != config.bands:
        raise ValueError(f"the subjects have {subjects.bands} bands, the config has bands = {config.bands}")
    if dict(subjects.modalities) != dict(config.aux):
        raise ValueError(f"the subjects have the modalities {dict(subjects.modalities)}, the config {dict(config.aux)}")
    if rgb is not None and not all(0 <= band < config.bands for band in rgb):
        raise ValueError(f"rgb is {rgb}, allowed are bands 0..{config.bands - 1}")


def _find_checkpoint(out: Path, resume: str | Path | None) -> Path | None:
    last = out / "checkpoints" / "last.ckpt"
    if resume is None:
        if last.exists():
            raise ValueError(f"{out} holds a run already: resume it (--resume auto), or name another folder (--out)")
        return None
    if resume == "auto":
        if not last.exists():
            return None
        resume = last
    return Path(resume)


def _check_checkpoint(path: Path, model: FastModel) -> None:
    saved = {name.removeprefix("model."): weight.shape for name, weight in _read_checkpoint(path)["state_dict"].items()}
    wanted = {name: weight.shape for name, weight in model.state_dict().items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            shapes = [list(shapes[name]) if name in shapes else "missing" for shapes in (saved, wanted)]
            raise ValueError(f"{path} is of another model: {name} is {shapes[0]} in it, {shapes[1]} in the config")


def _trainer(out: Path, settings: PretrainSettings) -> lightning.Trainer:
    loggers: list[Logger] = [CSVLogger(out, name="logs", flush_logs_every_n_steps=10)]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(out, name="logs", version=loggers[0].version))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return lightning.Trainer(
        accelerator=settings.device,
        max_steps=settings.steps,
        max_epochs=1,  # one pass of the loader is the whole run
        gradient_clip_val=settings.clip,
        logger=loggers,
        callbacks=[
            ModelCheckpoint(
                out / "checkpoints",
                filename="last",
                every_n_train_steps=settings.checkpoint_every,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            ),
            StepProgress(),
        ],
        plugins=[WholeCheckpoints()],
        use_distributed_sampler=False,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and "pos_embed" not in name and name != "mask_token"
