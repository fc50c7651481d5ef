"""Names of files and classes are foreign text: nothing in them forges lines, colours, formulas or TeX."""

import csv
import os

import numpy as np
import pytest

import mmmae
from mmmae.cli import main
from mmmae.data import PairedFolder
from mmmae.text import cell, figure_text, printable
from mmmae.training.finetuning.scores import write_confusion
from mmmae.training.inference.reconstruct import reconstruct

NAMES = [
    "two $ and $ \\frac",
    "line\nread 9 files: no damage",
    "\x1b[31mred",
    "=1+1",
    "[/red] [bold]",
    "not UTF-8 \udcff",
    "\u202egnp.exe",
]
FILES = [name for name in NAMES if "/" not in name]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hsi").mkdir()
    for name in FILES:
        try:
            np.save(tmp_path / "hsi" / f"{name}.npy", np.random.default_rng(0).random((12, 32, 32)))
        except OSError:
            pytest.skip(f"this file system has no file named {name!r}")
    return tmp_path


def test_what_is_printed_is_printable_and_one_line():
    assert all(printable(name).isprintable() for name in NAMES)
    assert printable("Zürich 森") == "Zürich 森"
    assert figure_text("a $x$") == r"a \$x\$"
    assert [cell(text) for text in ("=1", "-2", "plain", "+1", "@x")] == ["'=1", "'-2", "plain", "'+1", "'@x"]


def test_pictures_and_tables_of_any_name_are_written(folder):
    subjects = PairedFolder(folder / "hsi", image_size=32)
    model = mmmae.fast_model("tiny", image_size=32, patch=(3, 8, 8), aux={}, target="pixels")
    reconstruct(model, subjects, folder / "out")
    with (folder / "out" / "errors.csv").open() as file:
        found = {row["subject"] for row in csv.DictReader(file)}
    assert {cell(name) for name in FILES} < found
    assert len(list((folder / "out").glob("*.png"))) == len(FILES)
    write_confusion(NAMES, [[1] * len(NAMES)] * len(NAMES), folder / "out")


def test_reports_of_any_name_keep_to_their_lines(folder, capsys):
    for name in FILES:
        (folder / "hsi" / f"{name}.npy").write_bytes(b"")
    assert main(["data", "check", "--hsi", str(folder / "hsi")]) == 1
    printed = capsys.readouterr().out
    assert printed.isascii() or all(character.isprintable() for character in printed.replace("\n", ""))
    assert sum("no damage" in line.split(": ")[-1] and line.startswith("read") for line in printed.splitlines()) == 0
    assert "\x1b" not in printed
    assert os.fsdecode(b"\xff") not in printed
