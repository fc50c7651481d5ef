"""Pretraining on Lightning: a masked autoencoder, subjects, and a folder that holds all of the run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import warnings
import zipfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from ..config import MMMAEConfig
from ..data import Batch, Normalization
from ..fast import FastModel, fast_model
from ..pretrained import check_can_write, write_atomically
from ..tuning import tune_cpu
from .pictures import draw, save_figure
from .progress import StepProgress
from .sampling import StepSampler, SubjectData, Subjects
from .settings import FREE_SETTINGS, PretrainSettings


class Pretraining(lightning.LightningModule):
    """A masked autoencoder, its optimiser and its schedule."""

    def __init__(self, model: FastModel, settings: PretrainSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one step, under a mask that (seed, step, sample) alone decide."""
        seed = self.settings.seed * 2**32 + self.global_step
        output = self.model(batch.hsi, batch.aux, batch.present, batch.valid, seed=seed)
        if not torch.isfinite(output.loss):
            raise ValueError(
                f"the loss is {output.loss.item()} in step {self.global_step + 1}, of {', '.join(batch.names)}; "
                "a lower learning rate may help, and the last checkpoint is from before"
            )
        self.log("loss", output.loss.detach())
        self.log("loss_reconstruction", output.loss_reconstruction.detach())
        self.log("loss_contrastive", output.loss_contrastive.detach())
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return output.loss  # type: ignore[no-any-return]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the run was made with."""
        checkpoint["run"] = _describe(self.model.config, self.settings)

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

    The folder then holds `config.json`, `normalization.json`, `checkpoints/last.ckpt`, `logs/` (CSV, and TensorBoard
    where it is installed), `encoder/` for `mmmae.HSIEncoder.from_pretrained`, and `reconstruction.png`. The process
    keeps the memory that it frees from here on, see `mmmae.tune_cpu`.

    Args:
        config: of the model; its bands and modalities are those of the subjects.
        subjects: a `PairedFolder`, `Phantom` or the like.
        out: the run's folder.
        settings: None means the defaults.
        resume: a checkpoint to go on from, or `auto` for the one in `out` if there is one. The run then has the losses
            of one that was never stopped, which is why config, settings and statistics must be those of its beginning.
        rgb: bands that the picture shows as red, green and blue; None spreads three over the spectrum.

    Raises:
        ValueError: subjects and config do not fit, the folder holds another run, a checkpoint is broken or of another
            run, or a loss is not finite.
        OSError: a file can't be read or written.
        KeyboardInterrupt: the run was interrupted; it can be resumed.
    """
    tune_cpu()
    settings = settings or PretrainSettings()
    out = Path(out)
    _check_subjects(config, subjects, rgb)
    StepSampler(len(subjects), settings.batch, settings.steps, settings.seed)  # raises if a batch can't be filled
    check_can_write(out)
    checkpoint = find_checkpoint(out, resume)
    if checkpoint is not None:
        _check_resumed(checkpoint, config, settings)
    normalization = subjects.normalization  # computed before workers start, and before the folder is made
    _check_normalization(out, normalization, resumed=checkpoint is not None)
    trainer = _trainer(out, settings)
    torch.manual_seed(settings.seed)
    model = fast_model(config)
    out.mkdir(parents=True, exist_ok=True)
    described = {**_describe(config, settings), "subjects": repr(subjects)}
    write_atomically(out / "config.json", lambda path: path.write_text(json.dumps(described, indent=2) + "\n"))
    normalization.save(out / "normalization.json")

    data = SubjectData(
        subjects, batch=settings.batch, steps=settings.steps, seed=settings.seed, workers=settings.workers
    )
    with warnings.catch_warnings():
        # Lightning advises more workers, whatever the machine; whoever wants them says --workers.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        # The data module, not the loader, holds the position in the data; the other three tell of a resume.
        for message in ("your dataloader is not resumable", "exists and is not empty", "dirpath", "ckpt_path"):
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        try:
            trainer.fit(Pretraining(model, settings), datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
    trainer.save_checkpoint(out / "checkpoints" / "last.ckpt")
    if trainer.is_global_zero:
        model.hsi_encoder().save_pretrained(out / "encoder")
    # All ranks: a forward pass of several waits for each of them.
    figure = draw(model.eval(), subjects, seed=settings.seed, rgb=rgb)
    if trainer.is_global_zero:
        save_figure(figure, out / "reconstruction.png")
    return model


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or not there, and that are never unpickled into objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside, then rename."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain values, and nothing else, onto the CPU."""
        return read_checkpoint(Path(path), mmap=False)


