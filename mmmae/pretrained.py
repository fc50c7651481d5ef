"""Weights and config on disk: safetensors and JSON, written whole or not at all, no pickle."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import MMMAEConfig

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
_umask = os.umask(0o077)  # it can only be read by setting it; at import no other thread of ours is there
os.umask(_umask)
PERMISSIONS = 0o666 & ~_umask


def save_weights(directory: str | Path, config: MMMAEConfig, weights: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` into `directory`, which is made if it is not there."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
    write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_atomically(directory / CONFIG_NAME, lambda path: path.write_text(config.to_json() + "\n"))


def load_weights(directory: str | Path) -> tuple[MMMAEConfig, dict[str, Tensor]]:
    """Read what `save_weights` wrote, onto the CPU.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is broken.
    """
    directory = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name}: no such file; expected is a folder with an encoder in it")
    try:
        config = MMMAEConfig.from_json((directory / CONFIG_NAME).read_text())
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_NAME}: {error}") from error
    try:
        return config, load_file(directory / WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS_NAME}: no whole safetensors file: {error}") from error


def check_can_write(directory: str | Path) -> None:
    """Raise an OSError that names `directory` if it could not be made, with its parents, and filled."""
    directory = Path(directory)
    there = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{directory}: {'is' if there == directory else f'{there} is'} no folder")
    try:
        tempfile.TemporaryFile(dir=there).close()  # permissions alone do not tell of read-only and virtual file systems
    except OSError as error:
        raise OSError(f"{directory}: can't write into {there}: {error.strerror}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a reader finds the old file or the new one."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    except OSError as error:
        raise OSError(f"{path}: can't be written: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(PERMISSIONS)
        os.replace(temporary, path)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        raise OSError(f"{path}: could not be written: {str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)
