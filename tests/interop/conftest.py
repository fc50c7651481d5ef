"""Other libraries for the tests of this folder, which are skipped where one is not installed."""

import importlib
import importlib.util
from types import ModuleType

import pytest
import torch

# A torchvision that was built for CUDA can't load its operators beside a PyTorch for CPUs, and its import fails where
# it describes two of them. None is used here.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
if importlib.util.find_spec("torchvision") is not None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in ("nms", "qnms"):
            LIBRARY.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def load(name: str) -> ModuleType:
    """Return the module of an optional package, or skip the test."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"needs {name}: make interop")
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def timm():
    load("timm.optim")
    return load("timm")
