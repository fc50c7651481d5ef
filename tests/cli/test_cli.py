"""The command line as its user meets it: output, exit status, and one line for what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mmmae.cli import main
from mmmae.cli.finetune import held_out
from mmmae.phantom import Phantom

pytestmark = pytest.mark.usefixtures("quick_runs")
SMALL = ["--set", "image_size=32", "--set", "patch=3,8,8", "--steps", "4", "--batch", "2"]


def cubes(folder, count=3, bands=12, size=32):
    folder.mkdir()
    for number in range(count):
        cube = np.random.default_rng(number).normal(size=(bands, size, size)).astype(np.float32)
        np.save(folder / f"subject{number}.npy", cube)
    return folder


def test_pretraining_alone_runs_on_the_phantom_and_says_that_it_is_generated(whole_runs, tmp_path, capsys):
    assert main(["pretrain", "--out", str(tmp_path / "run"), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "generated" in printed
    assert "preset tiny" in printed
    assert (tmp_path / "run" / "reconstruction.png").stat().st_size > 0


def test_pretraining_reads_folders_and_bands_of_files(tmp_path, capsys):
    hsi, radar = cubes(tmp_path / "hsi"), cubes(tmp_path / "radar", count=2, bands=2)
    command = ["pretrain", "--preset", "tiny", "--hsi", str(hsi), "--aux", f"vv={radar}:0", "--aux", f"both={radar}"]
    assert main([*command, "--out", str(tmp_path / "run"), "--target", "pixels", *SMALL]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert config["aux"] == {"vv": 1, "both": 2}
    assert config["target"] == "pixels"
    assert "3 subjects" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hsi", "{folder}/none"], "none"),
        (["--hsi", "{folder}/empty"], "empty"),
        (["--hsi", "{folder}/truncated"], "subject0.npy"),
        (["--hsi", "{folder}/nan"], "subject0.npy"),
        (["--hsi", "{folder}/hsi", "--bands", "0,1"], "2 bands are fewer than the 3 of a patch; choose more by bands="),
        (["--hsi", "{folder}/hsi", "--bands", "0-a"], "bands is '0-a', expected numbers and ranges of bands like"),
        (["--hsi", "{folder}/hsi", "--bands", "0,1,99"], "99"),
        (["--hsi", "{folder}/hsi", "--wavelengths", "500,600,700"], "wavelengths"),
        (["--hsi", "{folder}/hsi", "--aux", "vv"], "--aux is 'vv', expected NAME=DIR or NAME=DIR:BANDS"),
        (["--hsi", "{folder}/hsi", "--aux", "vv={folder}/none"], "none"),
        (["--hsi", "{folder}/hsi", "--batch", "9"], "batch is 9, expected at most the number of subjects, 3"),
        (["--aux", "vv=x"], "--aux needs --hsi"),
        (["--set", "depth=0"], "depth is 0, expected a whole number >= 1"),
        (["--set", "depth"], "--set is 'depth', expected FIELD=VALUE"),
        (["--set", "colour=3"], "unknown field 'colour'"),
        (["--steps", "0"], "steps is 0"),
        (["--rgb", "1,2"], "--rgb has 2 bands, expected three"),
        (["--set", "aux={}"], "--set aux can't be chosen: it follows from --aux"),
        (["--set", "in_channels=2"], "--set in_channels can't be chosen"),
        (["--hsi", "{folder}/hsi", "--set", "bands=6"], "--set bands can't be chosen"),
        (["--hsi", "{folder}/hsi", "--aux", "type={folder}/hsi"], "not 'type'"),
        (["--device", "cuda:9"], "device is 'cuda:9', which can't be used"),
        (["--rgb", "1,2,30"], "expected bands 0..11"),
        (["--resume", "{folder}/none.ckpt"], "none.ckpt: no such checkpoint"),
        (["--out", "{folder}/hsi/subject0.npy"], "subject0.npy: is not a folder"),
        (["--out", "{folder}/hsi/subject0.npy/run"], "subject0.npy is not a folder"),
        (["--out", "/proc/run"], "/proc/run: can't write into /proc"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_status_two_and_writes_nothing(tmp_path, capsys, options, message):
    cubes(tmp_path / "hsi")
    (tmp_path / "empty").mkdir()
    truncated = cubes(tmp_path / "truncated") / "subject0.npy"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    broken = np.load(cubes(tmp_path / "nan") / "subject0.npy")
    broken[0, 0, 0] = np.nan
    np.save(tmp_path / "nan" / "subject0.npy", broken)
    out = tmp_path / "run"
    options = [option.replace("{folder}", str(tmp_path)) for option in options]
    assert main(["pretrain", "--preset", "tiny", "--out", str(out), *SMALL[:4], *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmmae pretrain: ")
    assert error.count("\n") == 1
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("shape", "size", "patch"),
    [((12, 48, 48), 48, "3,8,8"), ((64, 9, 9), 9, "4,9,9")],
    ids=["size that the default images do not fit", "one token a band group"],
)
def test_pretraining_refuses_no_setting_because_of_bands_and_images_that_it_does_not_have(tmp_path, shape, size, patch):
    (tmp_path / "hsi").mkdir()
    for name in "ab":
        np.save(tmp_path / "hsi" / f"{name}.npy", np.random.default_rng(0).random(shape))
    sizes = ["--set", f"image_size={size}", "--set", f"patch={patch}"]
    options = ["--preset", "tiny", *sizes, "--steps", "1", "--batch", "2"]
    data = ["--hsi", str(tmp_path / "hsi")]
    assert main(["pretrain", *data, *options, "--out", str(tmp_path / "run")]) == 0


def test_an_interrupted_run_says_so_and_goes_on_with_its_own_settings(tmp_path, capsys, monkeypatch):
    command = ["pretrain", "--out", str(tmp_path), *SMALL[:4]]
    read, left = Phantom.__getitem__, iter(range(2 * 3 + 1))

    def interrupted(self, index):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Phantom, "__getitem__", interrupted)
        settings = ["--steps", "5", "--batch", "2", "--checkpoint-every", "2", "--learning-rate", "1e-3", "--seed", "3"]
        assert main([*command, *settings]) == 130
    assert "interrupted; the run goes on with --resume auto" in capsys.readouterr().err
    assert main([*command, "--resume", "auto", "--seed", "4"]) == 2
    assert "seed is 4, but the run of" in capsys.readouterr().err
    assert main([*command, "--resume", "auto"]) == 0
    assert "5 steps of 2 subjects" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["learning_rate"] == 1e-3


@pytest.mark.parametrize("variable", ["MMMAE_KERNELS", "MMMAE_ATTENTION"])
def test_a_wrong_name_in_the_environment_is_found_before_anything_is_written(tmp_path, capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "fastest")
    assert main(["pretrain", "--out", str(tmp_path / "run"), *SMALL]) == 2
    assert f"{variable} is 'fastest', must be one of auto, " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_page_that_can_not_be_written_is_refused_before_the_model_is_counted(tmp_path, capsys):
    assert main(["profile", "tiny", "--html", str(tmp_path / "none" / "page.html")]) == 2
    assert "page.html, expected a file in a folder that exists" in capsys.readouterr().err


def test_generated_cubes_that_no_memory_holds_are_refused(tmp_path, capsys):
    assert main(["data", "phantom", str(tmp_path / "new"), "--size", "1000000000", "--subjects", "1"]) == 2
    assert "--size 1000000000 and --bands 12 make cubes of 1.2e+19 values" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_traceback_is_shown_when_asked_for(tmp_path):
    with pytest.raises(ValueError, match="steps is 0"):
        main(["--traceback", "pretrain", "--steps", "0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Unrecognized options: train"),
        (["pretrain", "--learnin-rate", "1"], "--learning-rate"),
        (["pretrain", "--batch", "x"], "--batch: invalid literal for int() with base 10: 'x'"),
        (["pretrain", "--precision", "8"], "invalid choice '8' for argument '--precision'"),
        (["pretrain", "--compile", "fast"], "expected nothing, off or one of default, reduce-overhead"),
        (["finetune", "--scratch", "--class-weights", "x"], "--task"),
        (["data"], "{check, cache, shard, phantom}"),
        (["profile", "tiny", "--json", "--markdown"], "not allowed together"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_can_not_be_read_is_named_and_the_status_is_two(capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_python_dash_m_runs_it_and_unknown_commands_are_refused():
    run = subprocess.run([sys.executable, "-m", "mmmae", "train"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "Unrecognized options: train" in run.stderr
    assert "pretrain" in run.stderr


SCENES = Path(os.environ.get("MMMAE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "terramesh"


@pytest.mark.skipif(not SCENES.is_dir(), reason=f"needs the TerraMesh scenes at MMMAE_DATA (now {SCENES.parent})")
def test_tiny_learns_from_the_real_scenes_one_of_which_lacks_its_radar_image(with_pictures, tmp_path):
    radar = tmp_path / "radar"
    radar.mkdir()
    for path in sorted((SCENES / "S1RTC").glob("*.tif"))[1:]:
        (radar / path.name).symlink_to(path)
    command = ["pretrain", "--preset", "tiny", "--target", "pixels", "--steps", "30", "--batch", "5"]
    folders = ["--hsi", str(SCENES / "S2L2A"), "--aux", f"vv={radar}:0", "--aux", f"vh={radar}:1"]
    out = tmp_path / "run"
    assert (
        main([*command, *folders, "--aux", f"dem={SCENES / 'DEM'}", "--learning-rate", "3e-3", "--out", str(out)]) == 0
    )
    rows = (out / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("loss_reconstruction")
    losses = [float(value) for value in (row.split(",")[column] for row in rows[1:]) if value]
    assert losses[-1] < 2 / 3 * losses[0]
    assert (out / "reconstruction.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("0.25", 0.25),
        ("a", ["a"]),
        ("a, b", ["a", "b"]),
        ("a,b,c", ["a,b", "c"]),
        ("c,a,b", ["c", "a,b"]),
        ("x,1.5", ["x", "1.5"]),
    ],
)
def test_names_to_hold_out_may_hold_commas(text, held):
    names = ["a", "b", "c", "a,b"] if "c" in text else ["a", "b"]
    assert held_out(text, SimpleNamespace(names=names, positions=())) == held
