"""Examples in docstrings run and give what they show, and the names that a user meets first have one."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import mmmae

ROOMS = ("mmmae.model", "mmmae.cost")
SHOWN = (
    "mmmae.model.encoder.HSIEncoder",
    "mmmae.model.encoder.HSIEncoder.forward_intermediates",
    "mmmae.model.export.export_encoder",
    "mmmae.model.fast.fast_model",
    "mmmae.model.heads.SegmentationModel",
    "mmmae.model.inputs.Output",
    "mmmae.model.pretrained.Pretrained.save_pretrained",
    "mmmae.model.imports.import_encoder",
    "mmmae.cost.report.profile",
)


def examples() -> dict[str, doctest.DocTest]:
    """Return the docstrings with examples in all modules of the rooms, by the names of what they document."""
    found = {}
    for room in ROOMS:
        for module in pkgutil.iter_modules(importlib.import_module(room).__path__, f"{room}."):
            for test in doctest.DocTestFinder().find(importlib.import_module(module.name)):
                if test.examples:
                    found[test.name] = test
    return found


EXAMPLES = examples()


def test_the_names_that_a_user_meets_first_have_an_example():
    assert set(SHOWN) <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_gives_what_it_shows(name, tmp_path, monkeypatch):
    for variable in ("MMMAE_KERNELS", "MMMAE_ATTENTION"):  # a report names them
        monkeypatch.delenv(variable, raising=False)
    torch.manual_seed(0)
    test = EXAMPLES[name]
    test.globs = {"mmmae": mmmae, "torch": torch, "folder": tmp_path}
    printed: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=printed.append)
    assert result.failed == 0, "".join(printed)
