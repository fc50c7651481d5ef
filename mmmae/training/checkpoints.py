"""Checkpoints of a run: whole or not there, never unpickled into objects, and which one a run goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from ..config import MMMAEConfig
from ..files import write_atomically
from .settings import FREE_SETTINGS, PretrainSettings

LAST = Path("checkpoints") / "last.ckpt"  # in a run's folder
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "run")


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or not there, and that are never unpickled into objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside, then rename."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain values, and nothing else, onto the CPU."""
        return read_checkpoint(Path(path), mmap=False)


class LastCheckpoint(ModelCheckpoint):
    """Lightning's, which after a resume would write in the midst of the first step again, where a step is of several
    forward passes, and the next resume would begin there."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the step that the run goes on from for saved."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step


def find_checkpoint(out: Path, resume: str | Path | None) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        ValueError: `out` holds a run that is not the one to go on with.
        FileNotFoundError: there is no such checkpoint.
    """
    last = out / LAST
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
    if not isinstance(checkpoint, dict) or any(part not in checkpoint for part in PARTS):
        raise ValueError(f"{path}: no checkpoint of a pretraining run, which has {', '.join(PARTS)}")
    return checkpoint


def resumed_settings(path: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint is of."""
    return dict(read_checkpoint(path)["run"]["settings"])


def describe(config: MMMAEConfig, settings: PretrainSettings, ranks: int, subjects: Sequence[str]) -> dict[str, Any]:
    """What a run is made with, as plain JSON types; of the names of its subjects a checksum."""
    checksum = hashlib.sha256("\n".join(subjects).encode()).hexdigest()
    return {
        "model": config.to_dict(),
        "settings": dataclasses.asdict(settings),
        "ranks": ranks,
        "names": checksum,
        "finished": False,
    }


def check_resumed(path: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError unless the run that `wanted` describes goes on as the run of this checkpoint would have."""
    saved = read_checkpoint(path)["run"]
    # With fields that came after the run.
    fields = {
        "model": MMMAEConfig.from_dict(saved["model"]).to_dict(),
        "settings": dataclasses.asdict(PretrainSettings(**saved["settings"])),
    }
    # A validation comes with each checkpoint, and may end the run.
    free = set(FREE_SETTINGS) - ({"checkpoint_every"} if wanted["settings"]["validation"] else set())
    for part, values in fields.items():
        for field, value in values.items():
            if wanted[part][field] != value and field not in free:
                raise ValueError(f"{field} is {wanted[part][field]!r}, but the run of {path} has {value!r}")
    batch, ranks = wanted["settings"]["batch"], wanted["ranks"]
    samples = fields["settings"]["batch"] * saved.get("ranks", 1)
    if batch * ranks != samples:
        given = f"{batch} on each of {ranks} processes" if ranks > 1 else str(batch)
        raise ValueError(f"batch is {given}, but the run of {path} has {samples} in all")
    if saved.get("names", wanted["names"]) != wanted["names"]:
        raise ValueError(f"the subjects are not those of the run of {path}: files came, went, or have other names")


def is_finished(path: Path, settings: PretrainSettings) -> bool:
    """Whether the run of this checkpoint has made all of its steps, or ended before because it got no better."""
    checkpoint = read_checkpoint(path)
    return bool(checkpoint["run"].get("finished")) or checkpoint["global_step"] >= settings.steps


def model_weights(path: Path) -> dict[str, Tensor]:
    """The weights that a run has at this checkpoint; their average where it keeps one."""
    weights: dict[str, Tensor] = read_checkpoint(path, mmap=False)["state_dict"]
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def remove_partial(out: Path) -> None:
    """Remove what processes that were killed while they wrote left behind."""
    for path in out.rglob(".*.partial"):
        path.unlink(missing_ok=True)
