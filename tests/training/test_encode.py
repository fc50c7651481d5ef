"""Features of a folder: the content of the file, independence of other subjects, and the statistics of the input."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import mmmae
from mmmae.cli import main
from mmmae.data import PairedFolder
from mmmae.phantom import Phantom
from mmmae.training.inference.encode import encode

CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), aux={})


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return mmmae.HSIEncoder(CONFIG).eval()


def tokens_of(encoder, subjects):
    with torch.no_grad():
        return torch.cat([encoder(subjects[index].hsi[None]) for index in range(len(subjects))])


def read(path):
    """Return features and names in a file."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["features"]), arrays["names"].tolist()
    with safe_open(path, "pt") as file:
        return file.get_tensor("features"), json.loads(file.metadata()["names"])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("pool", ["mean", "spatial", "tokens"])
def test_both_formats_hold_names_and_features(encoder, tmp_path, suffix, pool):
    subjects = Phantom(5, 32)
    path = tmp_path / f"features{suffix}"
    shape = encode(encoder, subjects, path, pool=pool, batch=2)
    features, names = read(path)
    assert names == subjects.names
    assert features.shape == shape
    grid = tokens_of(encoder, subjects).view(5, 4, 4, 4, 64)
    expected = {"mean": grid.mean((1, 2, 3)), "spatial": grid.mean(1), "tokens": grid}[pool]
    torch.testing.assert_close(features, expected)
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


def test_the_features_of_a_subject_do_not_depend_on_its_batch_mates(encoder, tmp_path):
    found = {}
    for batch, workers in ((1, 0), (2, 0), (5, 2)):
        path = tmp_path / f"{batch}.npz"
        encode(encoder, Phantom(5, 32), path, batch=batch, workers=workers)
        found[batch] = read(path)[0]
    for batch in (2, 5):  # a product of more rows may sum in another order: a few units in the last place of float32
        torch.testing.assert_close(found[batch], found[1], rtol=1e-5, atol=1e-5)


def test_a_name_keeps_its_letters(encoder, tmp_path):
    subjects = Phantom(3, 32)
    subjects.names = ["gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n", "\N{CJK UNIFIED IDEOGRAPH-773C} 2", 'a"b']
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"features{suffix}"
        encode(encoder, subjects, path)
        assert read(path)[1] == subjects.names


