"""Optional packages: found without an import, imported without a word, and refused with a reason."""

import importlib.metadata
import logging
import sys
import textwrap
import warnings

import pytest
import torch

from mmmae_kernels import explain
from mmmae_kernels.attention.backends import packages

LOUD = """
import logging, sys, warnings
print("printed")
print("printed as an error", file=sys.stderr)
logging.getLogger("fake").error("logged")
logging.warning("logged by the root")
warnings.warn("warned")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package `fake_attention` of this source that is installed as `fake-attention`."""

    def make(source, submodule="", with_metadata=True):
        folder = tmp_path / "fake_attention"
        folder.mkdir()
        (folder / "__init__.py").write_text(textwrap.dedent(source))
        (folder / "ops.py").write_text(textwrap.dedent(submodule))
        if with_metadata:
            metadata = tmp_path / "fake_attention-1.0.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-attention\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(tmp_path)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    packages._import.cache_clear()
    yield make
    packages._import.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "fake_attention"]:
        del sys.modules[name]


@pytest.fixture
def silence(capfd, caplog):
    """Fails if anything was printed, logged or warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert caught == []


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ('raise RuntimeError("built for\\n another torch")', "RuntimeError: built for another torch"),
        ("import no_such_extension", "ModuleNotFoundError: No module named 'no_such_extension'"),
        ('raise OSError("libcudart.so.12: cannot open")', "OSError: libcudart.so.12: cannot open"),
        ("None.attribute", "AttributeError: 'NoneType' object has no attribute 'attribute'"),
    ],
)
def test_a_package_that_cannot_be_imported_gives_a_reason_and_no_output(package, silence, failure, reason):
    package(LOUD, submodule=LOUD + failure)
    expected = f"fake_attention.ops can't be imported: {reason}"
    assert packages.refuses("fake-attention", "fake_attention.ops") == expected
    with pytest.raises(RuntimeError) as caught:
        packages.load("fake_attention.ops")
    assert str(caught.value) == expected


def test_a_package_is_imported_without_a_word(package, silence):
    package(LOUD, submodule=LOUD + "answer = 42")
    assert packages.refuses("fake-attention", "fake_attention.ops") is None
    assert packages.load("fake_attention.ops").answer == 42


@pytest.mark.parametrize("failure", ["", "raise ImportError"])
def test_what_is_said_after_an_import_is_heard(package, capsys, caplog, failure):
    package(LOUD + failure)
    packages.refuses("fake-attention", "fake_attention")
    print("mine")
    logging.getLogger("mine").error("mine")
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", stacklevel=1)
    assert capsys.readouterr().out == "mine\n"
    assert [record.getMessage() for record in caplog.records] == ["mine"]


def test_a_package_is_imported_once(package):
    package("import sys; sys.imports_of_fake = getattr(sys, 'imports_of_fake', 0) + 1; raise ImportError")
    try:
        for _ in range(3):
            packages.refuses("fake-attention", "fake_attention")
        assert sys.imports_of_fake == 1
    finally:
        del sys.imports_of_fake


def test_nothing_is_imported_where_there_is_no_gpu(package, monkeypatch):
    package("raise AssertionError('imported')")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert packages.refuses("fake-attention", "fake_attention") == "there is no GPU that torch can use"
    assert "fake_attention" not in sys.modules


def test_a_package_without_metadata_is_found_by_its_module(package):
    package("", with_metadata=False)
    assert packages.refuses("fake-attention", "fake_attention") is None
    assert packages.refuses("fake-attention", "fake_attention.ops") == "fake-attention is not installed"


def test_a_missing_package_is_not_installed(package):
    assert packages.refuses("fake-attention", "fake_attention") == "fake-attention is not installed"
    with pytest.raises(RuntimeError, match="fake_attention can't be imported: ModuleNotFoundError"):
        packages.load("fake_attention")


@pytest.mark.parametrize(
    ("backend", "distribution"),
    [
        ("flash_attn_4", "flash-attn-4"),
        ("flash_attn_3", "flash-attn-3"),
        ("flash_attn_2", "flash-attn"),
        ("xformers", "xformers"),
    ],
)
def test_a_backend_whose_package_is_missing_says_so(backend, distribution):
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        assert explain("attention")[backend] == f"{distribution} is not installed"
    else:
        pytest.skip(f"{distribution} is installed")
