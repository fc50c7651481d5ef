"""Options of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mmmae_kernels import dispatch


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
