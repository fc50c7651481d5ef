"""Spectral positions that are initialised from wavelengths, and moved to other wavelengths."""

import itertools

import numpy as np
import pytest
import torch

import mmmae
from mmmae.cli import main
from mmmae.data import PairedFolder
from mmmae.model.position import interpolate, mean_wavelengths, move_spectral, wavelength_embedding
from mmmae.phantom import write_phantom

TWELVE = tuple(float(nm) for nm in np.linspace(430, 2190, 12))
SIXTY = tuple(float(nm) for nm in np.linspace(400, 2400, 60))
FIELDS = {"image_size": 32, "patch": (3, 8, 8), "aux_patch": 8, "aux": {"ir": 1}}


def config_of(**fields):
    return mmmae.MMMAEConfig.preset("tiny", **{**FIELDS, **fields})


@pytest.fixture
def learned():
    """Make a model whose spectral positions differ from their initial values."""
    torch.manual_seed(0)
    model = mmmae.fast_model(config_of(wavelengths=TWELVE))
    with torch.no_grad():
        for parameter in (model.pos_embed_spectral, model.decoder_pos_embed_spectral):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def test_positions_start_from_wavelengths_and_nothing_else_changes():
    models = []
    for make, wavelengths in itertools.product((mmmae.reference_model, mmmae.fast_model), (None, TWELVE)):
        torch.manual_seed(3)
        models.append(dict(make(config_of(wavelengths=wavelengths)).named_parameters()))
    plain, with_wavelengths, fast_plain, fast_with_wavelengths = models
    for name in plain:
        assert torch.equal(plain[name], fast_plain[name])
        assert torch.equal(with_wavelengths[name], fast_with_wavelengths[name])
        assert torch.equal(plain[name], with_wavelengths[name]) == (not name.endswith("pos_embed_spectral"))
    for name, dim in (("pos_embed_spectral", 64), ("decoder_pos_embed_spectral", 32)):
        assert torch.equal(with_wavelengths[name], wavelength_embedding(TWELVE, 3, dim))
        assert with_wavelengths[name].requires_grad


def test_an_encoder_starts_from_wavelengths_too():
    encoder = mmmae.HSIEncoder(config_of(wavelengths=TWELVE))
    assert torch.equal(encoder.pos_embed_spectral, wavelength_embedding(TWELVE, 3, 64))


def test_the_sinusoids_are_as_large_as_positions_that_are_drawn():
    embedding = wavelength_embedding(SIXTY, 3, 64)
    assert embedding.shape == (1, 20, 64)
    assert embedding.square().mean().sqrt() == pytest.approx(0.02)  # sin^2 + cos^2 is 1 in each pair
    assert wavelength_embedding(SIXTY, 3, 33).shape == (1, 20, 33)


def test_near_wavelengths_have_near_embeddings():
    table = wavelength_embedding((500.0, 510.0, 600.0, 1500.0), 1, 64)[0]
    first, near, far, further = torch.nn.functional.normalize(table, dim=1)
    assert 1 > first @ near > first @ far > first @ further


def test_a_token_lies_at_the_mean_of_its_bands():
    assert mean_wavelengths((400.0, 410.0, 450.0, 500.0, 510.0, 520.0), 3).tolist() == [420.0, 510.0]


def test_interpolation_is_linear_between_and_constant_beyond():
    rows = torch.tensor([[0.0, 10.0], [1.0, 10.0], [5.0, 30.0]], dtype=torch.float64)
    known = torch.tensor([100.0, 200.0, 600.0], dtype=torch.float64)
    wanted = torch.tensor([50.0, 100.0, 125.0, 200.0, 500.0, 600.0, 900.0], dtype=torch.float64)
    result = interpolate(rows, known, wanted)
    for column in range(2):
        expected = np.interp(wanted.numpy(), known.numpy(), rows[:, column].numpy())
        assert torch.allclose(result[:, column], torch.from_numpy(expected))
    assert torch.equal(interpolate(rows[:1], known[:1], wanted), rows[:1].expand(7, 2))
    twice = interpolate(rows, torch.tensor([100.0, 100.0, 600.0], dtype=torch.float64), wanted)
    assert twice.isfinite().all()


def test_what_was_learned_moves_with_the_wavelengths():
    start = wavelength_embedding(TWELVE, 3, 64)
    centres = mean_wavelengths(TWELVE, 3)
    slope = torch.randn(64, dtype=torch.float64)
    spectral = (start + (centres - 1000)[None, :, None] / 1000 * slope).float()
    moved = move_spectral(spectral, TWELVE, SIXTY) - wavelength_embedding(SIXTY, 3, 64)
    held = mean_wavelengths(SIXTY, 3).clamp(centres.min(), centres.max())
    expected = (held - 1000)[:, None] / 1000 * slope
    assert (moved[0] - expected).abs().max() < 1e-6  # float32 of values below 4


