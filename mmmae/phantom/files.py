"""Generated subjects as files, for trials of what reads files: cubes, auxiliary images, masks and classes."""

import csv
import os
from pathlib import Path

import numpy as np

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
    """Write the subjects of a `Phantom` in their own units, as measured files would lie on a disk.

    `hsi/NAME.npz` holds reflectance `[T, H, W]`, its `wavelengths` in nm, and NaN, which the file declares as `nodata`,
    outside the camera's field. `ir`, `af` and `thickness` hold `NAME.npy` `[H, W]` of the subjects that have the image.
    `labels/NAME.npy` is `[H, W]` uint8: 0 background, 1 vessel, 2 optic disc, 255 outside the field. `classes.csv` says
    of each name whether it is a left or a right eye, which the image shows: the disc lies on that side of the fovea.

    Args:
        folder: is made; may be there if it is empty.
        subjects, image_size, bands, seed, missing: as in `Phantom`.

    Returns:
        The files written.

    Raises:
        ValueError: a number is out of range, or the folder is not empty.
        OSError: the folder can't be written.
    """
    folder = Path(folder)
    if subjects < 1:
        raise ValueError(f"subjects is {subjects}; expected at least one")
    phantom = Phantom(subjects, image_size, bands, seed=seed, missing=missing)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; expected a new folder")
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
