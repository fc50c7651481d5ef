"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.quick_runs import bring_back_slow_work, leave_out_slow_work


@pytest.fixture(scope="module", autouse=True)
def quick_runs() -> Iterator[None]:
    """Make runs small: see `tests.training.quick_runs`."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_slow_work(patch)
        yield


@pytest.fixture
def whole_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs of a test do all of their work."""
    bring_back_slow_work(monkeypatch)
