"""Measures which configuration of a launch table is fastest here, and remembers it on disk: MMMAE_AUTOTUNE=1."""

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
    """Whether launches are tuned: `MMMAE_AUTOTUNE=1`."""
    return os.environ.get("MMMAE_AUTOTUNE", "0") not in ("", "0")


def cache_file() -> Path:
    """Where results are kept: `autotune.json` in `$XDG_CACHE_HOME/mmmae`, or in `~/.cache/mmmae`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmmae" / "autotune.json"


def fastest(
    launch: Launch, target: str, start: Callable[..., Any], measure: Callable[..., Any] | None = None
) -> Config:
    """The fastest of the launch's configs, measured once for each kernel, architecture, type and shape.

    A kernel overwrites its outputs and reads none of them, so that it may run many times.

    Args:
        target: architecture, part of what results are remembered by.
        start: starts a launch by a config.
        measure: milliseconds of a call; None for `triton.testing.do_bench`.
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
    """What a time depends on: code, machine, types, sizes and strides, and the number of programs."""
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
    """What is on disk; nothing if there is no file, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(cache_file().read_text())
        if isinstance(found, dict):
            return {key: config for key, config in found.items() if isinstance(config, str)}
    return {}


def _write(key: str, config: str) -> None:
    """Add one result; the file is replaced as a whole, so that no reader sees half of it."""
    file = cache_file()
    with contextlib.suppress(OSError):  # a home that can't be written costs a search each time, no more
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as new:
            json.dump(_read() | {key: config}, new, indent=1)
        os.replace(new.name, file)
