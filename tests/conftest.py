"""Options of the tests, and what every test leaves as it was."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmmae_kernels import dispatch

# A tuned process keeps all memory that it frees, and one that has run thousands of tests could no longer fork workers.
os.environ["MMMAE_TUNE_CPU"] = "0"
os.environ["MMMAE_PRECISION"] = "32"  # not by a measurement, whose result is not the same on all machines
MUCH = 10**9  # bytes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-targets", action="store_true", help="execute compiled kernels for every architecture and in every type"
    )
    parser.addoption("--soak", action="store_true", help="run the tests that take minutes too, tests/soak")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "soak" and not config.getoption("--soak") else None


@pytest.fixture(autouse=True)
def _decides_anew() -> Iterator[None]:
    """Forget which backend serves which kind of call: a test may pretend to be on another machine."""
    dispatch.reset()
    yield
    dispatch.reset()


@pytest.fixture(scope="module", autouse=True)
def _releases_memory() -> Iterator[None]:
    """Where the tests of a module have left much memory, drop what was compiled and give freed memory back."""
    yield
    if _resident() < MUCH:
        return
    torch.compiler.reset()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _resident() -> int:
    """Return the bytes of memory that this process holds, 0 where /proc does not say it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
