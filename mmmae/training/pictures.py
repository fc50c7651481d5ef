"""Pictures of reconstructions, which show exactly what the model predicted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mmmae_kernels import patch_embed, patchify
from mmmae_kernels.masked_loss.reference import NORMALIZE_EPSILON, normalize_target

from ..config import MMMAEConfig
from ..data import Batch, collate
from ..data.subjects import Subjects
from ..files import write_atomically
from ..model.fast import FastModel
from ..model.inputs import Output, decoded_ids
from ..model.resize import resize
from ..text import figure_text

GREY = 0.5  # for what the model was not shown, or did not predict
MOST_ROWS = 6  # spectral groups that a picture of embeddings shows


def draw(model: FastModel, subjects: Subjects, *, seed: int = 0, rgb: tuple[int, int, int] | None = None) -> Figure:
    """Draw the reconstruction of the first subject.

    For `target="pixels"`: input, masked input, reconstruction, error, and spectra of three pixels. With
    `target="embedding"` the model predicts no pixels, so the picture shows the predicted embeddings, whose colours are
    the first three principal components of the targets, and their error.

    Args:
        model: in evaluation mode.
        subjects: the first is drawn.
        seed: seed of the mask.
        rgb: bands shown as red, green and blue; None spreads three over the spectrum.
    """
    device = next(model.parameters()).device
    batch = collate([subjects[0]], list(subjects.modalities)).to(device)
    with torch.no_grad():
        output = model(batch.hsi, batch.aux, batch.present, batch.valid, seed=seed)
    draw_target = draw_pixels if model.config.target == "pixels" else draw_embeddings
    return draw_target(model, subjects, batch, output, rgb)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def draw_pixels(
    model: FastModel, subjects: Subjects, batch: Batch, output: Output, rgb: tuple[int, int, int] | None
) -> Figure:
    """Draw input, masked input, reconstruction and error of one subject, and spectra of three of its pixels."""
    config = model.config
    volume = resize(batch.hsi, config.image_size)
    restored = restore(config, volume, output)[0, 0]  # [T, H, W]
    masked = pixel_mask(config, output.mask.ids_masked)[0, 0]
    decoded = pixel_mask(config, decoded_ids(config, output.mask))[0, 0]
    cube = volume[0, 0]
    valid = resize(batch.valid.to(torch.float32), config.image_size)[0] >= 0.5
    bands = rgb or spread(config.bands)
    low, high = contrast(cube[list(bands)], valid)

    def colours(image: Tensor, hidden: Tensor | None = None) -> np.ndarray:
        shown = ((image[list(bands)] - low) / (high - low)).clamp(0, 1)
        if hidden is not None:
            shown = torch.where(hidden[list(bands)], GREY, shown)
        return (shown * valid).permute(1, 2, 0).cpu().numpy()

    error = (restored - cube).abs().mul(decoded).sum(0) / decoded.sum(0).clamp(min=1) * valid
    figure = Figure(figsize=(15, 8.2), layout="constrained")
    grid = figure.add_gridspec(2, 12, height_ratios=[1.15, 1])
    panels = [figure.add_subplot(grid[0, 3 * column : 3 * column + 3]) for column in range(4)]
    note = ", with the patches' own mean and variance" if config.normalize_target else ""
    show(panels[0], colours(cube), f"input, bands {', '.join(str(band) for band in bands)}")
    show(panels[1], colours(cube, masked), f"masked input, {output.mask.ids_keep.shape[1]} of {config.tokens} tokens")
    show(panels[2], colours(restored, masked & ~decoded), f"reconstruction{note}")
    drawn = panels[3].imshow(error.cpu().numpy(), cmap="magma")
    panels[3].set_title("mean absolute error of predicted bands, normalised", fontsize=10)
    panels[3].set_axis_off()
    figure.colorbar(drawn, ax=panels[3], shrink=0.8)

    axis = np.arange(config.bands) if subjects.wavelengths is None else subjects.wavelengths.numpy()
    given = subjects.normalization.invert("hsi", cube.cpu()).numpy()
    found = subjects.normalization.invert("hsi", restored.cpu()).numpy()
    for number, (row, column) in enumerate(_three_pixels(valid, config.image_size)):
        for panel in panels[:3]:
            panel.plot(column, row, "o", color=f"C{number}", markeredgecolor="white", markersize=7)
        spectrum = figure.add_subplot(grid[1, 4 * number : 4 * number + 4])
        hidden = decoded[:, row, column].cpu().numpy()
        spectrum.plot(axis, given[:, row, column], color="0.35", marker=".", label="input")
        spectrum.plot(
            axis[hidden], found[hidden, row, column], "o", color=f"C{number}", label="reconstruction (masked)"
        )
        spectrum.set_title(f"pixel row {row}, column {column}", fontsize=10, color=f"C{number}")
        spectrum.set_xlabel("band" if subjects.wavelengths is None else "wavelength (nm)")
        if number == 0:
            spectrum.set_ylabel("before normalisation")
        spectrum.legend(fontsize=8)
    figure.suptitle(f"{figure_text(batch.names[0])}   (reconstruction loss {output.loss_reconstruction.item():.4f})")
    return figure


def draw_embeddings(
    model: FastModel, subjects: Subjects, batch: Batch, output: Output, rgb: tuple[int, int, int] | None
) -> Figure:
    """Draw input, visible tokens, target embeddings, predicted embeddings and their error, one row a spectral group.

    Of more than six groups, six are drawn that are spread evenly over the spectrum.
    """
    config = model.config
    volume = resize(batch.hsi, config.image_size)
    projection = model.patch_embed.proj
    with torch.no_grad():
        target = patch_embed(volume, projection.weight, projection.bias)[0]  # [N, D]
    if config.normalize_target:
        target = normalize_target(target)
    masked_ids, ids = output.mask.ids_masked[0], decoded_ids(config, output.mask)[0]
    centre = target.mean(0)
    centred: Tensor = (target - centre).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].to(target.dtype)  # the three of most variance
    shown = (target - centre) @ axes  # [N, 3]
    low, high = shown.quantile(0.02, 0), shown.quantile(0.98, 0)
    predicted = shown.clone()
    predicted[ids] = (output.prediction[0] - centre) @ axes
    hidden = torch.zeros(config.tokens, dtype=torch.bool, device=shown.device).index_fill(0, masked_ids, True)
    error = torch.zeros_like(shown[:, 0])
    error[ids] = (output.prediction[0] - target[ids]).square().mean(-1)
    unknown = hidden.index_fill(0, ids, False)

    groups, height, width = config.grid
    rows = np.linspace(0, groups - 1, min(groups, MOST_ROWS)).round().astype(int).tolist()
    figure = Figure(figsize=(13, 2.7 * len(rows) + 0.6), layout="constrained")
    panels = figure.subplots(len(rows), 5, squeeze=False)

    def tokens(values: Tensor, group: int) -> np.ndarray:
        return values.reshape(groups, height, width, -1)[group].cpu().numpy()

    def colours(values: Tensor, grey: Tensor | None = None) -> Tensor:
        scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return scaled if grey is None else torch.where(grey[:, None], GREY, scaled)

    top = float(error.quantile(0.99))  # so that a small bright spot does not darken the rest
    for row, group in enumerate(rows):
        band = min(group * config.patch[0] + config.patch[0] // 2, config.bands - 1)
        show(panels[row, 0], volume[0, 0, band].cpu().numpy(), f"input, band {band}")
        show(panels[row, 1], tokens(colours(shown, hidden), group), "visible tokens")
        show(panels[row, 2], tokens(colours(shown), group), "target embeddings")
        show(panels[row, 3], tokens(colours(predicted, unknown), group), "predicted embeddings")
        drawn = panels[row, 4].imshow(tokens(error, group)[..., 0], cmap="magma", vmin=0, vmax=top)
        panels[row, 4].set_title("squared error", fontsize=10)
        panels[row, 4].set_axis_off()
        figure.colorbar(drawn, ax=panels[row, 4], shrink=0.8, extend="max")
    loss = f"reconstruction loss {output.loss_reconstruction.item():.4f}"
    colours_are = "colours: three principal components of the targets"
    left_out = f"; {len(rows)} of {groups} groups of bands" if len(rows) < groups else ""
    figure.suptitle(f"{figure_text(batch.names[0])}   ({loss}; {colours_are}{left_out})")
    return figure


def restore(config: MMMAEConfig, volume: Tensor, output: Output) -> Tensor:
    """Return the resized volume `[B, C, T, H, W]` with the predicted patches in place, for `target="pixels"`.

    If targets were normalised, predictions are scaled back by the mean and variance of the patches.
    """
    predicted, ids = output.prediction, decoded_ids(config, output.mask)
    if config.normalize_target:
        target = patchify(volume, config.patch, ids)
        scale = (target.var(-1, keepdim=True) + NORMALIZE_EPSILON).sqrt()
        predicted = predicted * scale + target.mean(-1, keepdim=True)
    rows = patchify(volume, config.patch)  # [B, N, P]
    return unpatchify(rows.scatter(1, ids[:, :, None].expand_as(predicted), predicted), config)


def pixel_mask(config: MMMAEConfig, ids: Tensor) -> Tensor:
    """Return a bool mask `[B, C, T, H, W]` of the pixels of the tokens `ids` `[B, M]`."""
    chosen = torch.zeros(len(ids), config.tokens, dtype=torch.bool, device=ids.device).scatter(1, ids, True)
    pixels = config.in_channels * math.prod(config.patch)
    return unpatchify(chosen[:, :, None].expand(-1, -1, pixels), config)


def unpatchify(rows: Tensor, config: MMMAEConfig) -> Tensor:
    """Convert patches `[B, N, C*pt*ph*pw]` to `[B, C, T, H, W]`, the inverse of `mmmae_kernels.patchify`."""
    groups, height, width = config.grid
    pt, ph, pw = config.patch
    blocks = rows.reshape(len(rows), groups, height, width, config.in_channels, pt, ph, pw)
    volume = blocks.permute(0, 4, 1, 5, 2, 6, 3, 7)
    return volume.reshape(len(rows), config.in_channels, config.bands, config.image_size, config.image_size)


def spread(bands: int) -> tuple[int, int, int]:
    """Return three bands spread over the spectrum, the longest wavelength first, as red."""
    return bands * 5 // 6, bands // 2, bands // 6


def check_rgb(rgb: tuple[int, int, int] | None, bands: int) -> None:
    """Raise ValueError if `rgb` names a band that does not exist; None names none."""
    if rgb is not None and not all(0 <= band < bands for band in rgb):
        raise ValueError(f"rgb is {rgb}, expected bands 0..{bands - 1}")


def contrast(image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 2nd and 98th percentile of each band over the valid pixels, `[C, 1, 1]` each."""
    pixels = image[:, valid] if bool(valid.any()) else image.flatten(1)
    low, high = pixels.quantile(0.02, dim=1), pixels.quantile(0.98, dim=1)
    return low[:, None, None], torch.maximum(high, low + 1e-6)[:, None, None]


def _three_pixels(valid: Tensor, size: int) -> list[tuple[int, int]]:
    """Return three valid pixels (row, column) that are far apart."""
    inside = valid.nonzero()
    if len(inside) < 3:
        return [(size // 2, size // 2), (size // 4, size // 4), (3 * size // 4, 3 * size // 4)]
    places = []
    for row, column in ((0.3, 0.3), (0.5, 0.65), (0.72, 0.4)):
        wanted = torch.tensor([row * size, column * size], device=valid.device)
        nearest = inside[(inside - wanted).square().sum(1).argmin()]
        places.append((int(nearest[0]), int(nearest[1])))
    return places


def show(panel: Axes, image: np.ndarray, title: str) -> None:
    """Draw an image with a title, and no axes."""
    panel.imshow(image, cmap="gray")
    panel.set_title(title, fontsize=10)
    panel.set_axis_off()
