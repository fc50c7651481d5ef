"""A run without a named folder gets a new one, and can be resumed there."""

from pathlib import Path

import pytest

from mmmae.cli import main
from mmmae.training.checkpoints import LAST, PREVIOUS
from mmmae.training.folders import default_folder

FIRST = Path("runs") / "pretrain"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def begin(folder):
    (folder / LAST).parent.mkdir(parents=True)
    (folder / "config.json").touch()
    (folder / LAST).touch()


def test_each_run_gets_the_next_folder_and_auto_finds_the_last():
    assert default_folder(FIRST) == default_folder(FIRST, "auto") == FIRST
    begin(FIRST)
    assert default_folder(FIRST, "auto") == FIRST
    assert default_folder(FIRST) == Path("runs/pretrain-2")
    for number in range(2, 12):  # so that 10 and 11 are compared as numbers
        begin(Path(f"runs/pretrain-{number}"))
    assert default_folder(FIRST) == Path("runs/pretrain-12")
    assert default_folder(FIRST, "auto") == Path("runs/pretrain-11")


def test_a_checkpoint_of_the_series_goes_on_in_its_folder_and_another_in_a_new_one():
    for folder in (FIRST, Path("runs/pretrain-2"), Path("runs/mine")):
        begin(folder)
    assert default_folder(FIRST, str(FIRST / LAST)) == default_folder(FIRST, str(FIRST / PREVIOUS)) == FIRST
    assert default_folder(FIRST, str(Path("runs/mine") / LAST)) == Path("runs/pretrain-3")


def test_folders_without_a_run_and_of_other_names_do_not_count():
    FIRST.mkdir(parents=True)
    for name in ("pretrain-x", "pretrain-2-old", "my-pretrain", "pretrain.bak"):
        begin(Path("runs") / name)
    assert default_folder(FIRST) == default_folder(FIRST, "auto") == FIRST


def test_the_second_run_of_the_command_line_does_not_meet_the_first_and_the_last_goes_on(capsys):
    small = ["--subjects", "3", "--set", "image_size=32", "--set", "patch=[3,8,8]", "--batch", "2", "--warmup", "0"]
    assert main(["pretrain", *small, "--steps", "1"]) == 0
    first = {path: path.read_bytes() for path in FIRST.rglob("*") if path.is_file()}
    other = [*small, "--set", "mask_ratio=0.5", "--steps", "2"]
    assert main(["pretrain", *other]) == 0
    assert "runs/pretrain-2/encoder" in capsys.readouterr().out
    assert main(["pretrain", *other, "--resume", "auto"]) == 0
    assert "runs/pretrain-2/encoder" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in FIRST.rglob("*") if path.is_file()} == first
    assert sorted(path.name for path in FIRST.parent.iterdir()) == ["pretrain", "pretrain-2"]
    assert main(["pretrain", *other, "--out", str(FIRST)]) == 2
    assert "runs/pretrain holds a run already" in capsys.readouterr().err
