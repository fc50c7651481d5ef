"""Options of the tests, and what every test leaves as it was."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch loads OpenMP, whose threads would wait for work by spinning and take the cores from other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from mmmae_kernels import dispatch

# A tuned process keeps all memory that it frees, and one that has run thousands of tests could no longer fork workers.
os.environ["MMMAE_TUNE_CPU"] = "0"
os.environ["MMMAE_PRECISION"] = "32"  # not by a measurement, whose result is not the same on all machines
MUCH = 10**9  # bytes
# Groups of tests that one worker runs, modules and single tests that take long, the longest first.
LONGEST = (
    "compile",
    "test_the_blocks_of_a_page_run[pretraining.md]",
    "export",
    "test_every_part_goes_through_on_a_bare_machine",
    "profile",
    "pretrain",
    "pretrain steps",
    "test_the_page_holds_every_op_and_model_with_the_fast_models_floor_below_the_references",
    "budget",
    "ranks",
    "edited_files",
    "test_docs.py",
    "test_cli.py",
    "test_imports.py",
    "test_configuration.py",
    "test_launch_path.py",
    "test_equality.py",
    "test_loading.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-targets", action="store_true", help="execute compiled kernels for every architecture and in every type"
    )
    parser.addoption("--soak", action="store_true", help="run the tests that take minutes too, tests/soak")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "soak" and not config.getoption("--soak") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes longest first: with it at the end, one worker would run it while the others have nothing left."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """Return the place of a test in LONGEST, behind which all others keep their order."""
    names = {item.path.name, item.name, *(mark.args[0] for mark in item.iter_markers("xdist_group"))}
    return next((place for place, name in enumerate(LONGEST) if name in names), len(LONGEST))


def pytest_collection_finish() -> None:
    """Spare the garbage collector all modules and tests, a search of which takes it half a second each time."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="module")
def quick_runs() -> Iterator[None]:
    """Make runs small: see `tests.training.quick_runs`."""
    from tests.training.quick_runs import leave_out_slow_work  # which needs more than the kernels' tests do

    with pytest.MonkeyPatch.context() as patch:
        leave_out_slow_work(patch)
        yield


@pytest.fixture
def with_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs of a test save their pictures, and leave out the rest of the slow work."""
    from tests.training.quick_runs import bring_back_slow_work

    bring_back_slow_work(monkeypatch, "savefig")


@pytest.fixture
def whole_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs of a test do all of their work."""
    from tests.training.quick_runs import bring_back_slow_work

    bring_back_slow_work(monkeypatch)


def _resident() -> int:
    """Return the bytes of memory that this process holds, 0 where /proc does not say it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