def find_checkpoint(out: Path, resume: str | Path | None) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        ValueError: `out` holds a run that is not the one to go on with.
        FileNotFoundError: there is no such checkpoint.
    """
    last = out / "checkpoints" / "last.ckpt"
    if resume == "auto":
        return last if last.exists() else None
    if resume is not None and not Path(resume).is_file():
        raise FileNotFoundError(f"{resume}: no such checkpoint")
    if (out / "config.json").exists() and (resume is None or Path(resume).resolve() != last.resolve()):
        raise ValueError(f"{out} holds a run already: resume it (--resume auto), or name another folder (--out)")
    return None if resume is None else Path(resume)


def read_checkpoint(path: Path, *, mmap: bool = True) -> dict[str, Any]:
    """The tensors and plain values of a checkpoint, on the CPU.

    Args:
        path: of the file.
        mmap: leave tensors in the file until they are looked at; the file must then stay as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, holds anything else, or is not of a pretraining run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: no whole checkpoint: it is no zip archive, or its end is missing")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises what its unpickler or zip reader happens to raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no whole checkpoint: {reason}") from error
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "run")
    if not isinstance(checkpoint, dict) or any(part not in checkpoint for part in parts):
        raise ValueError(f"{path}: no checkpoint of a pretraining run, which has {', '.join(parts)}")
    return checkpoint


def resumed_settings(path: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint is of."""
    return dict(read_checkpoint(path)["run"]["settings"])


def _describe(config: MMMAEConfig, settings: PretrainSettings) -> dict[str, dict[str, Any]]:
    return {"model": config.to_dict(), "settings": dataclasses.asdict(settings)}


def _check_resumed(path: Path, config: MMMAEConfig, settings: PretrainSettings) -> None:
    checkpoint = read_checkpoint(path)
    run = checkpoint["run"]
    run = {**run, "model": MMMAEConfig.from_dict(run["model"]).to_dict()}  # with fields that came after the run
    for part, wanted in _describe(config, settings).items():
        for field, value in wanted.items():
            saved = run[part].get(field)
            if saved != value and field not in FREE_SETTINGS:
                raise ValueError(f"{field} is {value!r}, but the run of {path} has {saved!r}")
    if checkpoint["global_step"] >= settings.steps:
        raise ValueError(f"{path}: its run has made all of its {settings.steps} steps")


def _check_normalization(out: Path, normalization: Normalization, *, resumed: bool) -> None:
    path = out / "normalization.json"
    if resumed and path.exists() and Normalization.load(path) != normalization:
        raise ValueError(f"the statistics of the subjects are not those of the run; give --normalization {path}")


def _check_subjects(config: MMMAEConfig, subjects: Subjects, rgb: tuple[int, int, int] | None) -> None:
    if subjects.bands != config.bands:
        raise ValueError(f"the subjects have {subjects.bands} bands, the config has bands = {config.bands}")
    if dict(subjects.modalities) != dict(config.aux):
        raise ValueError(f"the subjects have the modalities {dict(subjects.modalities)}, the config {dict(config.aux)}")
    if rgb is not None and not all(0 <= band < config.bands for band in rgb):
        raise ValueError(f"rgb is {rgb}, allowed are bands 0..{config.bands - 1}")


def _trainer(out: Path, settings: PretrainSettings) -> lightning.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    loggers: list[Logger] = [CSVLogger(out, name="logs", flush_logs_every_n_steps=10)]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(out, name="logs", version=loggers[0].version))
    try:
        return _lightning_trainer(out, settings, loggers)
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(f"device is {settings.device!r}, which does not serve: {error}") from error


def _lightning_trainer(out: Path, settings: PretrainSettings, loggers: list[Logger]) -> lightning.Trainer:
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
