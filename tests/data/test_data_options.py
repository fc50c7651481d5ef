"""Each combination of data options gives the right data set, or an error that names the options."""

import dataclasses

import numpy as np
import pytest
import torch
import tyro

from mmmae import MMMAEConfig, fast_model
from mmmae.cli import main
from mmmae.cli.options import DataOptions, GeneratedOptions, open_subjects
from mmmae.cli.pretrain import training_subjects
from mmmae.cli.rules import registry
from mmmae.cli.trained import TrainedDataOptions, load_encoder
from mmmae.data import CachedSubjects, Normalization, PairedFolder, ShardedSubjects
from mmmae.data.readers.wavelength_files import read_wavelength_file
from mmmae.model.encoder import HSIEncoder
from mmmae.phantom import Phantom, write_phantom


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files, a cache and shards of three subjects of 32 x 32."""
    folder = tmp_path_factory.mktemp("options")
    write_phantom(folder, subjects=3, image_size=32, missing=0.0)
    for part in ("cache", "shard"):
        files = ["--hsi", str(folder / "hsi"), "--aux", f"ir={folder / 'ir'}", "--aux", f"af={folder / 'af'}"]
        assert main(["data", part, *files, "--out", str(folder / part)]) == 0
    return folder


def parse(folder, *arguments):
    def options(data: DataOptions, generated: GeneratedOptions):
        return data, generated

    words = [argument.format(folder=folder) for argument in arguments]
    return tyro.cli(options, args=words, config=(tyro.conf.OmitArgPrefixes,), registry=registry)


def opened(folder, *arguments, **options):
    """Open the data set that the options name, at the size of `CONFIG`."""
    return open_subjects(parse(folder, *arguments)[0], CONFIG.image_size, **options)


CONFIG = MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), aux={"ir": 1})


def test_files_a_cache_and_shards_are_the_same_subjects(folder):
    files = opened(folder, "--hsi", "{folder}/hsi", "--aux", "ir={folder}/ir", "--aux", "af={folder}/af")
    cached = opened(folder, "--cache", "{folder}/cache")
    sharded = opened(folder, "--shards", "{folder}/shard")
    assert [type(data) for data in (files, cached, sharded)] == [PairedFolder, CachedSubjects, ShardedSubjects]
    for other in (cached, sharded):
        assert other.names == files.names
        assert other.modalities == files.modalities
        assert other[1].hsi.equal(files[1].hsi)


def test_without_files_subjects_are_generated(folder):
    options = parse(folder, "--subjects", "5", "--missing", "0")
    data = training_subjects(*options, "tiny", {"image_size": 32}, seed=7)
    assert isinstance(data, Phantom)
    assert (len(data), len(data.modalities), data.image_size) == (5, 3, (32, 32))
    assert (data.missing, data.seed) == (0.0, 7)


@pytest.mark.parametrize(
    "command",
    [
        ["data", "cache"],
        ["data", "shard"],
        ["encode", "--encoder", "{model}"],
        ["reconstruct", "--model", "{model}"],
        ["finetune", "--encoder", "{model}", "--task", "segmentation", "--labels", "{model}"],
    ],
    ids=lambda command: command[0] + command[1] if command[0] == "data" else command[0],
)
def test_only_pretraining_generates_subjects(tmp_path, capsys, command):
    model, out = tmp_path / "model", tmp_path / "features.npz"
    fast_model(CONFIG).save_pretrained(model)
    assert main([*(part.format(model=model) for part in command), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    name = " ".join(command[:2]) if command[0] == "data" else command[0]
    assert error == f"mmmae {name}: no data are named, expected --hsi, --cache or --shards\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resample", "5nm"], "--resample: expected numbers like 550,612.5, not '5nm'"),
        (["--workers", "a"], "--workers: invalid"),
    ],
)
def test_an_option_of_another_kind_says_what_is_expected(folder, tmp_path, capsys, options, message):
    for command in (["data", "cache"], ["encode", "--encoder", str(tmp_path)]):
        with pytest.raises(SystemExit):
            main([*command, "--hsi", str(folder / "hsi"), "--out", str(tmp_path / "new" / "features.npz"), *options])
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_negative_number_of_workers_is_refused(folder, tmp_path, capsys):
    for command in (["data", "cache"], ["encode", "--encoder", str(tmp_path)]):
        assert main([*command, "--hsi", str(folder / "hsi"), "--out", str(tmp_path / "new"), "--workers", "-1"]) == 2
        assert "--workers is -1, expected a whole number >= 0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tiles_and_spectra_are_taken_as_asked_for(folder):
    tiles = ["--tile", "16", "--overlap", "8"]
    data = opened(folder, "--hsi", "{folder}/hsi", *tiles, "--resample", "500,600,700")
    assert len(data) == 27
    assert data[0].hsi.shape == (1, 3, 32, 32)  # a tile at the encoder's size
    assert data.wavelengths.tolist() == [500, 600, 700]


def test_the_encoders_statistics_are_taken_unless_others_are_named(folder, tmp_path):
    known = PairedFolder(folder / "hsi", bands=[0, 1, 2]).normalization
    known.save(tmp_path / "known.json")
    options, _ = parse(folder, "--hsi", "{folder}/hsi", "--bands", "0,1,2")
    assert open_subjects(options, 32, normalization=tmp_path / "known.json").normalization == known
    assert open_subjects(options, 32, normalization=tmp_path / "none.json")._path is None
    options = dataclasses.replace(options, normalization=tmp_path / "own.json")
    assert open_subjects(options, 32, normalization=tmp_path / "known.json")._path == tmp_path / "own.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hsi", "{folder}/hsi", "--cache", "{folder}/cache"], "--hsi and --cache exclude each other"),
        (["--cache", "{folder}/cache", "--shards", "{folder}/shard"], "--cache and --shards exclude each other"),
        (
            ["--cache", "{folder}/cache", "--aux", "ir={folder}/ir"],
            "--aux needs --hsi, the folder of cubes, not --cache",
        ),
        (["--tile", "16"], "--tile needs --hsi"),
        (["--shards", "{folder}/shard", "--resample", "500"], "--resample needs --hsi"),
        (
            ["--hsi", "{folder}/hsi", "--subjects", "3"],
            "--subjects is for generated subjects, it can't be combined with --hsi",
        ),
        (["--cache", "{folder}/cache", "--missing", "0"], "--missing is for generated subjects"),
        (["--hsi", "{folder}/hsi", "--bands", "0", "--resample", "500"], "--bands and --resample exclude each other"),
        (["--hsi", "{folder}/hsi", "--bands", "0-2", "--wavelengths", "500"], "--bands and --wavelengths exclude each"),
        (
            ["--hsi", "{folder}/hsi", "--bands", "a"],
            "bands is 'a', expected numbers and ranges of bands like 0-189,213",
        ),
        (["--hsi", "{folder}/hsi", "--wavelengths", "none.txt"], "none.txt: no such file; expected wavelengths in nm"),
        (["--hsi", "{folder}/hsi", "--axes", "ir=HWT"], "--axes names 'ir', expected one of hsi"),
        (["--hsi", "{folder}/hsi", "--nodata", "x"], "--nodata is 'x', expected a number, or NAME=NUMBER"),
        (["--hsi", "{folder}/hsi", "--scale", "1", "--scale", "hsi=2"], "--scale is given twice for 'hsi'"),
        (["--cache", "{folder}/cache", "--axes", "HWT"], "--axes needs --hsi"),
        (["--hsi", "{folder}/hsi", "--overlap", "4"], "--overlap needs --tile"),
        (["--hsi", "{folder}/hsi", "--tile", "0"], "tile is 0"),
        (["--cache", "{folder}/hsi"], "index.json: no such file"),
        (["--cache", "{folder}/shard"], "has the format 'mmmae-shards-1', expected 'mmmae-cache-1'"),
        (["--missing", "2"], "missing 2"),
    ],
)
def test_a_wrong_combination_names_the_options(folder, arguments, message):
    data, generated = parse(folder, *arguments)
    with pytest.raises((ValueError, OSError), match=message.replace("(", r"\(")):
        open_subjects(data, 32, generated=generated)


@pytest.mark.parametrize("name", ["a.b", "a/b", "forward"])
def test_a_modality_that_no_model_can_have_is_refused(folder, tmp_path, capsys, name):
    arguments = ["--hsi", str(folder / "hsi"), "--aux", f"{name}={folder / 'ir'}", "--out", str(tmp_path / "cache")]
    assert main(["data", "cache", *arguments]) == 2
    assert f"--aux: config: aux is {{'{name}': 1}}, expected names of letters" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_another_size_says_how_to_write_it(folder):
    with pytest.raises(ValueError, match=r"cache holds cubes of 32 x 32, expected 64 x 64: .*--image-size 64"):
        open_subjects(parse(folder, "--cache", "{folder}/cache")[0], 64)


def test_storing_says_what_it_holds(folder, tmp_path, capsys):
    arguments = ["--hsi", str(folder / "hsi"), "--out", str(tmp_path / "shards"), "--image-size", "16"]
    assert main(["data", "shard", *arguments, "--per-shard", "2"]) == 0
    printed = capsys.readouterr()
    assert "holds PairedFolder" in printed.out
    assert "packed 3/3" in printed.err
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 2
    assert main(["data", "shard", *arguments]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.fixture
def turned(tmp_path):
    """A folder of a cube [H, W, T] without wavelengths, beside another array, and an image of another kind."""
    for folder in ("hsi", "ir"):
        (tmp_path / folder).mkdir()
    cube = np.random.default_rng(0).integers(1, 9, (32, 32, 14)).astype("i2")
    cube[0, 0] = -9999
    np.savez(tmp_path / "hsi" / "a.npz", cube=cube, other=cube)
    np.savez(tmp_path / "ir" / "a.npz", one=cube[..., 0], two=cube[..., 1])
    (tmp_path / "nm.txt").write_text("# centres\n" + "\n".join(str(0.45 + 0.01 * band) for band in range(14)))
    return tmp_path


READING = ["--axes", "HWT", "--dataset", "cube", "--dataset", "ir=two", "--nodata", "-9999", "--nodata", "ir=-9999"]


def test_files_are_read_as_the_options_say(turned):
    cube = np.load(turned / "hsi" / "a.npz")["cube"]
    words = ["--hsi", "{folder}/hsi", "--aux", "ir={folder}/ir", *READING, "--scale", "0.5"]
    data = open_subjects(parse(turned, *words, "--wavelengths", "{folder}/nm.txt")[0], None)
    assert data.wavelengths.tolist() == pytest.approx([450 + 10 * band for band in range(14)])
    assert (~data[0].valid).nonzero().tolist() == [[0, 0]]
    values = data.normalization.invert("hsi", data[0].hsi[0])[:, 1:].numpy()
    np.testing.assert_allclose(values, cube.transpose(2, 0, 1)[:, 1:] * 0.5, rtol=1e-5)
    image = data.normalization.invert("ir", data[0].aux["ir"])[0, 1:].numpy()
    np.testing.assert_allclose(image, cube[1:, :, 1], rtol=1e-5)


def test_the_check_reads_files_as_the_options_say(turned, capsys):
    folders = ["--hsi", str(turned / "hsi"), "--aux", f"ir={turned / 'ir'}"]
    assert main(["data", "check", *folders]) == 1
    assert "--dataset" in capsys.readouterr().out
    assert main(["data", "check", *folders, *READING, "--wavelengths", str(turned / "nm.txt")]) == 0


@pytest.mark.parametrize("option", ["--axes", "--nodata", "--wavelengths"])
def test_the_check_of_a_cache_takes_no_option_of_files(folder, capsys, option):
    assert main(["data", "check", "--cache", str(folder / "cache"), option, "1"]) == 2
    assert f"{option} says how files are read, it can't be combined with --cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.txt", "450, 550;650\n750 # comment, 9", [450, 550, 650, 750]),
        ("a.csv", "\ufeff0.45\n0.55", [450, 550]),
        ("a.hdr", "ENVI\nWavelength Units = Micrometers\nwavelength = {0.45,\n 0.55}", [450, 550]),
        ("a.txt", "450 nm", "is no file of wavelengths"),
        ("a.txt", "-450", "expected positive numbers"),
        ("a.txt", "", "expected positive numbers"),
        (
            "a.hdr",
            "ENVI\nwavelength units = Index\nwavelength = {1, 2}",
            "expected positive numbers in a unit of length",
        ),
        ("a.npy", "450", "is no file of wavelengths"),
    ],
)
def test_wavelengths_are_read_from_a_file(tmp_path, name, content, found):
    (tmp_path / name).write_text(content, encoding="utf-8")
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            read_wavelength_file(tmp_path / name)
    else:
        assert read_wavelength_file(tmp_path / name) == pytest.approx(found)


def test_the_encoders_own_bands_are_used_again(turned, tmp_path, capsys):
    encoder = HSIEncoder(CONFIG.replace(bands=6, aux={}))
    encoder.save_pretrained(tmp_path / "encoder")
    words = ["--hsi", "{folder}/hsi", "--axes", "HWT", "--dataset", "cube"]
    first = open_subjects(parse(turned, *words, "--bands", "2-7")[0], 32)
    first.normalization.save(tmp_path / "encoder" / "normalization.json")

    def loaded(*options):
        data = tyro.cli(
            TrainedDataOptions,
            args=[*(word.format(folder=turned) for word in words), *options],
            config=(tyro.conf.OmitArgPrefixes,),
            registry=registry,
        )
        return load_encoder(data, tmp_path / "encoder")

    for options in ((), ("--adapt-normalization",)):
        model, subjects = loaded(*options)
        assert model.config.bands == subjects.bands == 6
        assert torch.equal(subjects[0].hsi, first[0].hsi)
    assert "its position embeddings are resized" not in capsys.readouterr().out
    with pytest.warns(
        UserWarning, match="11 bands are no multiple of the patch's 3: left out bands 9,10; choose others by"
    ):
        model, subjects = loaded("--bands", "0-10", "--adapt-normalization")
    assert model.config.bands == subjects.bands == 9
    np.savez(turned / "hsi" / "a.npz", cube=np.ones((32, 32, 20)))
    with pytest.raises(ValueError, match="2-7 are bands of files with 14 bands, this file has 20; choose bands by"):
        loaded()


def test_a_cache_of_bands_that_are_no_multiple_of_the_patch_names_the_options(turned, tmp_path):
    words = ["--hsi", str(turned / "hsi"), "--axes", "HWT", "--dataset", "cube", "--out", str(tmp_path / "cache")]
    assert main(["data", "cache", *words]) == 0
    with pytest.raises(ValueError, match=r"the data have 14 bands, expected a multiple of the 3 of a patch: .*--bands"):
        training_subjects(*parse(tmp_path, "--cache", "{folder}/cache"), "tiny", {"image_size": 32}, seed=0)


@pytest.fixture
def scaled(turned):
    """Statistics of the cubes of `turned`, measured with a scale and a nodata value."""
    words = [*READING[:4], "--nodata", "-9999", "--scale", "0.5", "--normalization", "{folder}/statistics.json"]
    data = open_subjects(parse(turned, "--hsi", "{folder}/hsi", *words)[0], None)
    data.normalization  # noqa: B018  # written now
    return data


STATISTICS = ["--normalization", "{folder}/statistics.json", "--hsi", "{folder}/hsi", "--axes", "HWT"]
STATISTICS += ["--dataset", "cube"]


def test_statistics_bring_nodata_and_scale_along(turned, scaled):
    again = open_subjects(parse(turned, *STATISTICS)[0], None)
    assert torch.equal(again[0].hsi, scaled[0].hsi)
    assert torch.equal(again[0].valid, scaled[0].valid)
    assert again.normalization.reading == {"hsi": {"nodata": "-9999.0", "scale": "0.5"}}
    open_subjects(parse(turned, *STATISTICS, "--nodata", "-9999", "--scale", "0.5")[0], None)


@pytest.mark.parametrize(
    ("option", "value", "read"), [("--scale", "2", "nodata -9999.0 and scale 2.0"), ("--nodata", "-1", "nodata -1.0")]
)
def test_another_nodata_or_scale_than_that_of_the_statistics_is_refused(turned, scaled, option, value, read):
    message = rf"statistics.json was measured with nodata -9999.0 and scale 0.5 of .*'hsi', .* with {read}"
    with pytest.raises(ValueError, match=message):
        open_subjects(parse(turned, *STATISTICS, option, value)[0], None)


def test_statistics_without_nodata_and_scale_take_none_and_those_of_others_any(turned):
    words = [*STATISTICS, "--nodata", "-9999"]
    measured = open_subjects(parse(turned, *STATISTICS)[0], None).normalization
    with pytest.raises(ValueError, match=r"was measured with no nodata and no scale .* are read with nodata -9999.0"):
        open_subjects(parse(turned, *words)[0], None)
    Normalization(measured.percentiles, measured.selection).save(turned / "statistics.json")
    open_subjects(parse(turned, *words)[0], None)


@pytest.mark.parametrize(
    ("options", "said", "read"),
    [
        (
            (),
            "read with --nodata hsi=-9999.0 --scale hsi=0.5 as the model's were",
            {"nodata": "-9999.0", "scale": "0.5"},
        ),
        (("--scale", "2"), "read with --nodata hsi=-9999.0 as the model's were", {"nodata": "-9999.0", "scale": "2.0"}),
        (("--nodata", "nan", "--scale", "1"), "measured on these data\n", {"nodata": "nan", "scale": "1.0"}),
    ],
)
def test_adapted_statistics_keep_the_stored_nodata_and_scale(turned, scaled, tmp_path, capsys, options, said, read):
    encoder = HSIEncoder(CONFIG.replace(bands=12, aux={}))
    encoder.save_pretrained(tmp_path / "encoder")
    stored = scaled.normalization
    Normalization(stored.percentiles, {}, stored.reading).save(tmp_path / "encoder" / "normalization.json")
    words = ["--hsi", "{folder}/hsi", *READING[:4], "--bands", "0-11", "--adapt-normalization", *options]
    data = tyro.cli(
        TrainedDataOptions,
        args=[word.format(folder=turned) for word in words],
        config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
    )
    _, subjects = load_encoder(data, tmp_path / "encoder")
    assert said in capsys.readouterr().out
    assert subjects.normalization.reading == {"hsi": read}