def test_the_order_of_bands_does_not_matter():
    spectral = torch.randn(1, 4, 8)
    backwards = move_spectral(spectral.flip(1), TWELVE[::-1], SIXTY)
    assert torch.allclose(backwards, move_spectral(spectral, TWELVE, SIXTY), atol=1e-6)


def test_an_untrained_model_has_the_start_of_any_wavelengths():
    model = mmmae.fast_model(config_of(wavelengths=TWELVE))
    encoder = model.hsi_encoder(bands=60, wavelengths=SIXTY)
    assert torch.allclose(encoder.pos_embed_spectral, wavelength_embedding(SIXTY, 3, 64), atol=1e-8)


def test_twelve_bands_become_sixty(learned, tmp_path):
    learned.hsi_encoder().save_pretrained(tmp_path / "encoder")
    learned.save_pretrained(tmp_path / "model")
    fields = {"bands": 60, "wavelengths": list(SIXTY)}
    encoder = learned.hsi_encoder(**fields)
    assert encoder.config.wavelengths == SIXTY
    assert torch.equal(encoder.pos_embed_spectral, move_spectral(learned.pos_embed_spectral, TWELVE, SIXTY))
    hsi = torch.randn(2, 1, 60, 32, 32)
    for folder in ("encoder", "model"):
        read = mmmae.HSIEncoder.from_pretrained(tmp_path / folder, **fields)
        assert torch.equal(read(hsi), encoder(hsi))
    model = mmmae.FastModel.from_pretrained(tmp_path / "model", **fields)
    expected = move_spectral(learned.decoder_pos_embed_spectral, TWELVE, SIXTY)
    assert torch.equal(model.decoder_pos_embed_spectral, expected)
    assert model(hsi, seed=0).loss.isfinite()


def test_the_same_wavelengths_change_no_bit(learned, tmp_path):
    learned.save_pretrained(tmp_path)
    again = mmmae.FastModel.from_pretrained(tmp_path, wavelengths=list(TWELVE))
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in learned.state_dict().items())
    assert learned.hsi_encoder(wavelengths=TWELVE).pos_embed_spectral is learned.pos_embed_spectral


def test_other_bands_ask_for_their_wavelengths(learned, tmp_path):
    learned.hsi_encoder().save_pretrained(tmp_path)
    message = "wavelengths is 12 numbers, 430 to 2190, expected one in nm for each of bands = 60"
    with pytest.raises(ValueError, match=message):
        mmmae.HSIEncoder.from_pretrained(tmp_path, bands=60)
    with pytest.raises(ValueError, match=message):
        learned.hsi_encoder(bands=60)
    with pytest.raises(ValueError, match=r"wavelengths is 60 numbers, 400 to 2400, .* bands = 12"):
        learned.hsi_encoder(wavelengths=SIXTY)


def test_wavelengths_given_up_leave_positions_by_number(learned, tmp_path):
    learned.hsi_encoder().save_pretrained(tmp_path)
    encoder = mmmae.HSIEncoder.from_pretrained(tmp_path, bands=24, wavelengths=None)
    assert encoder.config.wavelengths is None
    assert torch.equal(encoder.pos_embed_spectral, mmmae.model.position.resize_spectral(learned.pos_embed_spectral, 8))


def test_weights_pretrained_without_wavelengths_refuse_them(tmp_path):
    model = mmmae.fast_model(config_of())
    model.save_pretrained(tmp_path)
    for read in (
        lambda: model.hsi_encoder(bands=60, wavelengths=SIXTY),
        lambda: mmmae.HSIEncoder.from_pretrained(tmp_path, bands=60, wavelengths=SIXTY),
        lambda: mmmae.FastModel.from_pretrained(tmp_path, bands=60, wavelengths=SIXTY),
    ):
        with pytest.raises(ValueError, match="pretrained without: leave them out"):
            read()


def test_the_command_that_encodes_takes_the_wavelengths_of_its_data(learned, tmp_path):
    learned.hsi_encoder().save_pretrained(tmp_path / "encoder")
    write_phantom(tmp_path / "data", subjects=2, image_size=32, bands=24)
    arguments = ["--hsi", str(tmp_path / "data" / "hsi"), "--adapt-normalization", "--pool", "tokens"]
    out = tmp_path / "features.npz"
    assert main(["encode", "--encoder", str(tmp_path / "encoder"), *arguments, "--out", str(out)]) in (0, None)
    subjects = PairedFolder(tmp_path / "data" / "hsi", image_size=32)
    encoder = learned.hsi_encoder(bands=24, wavelengths=subjects.wavelengths)
    with torch.no_grad():
        expected = encoder(torch.stack([subjects[i].hsi for i in range(2)]))
    assert np.allclose(np.load(out)["features"].reshape(expected.shape), expected, atol=1e-5)
