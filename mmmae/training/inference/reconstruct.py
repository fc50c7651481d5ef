"""Reconstructions by a pretrained model: pictures, and errors by band in the units of the files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmae_kernels import patch_embed
from mmmae_kernels.masked_loss.reference import normalize_target

from ...checks import check_whole
from ...config import MMMAEConfig
from ...data import Batch, collate
from ...data.subjects import Subjects
from ...files import check_can_write, file_for, write_atomically
from ...model.fast import FastModel
from ...model.inputs import Output, decoded_ids
from ...model.losses import token_weights
from ...model.resize import resize
from ...precision import Precision, autocast, resolve_precision
from ...text import cell, printable
from ..pictures import check_rgb, draw_embeddings, draw_pixels, pixel_mask, restore, save_figure
from .batches import check_options, check_outputs

ALL = "all subjects"
PIXEL_COLUMNS = ("subject", "band", "wavelength_nm", "pixels", "rmse", "mae", "rmse_normalised", "mae_normalised")
TOKEN_COLUMNS = ("subject", "bands", "tokens", "rmse", "mae")


def reconstruct(
    model: FastModel,
    subjects: Subjects,
    out: str | Path,
    *,
    first: int | None = None,
    seed: int = 0,
    rgb: tuple[int, int, int] | None = None,
    precision: Precision = "auto",
) -> list[dict[str, Any]]:
    """Write a picture of each subject and `errors.csv` into a folder.

    Errors are over the valid pixels of predicted tokens only. With `target="pixels"` there is a row for each band of
    each subject, in the units of the files and normalised; with `target="embedding"` a row for each group of bands,
    with errors of embeddings, which have no unit. The last rows are over all subjects.

    Args:
        model: pretrained; set to evaluation mode.
        subjects: with the bands of the model, and some of its modalities.
        out: the folder; other files in it stay.
        first: number of subjects, from the first on; None means all.
        seed: seed of the masks; the mask of a subject also depends on its number.
        rgb: bands that pictures show as red, green and blue; None spreads three over the spectrum.
        precision: `32`, or autocast to `bf16` or `16`; `auto`: what `mmmae.precision.best_precision` says. Errors are
            summed in float64 whatever it is.

    Returns:
        The rows of `errors.csv`.

    Raises:
        ValueError: subjects and model do not fit, an argument is not allowed, a subject's name can't be a file's, or
            a picture would replace a file of the subjects.
        OSError: a file can't be read or written.
    """
    out, config = Path(out), model.config
    check_options(config, subjects, precision)
    _check(config, subjects, first, rgb)
    count = len(subjects) if first is None else min(first, len(subjects))
    pictures = [file_for(out, name, ".png") for name in subjects.names[:count]]
    check_outputs(subjects, [*pictures, out / "errors.csv"])
    check_can_write(out)
    out.mkdir(parents=True, exist_ok=True)
    model.eval()
    in_pixels = config.target == "pixels"
    device = next(model.parameters()).device
    precision = resolve_precision(precision, device, config.dim)
    measured = []
    for index, picture in enumerate(pictures):
        batch = collate([subjects[index]], list(subjects.modalities)).to(device)
        with torch.no_grad():
            with autocast(precision, device):
                output = model(batch.hsi, batch.aux, batch.present, batch.valid, seed=seed * 2**32 + index)
            output = output._replace(prediction=output.prediction.float())
            sums = pixel_sums(model, subjects, batch, output) if in_pixels else token_sums(model, batch, output)
        measured.append((batch.names[0], sums.cpu()))
        figure = (draw_pixels if in_pixels else draw_embeddings)(model, subjects, batch, output, rgb)
        save_figure(figure, picture)
        print(
            f"{index + 1}/{count}  {printable(batch.names[0])}  reconstruction loss {output.loss_reconstruction:.4f}",
            flush=True,
        )
    measured.append((ALL, torch.stack([sums for _, sums in measured]).sum(0)))
    rows = [row for name, sums in measured for row in _rows(name, sums, model, subjects)]
    columns = PIXEL_COLUMNS if in_pixels else TOKEN_COLUMNS

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({**row, "subject": cell(row["subject"])} for row in rows)

    write_atomically(out / "errors.csv", write)
    return rows


def pixel_sums(model: FastModel, subjects: Subjects, batch: Batch, output: Output) -> Tensor:
    """Sum over each band `[T, 5]`: valid pixels, squared and absolute errors in the files' units and normalised."""
    config = model.config
    volume = resize(batch.hsi, config.image_size)
    found = restore(config, volume, output)[0, 0]
    valid = resize(batch.valid.float(), config.image_size)[0] >= 0.5
    counts = pixel_mask(config, decoded_ids(config, output.mask))[0, 0] & valid  # [T, H, W]
    units = [subjects.normalization.invert("hsi", cube.cpu()) for cube in (found, volume[0, 0])]
    errors = ((units[0] - units[1]).to(found.device), found - volume[0, 0])
    columns = [part for error in errors for part in (error.double().square(), error.double().abs())]
    return torch.stack([counts.double(), *(column * counts for column in columns)]).sum((2, 3)).T


def token_sums(model: FastModel, batch: Batch, output: Output) -> Tensor:
    """Sum over each group of bands `[t, 3]`: valid tokens, their mean squared and their mean absolute errors."""
    config, projection = model.config, model.patch_embed.proj
    ids = decoded_ids(config, output.mask)
    target = patch_embed(resize(batch.hsi, config.image_size), projection.weight, projection.bias, ids)
    if config.normalize_target:
        target = normalize_target(target)
    error = (output.prediction - target)[0].double()  # [M', D]
    counts = (token_weights(config, batch.valid, ids)[0] > 0).double()
    groups, height, width = config.grid
    columns = torch.stack([counts, error.square().mean(1) * counts, error.abs().mean(1) * counts], dim=1)
    return columns.new_zeros(groups, 3).index_add_(0, ids[0] // (height * width), columns)


def _rows(name: str, sums: Tensor, model: FastModel, subjects: Subjects) -> Iterator[dict[str, Any]]:
    wavelengths = subjects.wavelengths
    for number, (count, *errors) in enumerate(sums.tolist()):
        means = [error / count if count else float("nan") for error in errors]
        scores = [float(f"{mean**0.5 if place % 2 == 0 else mean:.6g}") for place, mean in enumerate(means)]
        if model.config.target == "pixels":
            wavelength = "" if wavelengths is None else round(float(wavelengths[number]), 3)
            values = (name, number, wavelength, int(count), *scores)
            yield dict(zip(PIXEL_COLUMNS, values, strict=True))
        else:
            width = model.config.patch[0]
            bands = f"{number * width}-{number * width + width - 1}"
            yield dict(zip(TOKEN_COLUMNS, (name, bands, int(count), *scores), strict=True))


def _check(config: MMMAEConfig, subjects: Subjects, first: int | None, rgb: tuple[int, int, int] | None) -> None:
    for name, channels in subjects.modalities.items():
        if config.aux.get(name) != channels:
            known = ", ".join(f"{known} ({of})" for known, of in config.aux.items()) or "none"
            raise ValueError(f"the subjects have {name!r} with {channels} channels, the model has {known}")
    if first is not None:
        check_whole("first", first, 1)
    check_rgb(rgb, config.bands)
