"""Autotuning with MMMAE_AUTOTUNE=1: measures which config of a launch is fastest and stores the result on disk."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

if TYPE_CHECKING:
    from .config import Config, Launch

_found: dict[str, str] = {}


def is_on() -> bool:
    """Return whether `MMMAE_AUTOTUNE=1` asks for autotuning."""
    return os.environ.get("MMMAE_AUTOTUNE", "0") not in ("", "0")


def cache_file() -> Path:
    """Return the path of the results: `autotune.json` in `$XDG_CACHE_HOME/mmmae`, or in `~/.cache/mmmae`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmmae" / "autotune.json"


def fastest(
    launch: Launch, target: str, start: Callable[..., Any], measure: Callable[..., Any] | None = None
) -> Config:
    """Return the fastest config of a launch, measured once for each kernel, architecture, dtype and shape.

    The kernel is run many times, so it must not read what it writes.

    Args:
        target: architecture, part of the key of the stored result.
        start: starts a launch with a config.
        measure: returns the milliseconds of a call; None means `triton.testing.do_bench`.
    """
    key = _key(launch, target)
    configs = {_text(config): config for config in launch.configs}
    if key not in _found:
        _found.update(_read())
    if _found.get(key) not in configs:
        measure = triton.testing.do_bench if measure is None else measure
        times = [measure(functools.partial(start, launch, config)) for config in launch.configs]
        _found[key] = _text(launch.configs[times.index(min(times))])
        _write(key, _found[key])
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


def _read() -> dict[str, str]:
    """Return the stored results, or nothing if the file does not exist or can't be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(cache_file().read_text())
        if isinstance(found, dict):
            return {key: config for key, config in found.items() if isinstance(config, str)}
    return {}


def _write(key: str, config: str) -> None:
    """Add one result; the file is replaced atomically, so that no reader sees a part of it."""
    file = cache_file()
    with contextlib.suppress(OSError):  # without a writable home the search runs again in the next process
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as new:
            json.dump(_read() | {key: config}, new, indent=1)
        os.replace(new.name, file)
