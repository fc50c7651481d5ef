"""Pictures show exactly what the model predicted, and where."""

import re

import numpy as np
import pytest
import torch

import mmmae
from mmmae.data import collate
from mmmae.model.inputs import decoded_ids
from mmmae.phantom import Phantom
from mmmae.training.pictures import GREY, draw, draw_embeddings, draw_pixels, save_figure, unpatchify
from mmmae_kernels import patch_embed, patchify
from mmmae_kernels.masked_loss.reference import normalize_target

SUBJECTS = Phantom(2, 32, 12)


def drawn(target, change, normalize=False, fraction=1.0):
    """Return the panels of a picture as arrays, and the output drawn, for predictions of the target plus `change`."""
    config = {"image_size": 32, "patch": (3, 8, 8), "target": target, "normalize_target": normalize}
    model = mmmae.fast_model("tiny", **config, decode_fraction=fraction).eval()
    batch = collate([SUBJECTS[0]], list(SUBJECTS.modalities))
    with torch.no_grad():
        output = model(batch.hsi, batch.aux, batch.present, batch.valid, seed=0)
        ids = decoded_ids(model.config, output.mask)
        wanted = patchify(batch.hsi, (3, 8, 8), ids)
        if target == "embedding":
            projection = model.patch_embed.proj
            wanted = patch_embed(batch.hsi, projection.weight, projection.bias, ids)
    if normalize:
        wanted = normalize_target(wanted)
    draw = draw_pixels if target == "pixels" else draw_embeddings
    figure = draw(model, SUBJECTS, batch, output._replace(prediction=wanted + change), None)
    return figure, batch, output


def images(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def masked_bands(output):
    """Return a mask `[12, 32, 32]` of the pixels that the model was not shown."""
    return bands_of(output.mask.ids_masked[0])


def bands_of(ids):
    """Return a mask `[12, 32, 32]` of the pixels of tokens."""
    tokens = torch.zeros(64, dtype=torch.bool)
    tokens[ids] = True
    grid = tokens.view(4, 4, 4)
    return grid.repeat_interleave(3, 0).repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()


def test_unpatchify_undoes_patchify():
    config = mmmae.MMMAEConfig.preset("tiny", image_size=48, patch=(4, 8, 16), in_channels=2, aux={})
    volume = torch.randn(2, 2, 12, 48, 48)
    assert torch.equal(unpatchify(patchify(volume, config.patch), config), volume)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_perfect_prediction_of_pixels_looks_like_the_input(normalize):
    figure, batch, output = drawn("pixels", 0.0, normalize)
    shown, masked, restored, error = images(figure)
    assert np.allclose(restored, shown, atol=1e-5)
    assert np.abs(error).max() < 1e-5
    hidden = masked_bands(output)[[10, 6, 2]].transpose(1, 2, 0)
    seen = batch.valid[0].numpy()[:, :, None] & np.ones_like(hidden)
    assert np.all(masked[hidden & seen] == GREY)
    assert np.array_equal(masked[~hidden], shown[~hidden])
    for axes in figure.axes[-3:]:
        line, points = axes.lines
        places = np.searchsorted(line.get_xdata(), points.get_xdata())
        row, column = map(int, re.findall(r"\d+", axes.get_title()))
        assert places.tolist() == np.flatnonzero(masked_bands(output)[:, row, column]).tolist() != []
        assert np.allclose(points.get_ydata(), line.get_ydata()[places], rtol=1e-4)


def test_a_wrong_prediction_of_pixels_shows_its_error_where_it_was_made():
    figure, batch, output = drawn("pixels", 0.5)
    shown, _, restored, error = images(figure)
    hidden, seen = masked_bands(output), batch.valid[0].numpy()
    assert np.allclose(error, 0.5 * (hidden.any(0) & seen), atol=1e-5)
    visible = ~hidden[[10, 6, 2]].transpose(1, 2, 0)
    assert np.array_equal(restored[visible], shown[visible])
    assert np.abs(restored - shown)[~visible].max() > 0.1
    spectra = SUBJECTS.normalization.invert("hsi", batch.hsi[0, 0] + 0.5).numpy()
    for axes in figure.axes[-3:]:
        line, points = axes.lines
        places = np.searchsorted(line.get_xdata(), points.get_xdata())
        row, column = map(int, re.findall(r"\d+", axes.get_title()))
        assert np.allclose(points.get_ydata(), spectra[places, row, column], rtol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings_are_shown_as_predicted(normalize):
    figure, _, output = drawn("embedding", 0.0, normalize)
    rows = [images(figure)[start : start + 5] for start in range(0, 20, 5)]
    for _, visible, target, predicted, error in rows:
        assert np.allclose(predicted, target, atol=1e-4)
        assert np.abs(error).max() < 1e-5
        assert np.all((visible == GREY).all(-1) | np.isclose(visible, target).all(-1))
    figure, _, output = drawn("embedding", 0.5, normalize)
    errors = np.stack([images(figure)[start + 4] for start in range(0, 20, 5)]).flatten()
    masked = np.zeros(64, dtype=bool)
    masked[output.mask.ids_masked[0].numpy()] = True
    assert np.allclose(errors, 0.25 * masked, atol=1e-4)


def test_what_was_not_predicted_is_grey_and_has_no_error():
    figure, batch, output = drawn("pixels", 0.5, fraction=0.5)
    shown, _, restored, error = images(figure)
    decoded = bands_of(output.mask.ids_masked[0, :24])
    seen = batch.valid[0].numpy()
    assert output.prediction.shape[1] == 24
    assert np.allclose(error, 0.5 * (decoded.any(0) & seen), atol=1e-5)
    unknown = (masked_bands(output) & ~decoded)[[10, 6, 2]].transpose(1, 2, 0)
    assert np.all(restored[unknown & seen[:, :, None]] == GREY)
    visible = ~masked_bands(output)[[10, 6, 2]].transpose(1, 2, 0)
    assert np.array_equal(restored[visible], shown[visible])

    figure, _, output = drawn("embedding", 0.5, fraction=0.5)
    rows = [images(figure)[start : start + 5] for start in range(0, 20, 5)]
    decoded, unknown = torch.zeros(2, 64, dtype=torch.bool)
    decoded[output.mask.ids_masked[0, :24]], unknown[output.mask.ids_masked[0, 24:]] = True, True
    assert np.allclose(np.stack([row[4] for row in rows]).flatten(), 0.25 * decoded.numpy(), atol=1e-4)
    assert np.all(np.stack([row[3] for row in rows]).reshape(64, 3)[unknown.numpy()] == GREY)


def test_a_picture_of_many_groups_of_bands_shows_six_over_the_whole_spectrum_and_says_so():
    subjects = Phantom(1, 32, 60)
    model = mmmae.fast_model("tiny", image_size=32, patch=(3, 8, 8), bands=60).eval()
    figure = draw(model, subjects)
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title.startswith("input")] == [
        f"input, band {band}" for band in (1, 13, 25, 34, 46, 58)
    ]
    assert "6 of 20 groups of bands" in figure.get_suptitle()
    assert figure.get_figheight() < 20


@pytest.mark.parametrize("target", ["embedding", "pixels"])
@pytest.mark.usefixtures("whole_runs")
def test_a_picture_is_saved_as_png(tmp_path, target):
    model = mmmae.fast_model("tiny", image_size=32, patch=(3, 8, 8), target=target).eval()
    save_figure(draw(model, SUBJECTS), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
