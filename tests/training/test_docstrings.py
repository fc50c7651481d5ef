"""The examples in the docstrings of training run, and print what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["finetuning.finetune", "inference.encode", "pretrain", "step"])
def test_the_examples_of_a_module_print_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"mmmae.training.{name}")
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert tried > 0
    assert failed == 0
