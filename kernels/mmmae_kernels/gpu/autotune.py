"""Autotuning with MMMAE_AUTOTUNE=1: measures which config of a launch is fastest and stores the result on disk."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import triton

if TYPE_CHECKING:
    from .config import Config, Launch

_found: dict[str, str] = {}


def is_on() -> bool:
    """Return whether `MMMAE_AUTOTUNE=1` asks for autotuning."""
    return os.environ.get("MMMAE_AUTOTUNE", "0") not in ("", "0")


def folder() -> Path:
    """Return the folder of the results: `autotune` in `$XDG_CACHE_HOME/mmmae`, or in `~/.cache/mmmae`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmmae" / "autotune"


def fastest(
    launch: Launch, target: str, start: Callable[..., Any], measure: Callable[..., Any] | None = None
) -> Config | None:
    """Return the fastest config of a launch, measured once for each kernel, architecture, dtype and shape.

    Of the processes that share the folder of results, the first one measures. The others don't wait for it, because it
    may wait for them: a measurement synchronises the device, and with it the collective operations of all ranks.

    Args:
        target: architecture, part of the key of the stored result.
        start: starts a launch with a config.
        measure: returns the milliseconds of a call; None means `triton.testing.do_bench`.

    Returns:
        The config, or None if no result is stored and the launch can't be measured now: another process measures it,
        or a CUDA graph is being captured, for which no kernel may be loaded that did not run before.
    """
    key = _key(launch, target)
    configs = {_text(config): config for config in launch.configs}
    file = folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if _found.get(key) not in configs:
        if _is_capturing():
            return None
        _found[key] = _stored(file)
    if _found[key] not in configs:
        with _claimed(file) as (mine, result):
            if not mine:
                return None
            _found[key] = _parsed(result.read()) if result else ""  # another process may have stored it meanwhile
            if _found[key] not in configs:
                measure = triton.testing.do_bench if measure is None else measure
                times = [measure(functools.partial(start, launch, config)) for config in launch.configs]
                _found[key] = _text(launch.configs[times.index(min(times))])
                _store(result, key, _found[key])
    return configs[_found[key]]


def _key(launch: Launch, target: str) -> str:
    """Return a key of everything that the time depends on: code, architecture, dtypes, sizes, strides and grid."""
    arguments = [
        f"{name}={str(value.dtype).removeprefix('torch.') if isinstance(value, torch.Tensor) else value}"
        for name, value in launch.arguments.items()
    ]
    code = str(getattr(launch.kernel, "cache_key", ""))[:16]
    programs = launch.grid(launch.configs[0].constants)
    return " ".join([launch.kernel.fn.__name__, code, target, triton.__version__, str(programs), *arguments])


def _text(config: Config) -> str:
    return f"{dict(config.constants)} {config.warps} warps {config.stages} stages {config.registers} registers"


def _is_capturing() -> bool:
    """Return whether a CUDA graph is being captured, during which the device can't be waited for."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _stored(file: Path) -> str:
    """Return the stored config as text, or an empty string if there is none."""
    with contextlib.suppress(OSError):
        return _parsed(file.read_text())
    return ""


def _parsed(text: str) -> str:
    """Return the config in the text of a file, or an empty string if there is none."""
    with contextlib.suppress(ValueError):
        result = json.loads(text)
        config = result.get("config") if isinstance(result, dict) else None
        return config if isinstance(config, str) else ""
    return ""


@contextlib.contextmanager
def _claimed(file: Path) -> Iterator[tuple[bool, IO[str] | None]]:
    """Lock the file of a result; yield whether no other process has locked it, and the file if it can be written.

    The system removes the lock of a process that ends.
    """
    with contextlib.ExitStack() as stack:
        mine = True
        result: IO[str] | None = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            opened = stack.enter_context(file.open("a+"))
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError:
            pass  # without a home that can be written and locked, each process measures for itself
        else:
            stack.callback(fcntl.flock, opened, fcntl.LOCK_UN)  # closing is not enough if a forked process has the file
            opened.seek(0)
            result = opened
        yield mine, result


def _store(result: IO[str] | None, key: str, config: str) -> None:
    """Write a result into its locked file; until it is complete, no reader can parse it."""
    if result is not None:
        with contextlib.suppress(OSError):  # the disk is full
            result.truncate(0)
            result.write(json.dumps({"launch": key, "config": config}, indent=1))
            result.flush()
