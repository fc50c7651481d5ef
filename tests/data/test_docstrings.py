"""The examples in the docstrings of the data sets run, and print what they say."""

import doctest
import importlib

import pytest

MODULES = ["folder", "normalization", "readers.cube", "sample", "store.cache", "store.shards", "subjects"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_print_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(importlib.import_module(f"mmmae.data.{name}"))
    assert tried > 0
    assert failed == 0