def test_a_broken_subject_leaves_the_old_file(encoder, tmp_path):
    class Broken(Phantom):
        def __getitem__(self, index):
            if index == 2:
                raise ValueError("broken")
            return super().__getitem__(index)

    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"features{suffix}"
        path.write_bytes(b"old")
        with pytest.raises(ValueError, match="broken"):
            encode(encoder, Broken(3, 32), path, batch=1)
        assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": "features.csv"}, "expected .safetensors or .npz"),
        ({"out": "folder.npz"}, "is a folder"),
        ({"pool": "max"}, "pool is 'max', must be one of mean, spatial, tokens"),
        ({"batch": 0}, "batch is 0"),
        ({"workers": -1, "out": "new/features.npz"}, "workers is -1, expected a whole number >= 0"),
        ({"device": "quantum"}, "device is 'quantum', which can't be used"),
        ({"device": "cuda:99"}, "device is 'cuda:99', which can't be used"),
        ({"subjects": Phantom(0, 32)}, "there are no subjects"),
        ({"subjects": Phantom(2, 32, 6)}, "the subjects have 6 bands, the model takes 12"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(encoder, tmp_path, arguments, message):
    (tmp_path / "folder.npz").mkdir()
    arguments = {"subjects": Phantom(2, 32), "out": "features.npz", **arguments}
    subjects, out = arguments.pop("subjects"), tmp_path / arguments.pop("out")
    with pytest.raises(ValueError, match=message):
        encode(encoder, subjects, out, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.npz"]


@pytest.fixture
def shifted(tmp_path, encoder):
    """Two folders of the same cubes, one with another gain and offset a band, and the encoder with its statistics."""
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    gain, offset = rng.uniform(0.5, 3, (12, 1, 1)), rng.uniform(-200, 200, (12, 1, 1))
    for number in range(3):
        cube = rng.normal(100, 10, (12, 32, 32))
        np.save(tmp_path / "before" / f"scene{number}.npy", cube)
        np.save(tmp_path / "after" / f"scene{number}.npy", cube * gain + offset)
    encoder.save_pretrained(tmp_path / "encoder")
    PairedFolder(tmp_path / "before").normalization.save(tmp_path / "encoder" / "normalization.json")
    return tmp_path


def test_adapted_statistics_undo_a_gain_and_an_offset_a_band(shifted, capsys):
    def features(data, *options):
        out = shifted / "features.npz"
        command = ["encode", "--encoder", str(shifted / "encoder"), "--hsi", str(shifted / data), "--out", str(out)]
        assert main([*command, *options]) == 0
        return read(out)[0]

    before, after = features("before"), features("after")
    assert "statistics of the input: " + str(shifted / "encoder" / "normalization.json") in capsys.readouterr().out
    assert (after - before).norm() > 0.1 * before.norm()
    adapted = features("after", "--adapt-normalization")
    assert "measured on these data" in capsys.readouterr().out
    # Percentiles are of the same pixels, so normalised values agree up to the rounding of cubes to float32 when read:
    # 200 / 2**24 over a spread of 5 to 60, times what two blocks make of it.
    torch.testing.assert_close(adapted, before, rtol=1e-3, atol=1e-4)


def test_statistics_come_from_the_option_then_from_the_encoder_then_from_the_data(shifted, capsys):
    command = ["encode", "--encoder", str(shifted / "encoder"), "--hsi", str(shifted / "after")]
    command += ["--out", str(shifted / "features.npz")]
    other = shifted / "other.json"
    PairedFolder(shifted / "after").normalization.save(other)
    assert main([*command, "--normalization", str(other)]) == 0
    assert f"statistics of the input: {other}" in capsys.readouterr().out
    assert main([*command, "--normalization", str(other), "--adapt-normalization"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    (shifted / "encoder" / "normalization.json").unlink()
    assert main(command) == 0
    assert "measured on these data, because there are none beside the model" in capsys.readouterr().out


def test_other_bands_are_an_error_that_says_how_to_go_on(shifted, capsys):
    command = ["encode", "--encoder", str(shifted / "encoder"), "--hsi", str(shifted / "before"), "--bands"]
    command += ["0,1,2,3,4,5", "--out", str(shifted / "features.npz")]
    assert main(command) == 2
    assert "--adapt-normalization measures new ones" in capsys.readouterr().err
    assert main([*command, "--adapt-normalization"]) == 0
    assert "trained on 12 bands; its position embeddings are resized for 6" in capsys.readouterr().out
    assert read(shifted / "features.npz")[0].shape == (3, 64)


def test_an_encoder_that_knows_wavelengths_follows_those_of_the_data(tmp_path, capsys):
    (tmp_path / "hsi").mkdir()
    rng = np.random.default_rng(0)
    config = CONFIG.replace(wavelengths=[450.0 + 40 * band for band in range(12)])
    mmmae.HSIEncoder(config).save_pretrained(tmp_path / "encoder")
    command = ["encode", "--encoder", str(tmp_path / "encoder"), "--hsi", str(tmp_path / "hsi")]
    command += ["--out", str(tmp_path / "features.npz")]
    for shift, expected in ((0.0, False), (15.0, True)):
        nm = np.array(config.wavelengths) + shift
        np.savez(tmp_path / "hsi" / "cube.npz", cube=rng.normal(size=(12, 32, 32)), wavelengths=nm)
        assert main(command) == 0
        assert ("at other wavelengths" in capsys.readouterr().out) is expected
    for bands in (6, 12):
        np.savez(tmp_path / "hsi" / "cube.npz", cube=rng.normal(size=(bands, 32, 32)))
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"the encoder knows its 12 bands by wavelength; the {bands} of the data have none" in error


def test_features_that_are_not_finite_are_an_error_that_names_the_subject_and_leave_no_file(tmp_path):
    damaged = mmmae.HSIEncoder(CONFIG)
    with torch.no_grad():
        damaged.norm.weight[0] = torch.nan
    with pytest.raises(
        ValueError, match="subject 'phantom-0-00000': its features are not finite; the cause is in the enc"
    ):
        encode(damaged, Phantom(2, 32), tmp_path / "features.npz", precision="32")
    assert list(tmp_path.iterdir()) == []
