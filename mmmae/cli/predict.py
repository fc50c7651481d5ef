"""`mmmae predict`: maps of scenes, or a class for each subject, by a fine-tuned model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..checks import check_whole
from ..files import check_can_write
from ..precision import Precision
from .options import Flag
from .output import say
from .trained import TrainedDataOptions, trained_subjects

TILE = 64  # pixels, of which each has a window of its own


def run(
    data: TrainedDataOptions,
    *,
    model: Path,
    out: Path,
    probabilities: Flag = False,
    batch: int = 8,
    workers: int = 0,
    device: str = "cpu",
    precision: Precision = "auto",
) -> None:
    """Write maps of classes for a model that was fine-tuned on pixels, or a table of classes for one of subjects.

    A map is a GeoTIFF with the place of its cube, and a PNG with a legend. Scenes may have any size: they are read and
    written by tiles. A tile has as many pixels as in training unless --tile says otherwise, and shares a quarter of
    them with the next one unless --overlap does. A model that was trained on whole cubes of several sizes takes whole
    cubes, resized as in training, unless there is --tile.

    Args:
        model: folder of a fine-tuned model, as RUN/model
        out: folder for NAME.tif and NAME.png of each scene, or for classes.csv
        probabilities: write the probability of each class too, as bands of NAME_probabilities.tif
        batch: tiles or subjects in a batch
        workers: processes that read data
        device: cpu or cuda
        precision: 32 bits, or autocast to bf16 or 16 bits; auto: bf16 where it is faster
    """
    from ..model.finetuned import load_finetuned, read_finetuned
    from ..model.heads import SegmentationModel
    from ..model.pixels import PixelClassifier
    from ..training.inference.predict import predict_scenes, predict_subjects

    check_whole("--workers", workers, 0)
    if data.aux:
        raise ValueError("--aux is not used: a fine-tuned model takes hyperspectral cubes alone")
    check_can_write(out)
    stored = read_finetuned(model)
    loaded, classes = load_finetuned(model)
    config = loaded.encoder.config
    how: dict[str, Any] = {"batch": batch, "workers": workers, "device": device, "precision": precision}
    if not isinstance(loaded, SegmentationModel):
        if probabilities:
            raise ValueError("--probabilities is for maps: classes.csv has the probabilities of subjects anyway")
        subjects = trained_subjects(data, config, model)
        found = predict_subjects(loaded, classes, subjects, out / "classes.csv", **how)
        say(repr(subjects))
        for name in classes:
            say(f"{found.count(name)} {name}")
        say(f"wrote {out / 'classes.csv'}")
        return
    window: int | None = None
    if isinstance(loaded, PixelClassifier):
        window = stored.window or config.image_size
        if data.hsi is None or data.overlap is not None:
            raise ValueError("a model of windows around pixels reads --hsi, in tiles whose overlap follows from these")
        tiled = dataclasses.replace(data, tile=(data.tile or TILE) + window - 1, overlap=window - 1)
        subjects = trained_subjects(tiled, config, model, tiles="clip")
    elif data.hsi is not None and stored.whole and data.tile is None:
        side = config.image_size
        say(f"each cube is predicted whole, resized to {side} x {side} pixels as in training; --tile cuts it instead")
        subjects = trained_subjects(data, config, model)
    elif data.hsi is not None:
        window = data.tile or stored.window or config.image_size
        overlap = window // 4 if data.overlap is None else data.overlap
        tiled = dataclasses.replace(data, tile=window, overlap=overlap)
        subjects = trained_subjects(tiled, config, model, tiles="clip")
    else:
        subjects = trained_subjects(data, config, model)
    if stored.numbers not in (None, stored.values):
        say(
            f"note: the labels' class numbers go up to {max(stored.numbers or ())}, too large for a map; its classes "
            "are numbered from 1, and the tag classes has their names"
        )
    say(repr(subjects))
    maps = predict_scenes(
        loaded,
        classes,
        subjects,
        out,
        values=stored.values,
        window=window,
        probabilities=probabilities,
        **how,
    )
    say(f"wrote {len(maps)} {'map' if len(maps) == 1 else 'maps'} into {out}, such as {maps[0].name}")
