"""Atomic writing of files, a lock on folders, and a check before any work that a folder can be written."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_umask = os.umask(0o077)  # it can only be read by setting it, which is safe at import, before threads are started
os.umask(_umask)
PERMISSIONS = 0o666 & ~_umask

_held: set[tuple[int, Path]] = set()  # process and folder: a forked process inherits the set, and not the locks


def check_can_write(directory: str | Path) -> None:
    """Raise an OSError that names `directory` if it can't be created, with its parents, or written into."""
    directory = Path(directory)
    there = next(
        folder for folder in (directory, *directory.absolute().parents) if folder.exists() or folder.is_symlink()
    )
    if not there.exists():
        raise NotADirectoryError(f"{directory}: {'is' if there == directory else f'{there} is'} a link to no folder")
    if not there.is_dir():
        raise NotADirectoryError(f"{directory}: {'is' if there == directory else f'{there} is'} not a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()  # permissions do not show read-only and virtual file systems
    except OSError as error:
        raise OSError(f"{directory}: can't write into {there}: {error.strerror}") from error


def check_can_write_file(path: Path) -> None:
    """Raise ValueError if `path` is a folder, and an OSError if its folder can't be created or written into."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    check_can_write(path.parent)


def write_atomically(
    path: Path, write: Callable[[Path], object], *, before_rename: Callable[[], object] = lambda: None
) -> None:
    """Call `write` with a temporary file beside `path`, then rename it: readers find the old or the new file, whole.

    `before_rename` is called when the disk has the whole new file, and the old one still has its name.
    """
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
        before_rename()
        os.replace(temporary, path)
    except SafetensorError as error:  # of a full disk
        raise OSError(f"{path}: can't be written: {str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)


def is_file_name(name: str) -> bool:
    """Return whether a file of this name lies in the folder that it is joined to, and nowhere else."""
    return name not in ("", ".", "..") and not set(name) & {"/", os.sep, "\0"}


def file_for(folder: Path, subject: str, suffix: str) -> Path:
    """Return the path of a subject's file; raise ValueError if the subject's name would lead out of the folder."""
    if not is_file_name(subject):
        raise ValueError(f"subject {subject!r}: its name can't be that of a file in {folder}; rename it")
    return folder / f"{subject}{suffix}"


def check_replaces_none(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise ValueError if a file that is to be written is one of the files that are read, by whatever path."""
    known = {(found.st_dev, found.st_ino): path for path in inputs if (found := _status(path)) is not None}
    for output in outputs:
        found = _status(output)
        if found is not None and (replaced := known.get((found.st_dev, found.st_ino))) is not None:
            raise ValueError(f"{output} would replace {replaced}, which is read; name another --out")


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock an existing folder during the block, against other processes and other calls in this one.

    The system releases the lock when the process ends, however it ends; processes that it has forked do not have it.
    On file systems without locks the folder is held in this process only.

    Raises:
        ValueError: another process holds the folder, or this one does already; the message names it.
    """
    # The system grants a process its own lock again, and drops it when the first of the two files is closed.
    place = os.getpid(), folder.resolve()
    if place in _held:
        raise ValueError(f"{folder} is in use by this process; name another folder (--out), or wait")
    _held.add(place)
    try:
        with _locked(folder):
            yield
    finally:
        _held.remove(place)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("a+") as opened:
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            opened.seek(0)
            owner = opened.read().strip() or "another process"
            raise ValueError(f"{folder} is in use by {owner}; name another folder (--out), or wait") from None
        except OSError:  # a file system without locks
            pass
        else:
            opened.truncate(0)
            started = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
            opened.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")
            opened.flush()
        yield


def json_value(text: str) -> Any:
    """Return the value of a JSON text; raise ValueError for any other text, however it is broken."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Write plain JSON types into a file atomically."""
    text = json.dumps(content, indent=indent) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
