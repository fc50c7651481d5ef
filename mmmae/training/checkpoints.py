"""Checkpoints of a run: written whole or not at all, read without running code, and checked before a run is resumed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from mmmae_kernels.checks import described

from ..checks import check_whole
from ..config import MMMAEConfig
from ..files import write_atomically
from ..model.pretrained import check_weights
from .settings import FREE_SETTINGS, PretrainSettings

LAST, PREVIOUS = Path("checkpoints") / "last.ckpt", Path("checkpoints") / "previous.ckpt"  # in a run's folder
FileState: TypeAlias = tuple[int, int, int]  # inode, size, time of the last change
PARTS: Mapping[str, type] = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "global_step": int,
    "run": dict,
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a pretraining run, read once for everything that resuming the run asks of it.

    Args:
        path: the file.
        content: what it holds, from `read_checkpoint`.
        last: the state of the last checkpoint in its folder when it was read, from `file_state`.
    """

    path: Path
    content: dict[str, Any] = dataclasses.field(repr=False)
    last: FileState | None = None

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a file; raise what `read_checkpoint` raises."""
        last = file_state(path.with_name(LAST.name))  # before the file is read: what is written meanwhile shows
        return cls(path, read_checkpoint(path), last)

    @property
    def step(self) -> int:
        """Optimiser steps made so far."""
        return int(self.content["global_step"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run, as `PretrainSettings` takes them."""
        return dict(self.content["run"]["settings"])

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's weights, or their moving average where the run keeps one."""
        return {name.removeprefix("model."): weight for name, weight in self.content["state_dict"].items()}

    def is_finished(self, settings: PretrainSettings) -> bool:
        """Return whether the run has made all its steps, or has stopped early."""
        return bool(self.content["run"].get("finished")) or self.step >= settings.steps

    def check_tensors(self, model: nn.Module) -> None:
        """Raise ValueError that names the first weight or optimizer state that is not finite or does not fit."""
        try:
            check_weights(model, self.weights)
            shapes = {weight.shape for weight in model.parameters()} | {torch.Size()}
            for name, tensor in _tensors(self.content["optimizer_states"], "optimizer_states"):
                if tensor.shape not in shapes:
                    raise ValueError(f"{name} has shape {list(tensor.shape)}, expected that of a weight")
                if not bool(tensor.isfinite().all()):
                    raise ValueError(f"{name} has values that are not finite")
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def check_resumes(self, wanted: Mapping[str, Any]) -> None:
        """Raise ValueError unless a run described by `wanted` continues this one with the same losses."""
        saved = self.content["run"]
        # Fields that were added after the run was started get their defaults.
        fields = {
            "model": MMMAEConfig.from_dict(saved["model"]).to_dict(),
            "settings": dataclasses.asdict(PretrainSettings(**saved["settings"])),
        }
        # With validation, each checkpoint comes with one, and a validation may end the run.
        free = set(FREE_SETTINGS) - ({"checkpoint_every"} if wanted["settings"]["validation"] else set())
        for part, values in fields.items():
            for field, value in values.items():
                if wanted[part][field] != value and field not in free:
                    raise ValueError(f"{field} is {wanted[part][field]!r}, but the run of {self.path} has {value!r}")
        batch, ranks = wanted["settings"]["batch"], wanted["ranks"]
        samples = fields["settings"]["batch"] * saved.get("ranks", 1)
        if batch * ranks != samples:
            given = f"{batch} on each of {ranks} processes" if ranks > 1 else str(batch)
            raise ValueError(f"batch is {given}, but the run of {self.path} has {samples} in all")
        if saved.get("names", wanted["names"]) != wanted["names"]:
            raise ValueError(
                f"the subjects are not those of the run of {self.path}: files were added, removed or renamed"
            )


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, without half-written files and without unpickled objects.

    Args:
        resumed: the checkpoint that the run is resumed from; its file is not read again.
    """

    def __init__(self, resumed: Checkpoint | None = None) -> None:
        self.resumed = resumed
        self._saved: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write into a temporary file, keep the checkpoint before as `previous.ckpt`, and rename the new one.

        From the first one on there is a last checkpoint at every moment, for those who look at a run in progress. A run
        that goes on from `previous.ckpt` keeps it until it has written one itself: the last may be damaged.
        """
        path = Path(path)
        _check_plain(checkpoint.get("callbacks", {}), "callbacks")
        previous = path.with_name(PREVIOUS.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        resumed = None if self.resumed is None else self.resumed.path.resolve()

        def rotate() -> None:
            if path.name == LAST.name and path.exists() and (path in self._saved or resumed != previous.resolve()):
                _keep_as(path, previous)

        def save(temporary: Path) -> None:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # of a full disk
                raise OSError(f"{path}: can't be written: {str(error).splitlines()[0]}") from error

        write_atomically(path, save, before_rename=rotate)
        self._saved.add(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return tensors and plain values, on the CPU."""
        if self.resumed is not None and Path(path) == self.resumed.path:
            return copy.deepcopy(self.resumed.content)  # copied out of the file, which may change from here on
        return read_checkpoint(Path(path), mmap=False)


class LastCheckpoint(ModelCheckpoint):
    """Lightning's callback, but it writes nothing before the first step of a resumed run is complete.

    With gradient accumulation, Lightning's writes a checkpoint in the middle of that step, and resuming from it would
    start there.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Mark the step that the run is resumed from as saved."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step


def find_checkpoint(out: Path, resume: str | Path | Checkpoint | None) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None for a new run.

    Args:
        out: the run's folder.
        resume: a checkpoint or its file, `auto` for the last whole one in `out` if there is one, or None.

    Raises:
        ValueError: `out` holds a run other than the one to resume, or the checkpoint is broken.
        FileNotFoundError: there is no such checkpoint.
    """
    last, previous = out / LAST, out / PREVIOUS
    if resume == "auto":
        return _last_whole(out)
    if isinstance(resume, str):
        resume = Path(resume)
    path = resume.path if isinstance(resume, Checkpoint) else resume
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    own = path is not None and path.resolve() in (last.resolve(), previous.resolve())
    if ((out / "config.json").exists() or last.exists()) and not own:
        raise ValueError(f"{out} holds a run already: resume it (--resume auto), or name another folder (--out)")
    return Checkpoint.read(resume) if isinstance(resume, Path) else resume


def check_unchanged(out: Path, checkpoint: Checkpoint | None) -> None:
    """Raise ValueError if another run has written a checkpoint into the folder since `checkpoint` was read from it.

    Called while the folder is held: another process may have held it before.

    Args:
        out: the run's folder.
        checkpoint: what `find_checkpoint` returned for it.
    """
    last = out / LAST
    ours = checkpoint is not None and checkpoint.path.resolve().parent == last.parent.resolve()
    if file_state(last) != (checkpoint.last if checkpoint is not None and ours else None):
        raise ValueError(
            f"{out} was written by another run meanwhile: resume it (--resume auto), or name another folder (--out)"
        )


def _keep_as(path: Path, other: Path) -> None:
    """Give a file a second name, which may be in use; where the file system can't, the first name is lost."""
    link = other.with_name(f".{other.name}.{os.getpid()}.partial")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, other)
    else:
        os.replace(link, other)
        link.unlink(missing_ok=True)  # renaming does nothing if both are one file already


def file_state(path: Path) -> FileState | None:
    """Return what tells a file from one that has replaced it, or None if there is none."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def _last_whole(out: Path) -> Checkpoint | None:
    """Return the last checkpoint in a run's folder, or the one before with a warning if the last is damaged."""
    last, previous = out / LAST, out / PREVIOUS
    if not last.exists():  # killed between two renamings, on a file system without links
        return Checkpoint.read(previous) if previous.exists() else None
    try:
        return Checkpoint.read(last)
    except ValueError as error:
        if not previous.exists():
            raise
        checkpoint = Checkpoint.read(previous)
        warnings.warn(f"{error}; the run goes on from {previous}, after step {checkpoint.step}", stacklevel=4)
        return checkpoint


def read_checkpoint(path: Path, *, mmap: bool = True) -> dict[str, Any]:
    """Read the tensors and plain values of a checkpoint, onto the CPU.

    Args:
        path: the file.
        mmap: leave tensors in the file until they are used; the file must then stay unchanged.

    Raises:
        OSError: there is no such file, or it can't be read.
        ValueError: the file is broken, a checksum in it is wrong, it holds anything else, or is not a checkpoint of a
            pretraining run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    path.open("rb").close()  # what follows would take a file that can't be read for a damaged one
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: no whole checkpoint: it is no zip archive, or its end is missing")
    _check_sums(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises whatever its unpickler or zip reader raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no whole checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or any(part not in checkpoint for part in PARTS):
        raise ValueError(f"{path}: no checkpoint of a pretraining run, which has {', '.join(PARTS)}")
    try:
        _check_parts(checkpoint)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return checkpoint


def _check_parts(checkpoint: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError unless the parts of a checkpoint have their types, and the run is described."""
    for part, kind in PARTS.items():
        if not isinstance(checkpoint[part], kind) or isinstance(checkpoint[part], bool):
            raise ValueError(f"{part} is {described(checkpoint[part])}, expected {described(kind())}")
    check_whole("global_step", checkpoint["global_step"], 0)
    states = [isinstance(state, dict) and state.get("state") for state in checkpoint["optimizer_states"]]
    if len(states) != 1 or not states[0]:
        raise ValueError(f"optimizer_states holds {len(states)} parts, expected one, with the state of each weight")
    for name, weight in checkpoint["state_dict"].items():
        if not isinstance(weight, Tensor):
            raise ValueError(f"state_dict: {name} is {described(weight)}, expected a Tensor")
    run = checkpoint["run"]
    for field in ("model", "settings"):
        if not isinstance(run.get(field), dict):
            raise ValueError(f"run: {field} is {described(run.get(field))}, expected a dict of fields")
    check_whole("run: ranks", run.get("ranks", 1), 1)
    MMMAEConfig.from_dict(run["model"])
    PretrainSettings(**run["settings"])


def _check_sums(path: Path) -> None:
    """Raise ValueError unless each record of the file has the CRC-32 that torch.save wrote; torch.load reads none."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises what it meets: BadZipFile, NotImplementedError, struct.error, ...
        raise ValueError(f"{path}: no whole checkpoint: {error}") from error
    if damaged is not None:
        raise ValueError(f"{path}: no whole checkpoint: {damaged} is not what was written, by its checksum")


PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor)


def _check_plain(value: Any, name: str) -> None:
    """Raise ValueError if a value holds what can't be read back without running code; the message names the key."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_plain(part, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            _check_plain(part, name)
    elif type(value) not in PLAIN:
        raise ValueError(
            f"the state of a callback can't be kept in a checkpoint: {name} is {described(value)}, expected tensors "
            "and plain values"
        )


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested lists and dicts, each with the keys that lead to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(part, f"{name}[{key!r}]")


def describe(config: MMMAEConfig, settings: PretrainSettings, ranks: int, subjects: Sequence[str]) -> dict[str, Any]:
    """Return the config, settings and data of a run as plain JSON types; the subjects' names as a checksum."""
    checksum = hashlib.sha256("\n".join(subjects).encode(errors="surrogateescape")).hexdigest()
    return {
        "model": config.to_dict(),
        "settings": {**dataclasses.asdict(settings), "warmup": settings.warmup_steps},
        "ranks": ranks,
        "names": checksum,
        "finished": False,
    }


def remove_partial(out: Path) -> None:
    """Remove the temporary files of processes that were killed while writing."""
    for path in out.rglob(".*.partial"):
        path.unlink(missing_ok=True)
