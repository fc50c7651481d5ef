"""Reports that several modules look at, and how they are counted."""

import sys

import pytest

import mmmae
from mmmae.cost import Report


@pytest.fixture
def one_counter(request, monkeypatch):
    """Count by torch's counter alone, as if fvcore were not installed: its counter takes four times as long."""
    if "two_counters" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "fvcore", None)


@pytest.fixture
def two_counters():
    pytest.importorskip("fvcore")


@pytest.fixture
def no_backend_from_outside(monkeypatch):
    monkeypatch.delenv("MMMAE_KERNELS", raising=False)
    monkeypatch.delenv("MMMAE_ATTENTION", raising=False)


@pytest.fixture(scope="session")
def tiny() -> Report:
    return mmmae.profile("tiny")


@pytest.fixture(scope="session")
def tiny_reference() -> Report:
    return mmmae.profile(mmmae.reference_model("tiny"), batch=2)
