"""Generated subjects as files: cubes, auxiliary images, label masks and classes."""

import csv
import os
from pathlib import Path

import numpy as np

from ..checks import check_whole
from ..files import check_can_write
from .retina import MODALITIES, labels, render
from .subjects import Phantom, images_of


def write_phantom(
    folder: str | os.PathLike[str],
    subjects: int = 12,
    image_size: int = 64,
    bands: int = 12,
    seed: int = 0,
    missing: float = 0.15,
) -> list[Path]:
    """Write the subjects of a `Phantom` in physical units, in a layout like that of measured files.

    `hsi/NAME.npz` holds reflectance `[T, H, W]`, the `wavelengths` in nm, and NaN, declared as `nodata`, outside the
    field of view. `ir`, `af` and `thickness` hold `NAME.npy` `[H, W]` for the subjects that have the image.
    `labels/NAME.npy` is `[H, W]` uint8: 0 background, 1 vessel, 2 optic disc, 255 outside the field. `classes.csv` says
    for each name whether it is a left or a right eye; the optic disc lies on that side of the fovea.

    Args:
        folder: made if it does not exist; it must be empty.
        subjects, image_size, bands, seed, missing: as in `Phantom`.

    Returns:
        The paths of the files.

    Raises:
        ValueError: a number is out of range, or the folder is not empty.
        OSError: the folder can't be written.
    """
    folder = Path(folder)
    check_whole("subjects", subjects, 1)
    phantom = Phantom(subjects, image_size, bands, seed=seed, missing=missing)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty, expected a new or empty folder")
    check_can_write(folder)
    for name in ("hsi", *MODALITIES, "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    written, classes = [], []
    for index, name in enumerate(phantom.names):
        size = phantom.image_size
        images = render(seed, index, size, phantom.wavelengths.tolist(), sorted(images_of(seed, index, missing)))
        cube, field = images.pop("hsi")
        cube[:, ~field] = np.nan
        nm = phantom.wavelengths.numpy()
        written.append(folder / "hsi" / f"{name}.npz")
        np.savez(written[-1], cube=cube, wavelengths=nm, nodata=np.float32(np.nan))
        for modality, (image, _) in images.items():
            written.append(folder / modality / f"{name}.npy")
            np.save(written[-1], image[0].astype(np.float32))
        mask, eye = labels(seed, index, size)
        written.append(folder / "labels" / f"{name}.npy")
        np.save(written[-1], mask)
        classes.append((name, eye))
    written.append(folder / "classes.csv")
    with written[-1].open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([("name", "label"), *classes])
    return written
