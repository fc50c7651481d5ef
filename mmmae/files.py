"""Atomic writing of files, and a check before any work that a folder can be written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_umask = os.umask(0o077)  # it can only be read by setting it, which is safe at import, before threads are started
os.umask(_umask)
PERMISSIONS = 0o666 & ~_umask


def check_can_write(directory: str | Path) -> None:
    """Raise an OSError that names `directory` if it can't be created, with its parents, or written into."""
    directory = Path(directory)
    there = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{directory}: {'is' if there == directory else f'{there} is'} not a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()  # permissions do not show read-only and virtual file systems
    except OSError as error:
        raise OSError(f"{directory}: can't write into {there}: {error.strerror}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary file beside `path`, then rename it: readers find the old or the new file, whole."""
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
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors raise these if the disk is full
        raise OSError(f"{path}: can't be written: {str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Write plain JSON types into a file atomically."""
    text = json.dumps(content, indent=indent) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
