"""Other libraries for the tests of this folder, which are skipped where one is not installed."""

import importlib
import importlib.util
from types import ModuleType

import pytest

from . import torchvision_operators  # noqa: F401


def load(name: str) -> ModuleType:
    """Return the module of an optional package, or skip the test."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"needs {name}: make interop")
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def timm():
    load("timm.optim")
    return load("timm")


@pytest.fixture(scope="session")
def terratorch():
    return load("terratorch")


@pytest.fixture(scope="session")
def torchgeo():
    return load("torchgeo.datasets")


@pytest.fixture(scope="session")
def transformers():
    load("accelerate")
    return load("transformers")
