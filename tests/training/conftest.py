"""Fixtures of the training tests."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_runs(quick_runs: None) -> None:
    """Make the runs of all modules small; tests that need whole ones say so by `whole_runs`."""
