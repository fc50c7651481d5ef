"""How commands end that can't go on: one line on standard error, the exit status, and nothing half-written."""

import lightning
import numpy as np
import pytest
import torch

import mmmae
from mmmae import info
from mmmae.cli import main
from mmmae.cli import pretrain as pretrain_command
from mmmae.phantom import Phantom
from mmmae.training.inference.encode import encode

OUT_OF_MEMORY = "mmmae info: out of memory; a smaller batch, tile or model needs less (mmmae --traceback info: where)\n"


@pytest.mark.parametrize("kind", ["GPU", "CPU", "NumPy"])
def test_short_memory_is_one_line(kind, monkeypatch, capsys):
    def fail():
        if kind == "CPU":
            torch.empty(2**50)
        raise MemoryError("Unable to allocate 8 TiB") if kind == "NumPy" else torch.OutOfMemoryError("CUDA ...")

    monkeypatch.setattr(info, "print_info", fail)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == OUT_OF_MEMORY
    with pytest.raises((MemoryError, RuntimeError)):
        main(["--traceback", "info"])


def test_an_error_of_the_model_is_not_called_one_of_the_file_that_is_written(tmp_path, monkeypatch):
    encoder = mmmae.fast_model("tiny", image_size=32).hsi_encoder()

    def fail(hsi):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encoder, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory"):
        encode(encoder, Phantom(2, image_size=32), tmp_path / "features.npz")
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_interrupted_before_it_began_is_not_said_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_command, "open_subjects", interrupted)
    assert main(["pretrain", "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "mmmae pretrain: interrupted\n"


def test_fine_tuning_that_was_interrupted_says_what_becomes_of_its_folder(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    random = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", random.random((12, 16, 16)))
    np.save(tmp_path / "labels.npy", random.integers(0, 2, (16, 16)))
    monkeypatch.setattr(lightning.Trainer, "fit", interrupted)
    data = ["--hsi", str(tmp_path / "a.npy"), "--labels", str(tmp_path / "labels.npy"), "--split", "pixels:0.1"]
    command = ["finetune", "--scratch", "--preset", "tiny", "--task", "pixels", "--window", "5", *data]
    out = str(tmp_path / "run")
    assert main([*command, "--out", out]) == 130
    assert capsys.readouterr().err == (
        f"mmmae finetune: interrupted; {out} holds a run that can't go on: remove it, or name another --out\n"
    )


def test_an_output_whose_name_is_not_utf_8_is_written_and_told(tmp_path, capsys):
    page = tmp_path / "\udcff.html"  # the byte 0xff
    assert main(["profile", "tiny", "--html", str(page)]) == 0
    assert "wrote" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
