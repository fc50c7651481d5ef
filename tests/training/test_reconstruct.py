"""Reconstructions of a folder: pictures, and the errors of predicted pixels."""

import csv
import locale

import pytest
import torch

import mmmae
from mmmae.cli import main
from mmmae.data import collate
from mmmae.model.inputs import decoded_ids
from mmmae.phantom import Phantom
from mmmae.training.inference.encode import encode
from mmmae.training.inference.reconstruct import ALL, reconstruct
from mmmae_kernels import patch_embed, patchify

FIELDS = {"image_size": 32, "patch": (3, 8, 8)}


def table(folder):
    with (folder / "errors.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("normalize", [False, True])
def test_errors_of_pixels_are_those_of_a_plain_loop(tmp_path, normalize):
    model = mmmae.fast_model("tiny", **FIELDS, target="pixels", normalize_target=normalize)
    subjects = Phantom(2, 32)
    reconstruct(model, subjects, tmp_path, seed=5)
    rows = table(tmp_path)
    assert len(rows) == 3 * 12
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{name}.png" for name in subjects.names]
    half = torch.tensor([(high - low) / 2 for low, _, high in subjects.normalization.percentiles["hsi"]])
    every = {band: [] for band in range(12)}
    for index, name in enumerate(subjects.names):
        batch = collate([subjects[index]], list(subjects.modalities))
        with torch.no_grad():
            output = model(batch.hsi, batch.aux, batch.present, batch.valid, seed=5 * 2**32 + index)
        ids = decoded_ids(model.config, output.mask)
        target, found = patchify(batch.hsi, (3, 8, 8), ids)[0], output.prediction[0]
        if normalize:
            found = found * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
        errors = {band: [] for band in range(12)}
        for token, error in zip(ids[0].tolist(), (found - target).view(-1, 3, 8, 8), strict=True):
            group, row, column = token // 16, token // 4 % 4, token % 4
            inside = batch.valid[0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            for band in range(3):
                errors[3 * group + band].append(error[band][inside])
        for band in range(12):
            all_of = torch.cat(errors[band]).double()
            every[band].append(all_of)
            row = rows[12 * index + band]
            assert (row["subject"], int(row["band"]), int(row["pixels"])) == (name, band, len(all_of))
            compare(row, all_of, float(half[band]))
            assert float(row["wavelength_nm"]) == pytest.approx(float(subjects.wavelengths[band]), abs=1e-3)
    for band in range(12):
        row = rows[24 + band]
        assert row["subject"] == ALL
        compare(row, torch.cat(every[band]), float(half[band]))


def compare(row, errors, scale):
    rmse, mae = errors.square().mean().sqrt(), errors.abs().mean()
    assert float(row["rmse_normalised"]) == pytest.approx(float(rmse), rel=1e-4)
    assert float(row["mae_normalised"]) == pytest.approx(float(mae), rel=1e-4)
    assert float(row["rmse"]) == pytest.approx(float(rmse) * scale, rel=1e-4)
    assert float(row["mae"]) == pytest.approx(float(mae) * scale, rel=1e-4)


def test_errors_of_embeddings_add_up_to_the_loss(tmp_path):
    model = mmmae.fast_model("tiny", **FIELDS)
    subjects = Phantom(3, 32)
    reconstruct(model, subjects, tmp_path, first=2)
    rows = table(tmp_path)
    assert [row["bands"] for row in rows[:4]] == ["0-2", "3-5", "6-8", "9-11"]
    assert len(rows) == 3 * 4
    assert len(list(tmp_path.glob("*.png"))) == 2
    batch = collate([subjects[1]], list(subjects.modalities))
    with torch.no_grad():
        output = model(batch.hsi, batch.aux, batch.present, batch.valid, seed=1)
    tokens = [(int(row["tokens"]), float(row["rmse"])) for row in rows[4:8]]
    total = sum(count for count, _ in tokens)
    loss = sum(count * rmse**2 for count, rmse in tokens) / total
    assert loss == pytest.approx(output.loss_reconstruction.item(), rel=1e-4)
    projection = model.patch_embed.proj
    ids = decoded_ids(model.config, output.mask)
    target = patch_embed(batch.hsi, projection.weight, projection.bias, ids)
    assert total <= target.shape[1]


def test_the_command_reads_a_models_folder_and_masks_as_much_as_it_is_told(tmp_path, capsys):
    model = mmmae.fast_model("tiny", **FIELDS, target="pixels")
    model.save_pretrained(tmp_path / "model")
    assert main(["data", "phantom", str(tmp_path / "data"), "--subjects", "3", "--size", "32"]) == 0
    data = ["--hsi", str(tmp_path / "data" / "hsi"), "--aux", f"ir={tmp_path / 'data' / 'ir'}"]
    command = ["reconstruct", "--model", str(tmp_path / "model"), *data, "--first", "1"]
    pixels = {}
    for ratio in ("0.25", "0.75"):
        assert main([*command, "--out", str(tmp_path / ratio), "--mask-ratio", ratio]) == 0
        pixels[ratio] = sum(int(row["pixels"]) for row in table(tmp_path / ratio) if row["subject"] == ALL)
    assert 2 * pixels["0.25"] < pixels["0.75"]
    assert "phantom-0-00000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("subjects", "arguments", "message"),
    [
        (Phantom(0, 32), {}, "there are no subjects"),
        (Phantom(1, 32, 6), {}, "the subjects have 6 bands, the model takes 12"),
        (Phantom(1, 32, aux=("ir", "af")), {}, "the subjects have 'af' with 1 channels, the model has ir"),
        (Phantom(1, 32, aux=("ir",)), {"first": 0}, "first is 0"),
        (Phantom(1, 32, aux=("ir",)), {"rgb": (0, 1, 12)}, r"expected bands 0\.\.11"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, subjects, arguments, message):
    model = mmmae.fast_model("tiny", **FIELDS, aux={"ir": 1})
    with pytest.raises(ValueError, match=message):
        reconstruct(model, subjects, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_errors_are_written_in_utf_8_whatever_the_locale_is(tmp_path):
    subjects, before = Phantom(1, 32), locale.setlocale(locale.LC_CTYPE)
    subjects.names[0] = "grün"
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        reconstruct(mmmae.fast_model("tiny", **FIELDS), subjects, tmp_path)
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert "grün" in (tmp_path / "errors.csv").read_text(encoding="utf-8")


def test_a_name_that_leads_out_of_the_folder_is_refused_before_any_work(tmp_path):
    subjects = Phantom(2, 32)
    subjects.names[1] = "../../outside"
    with pytest.raises(ValueError, match=r"subject '\.\./\.\./outside': its name can't be that of a file"):
        reconstruct(mmmae.fast_model("tiny", **FIELDS), subjects, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_subjects_is_not_replaced(tmp_path):
    picture, cubes = tmp_path / "phantom-0-00001.png", tmp_path / "cubes.npz"

    class Files(Phantom):
        def files(self, index):
            return {"hsi": cubes, "ir": picture if index == 1 else tmp_path / "missing.png"}

    for path in (picture, cubes):
        path.write_bytes(b"given")
    model, message = mmmae.fast_model("tiny", **FIELDS), r"would replace .*, which is read; name another --out"
    with pytest.raises(ValueError, match=message):
        reconstruct(model, Files(2, 32), tmp_path)
    with pytest.raises(ValueError, match=message):
        encode(model.hsi_encoder(), Files(2, 32), cubes)
    assert (picture.read_bytes(), cubes.read_bytes()) == (b"given", b"given")
