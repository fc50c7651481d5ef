"""The examples in the docstrings of the public functions run and print what they say."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch.nn import functional as F

import mmmae_kernels
from mmmae_kernels.cpu import library

FUNCTIONS = {name: getattr(mmmae_kernels, name) for name in mmmae_kernels.__all__}
FUNCTIONS = {name: value for name, value in FUNCTIONS.items() if not isinstance(value, type)}
NAMES = {**{name: getattr(mmmae_kernels, name) for name in mmmae_kernels.__all__}, "torch": torch, "F": F}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_function_runs(name):
    if name == "explain" and library.unavailable_reason() is not None:
        pytest.skip("its example shows a reason of the native library")
    (found,) = doctest.DocTestFinder(recurse=False).find(FUNCTIONS[name], name, globs=dict(NAMES))
    assert found.examples, f"{name} has no example"
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=report.append)
    assert not failed, "".join(report)
