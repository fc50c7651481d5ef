"""`mmmae finetune`: train a classifier of subjects or of pixels on an encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..config import MMMAEConfig, Preset
from ..files import check_can_write
from ..training.finetuning.settings import FinetuneSettings
from .options import Fields, Flag, colours, config_fields, config_without_bands
from .output import say
from .stored import Stored
from .trained import TrainedDataOptions, image_size_for, load_encoder, trained_subjects

if TYPE_CHECKING:
    from ..data.subjects import Subjects
    from ..model.encoder import HSIEncoder

ENCODER = tyro.conf.create_mutex_group(required=True, title="encoder")


def run(
    data: TrainedDataOptions,
    settings: Annotated[Callable[..., FinetuneSettings], tyro.conf.arg(constructor=FinetuneSettings)],
    *,
    encoder: Annotated[Path | None, ENCODER] = None,
    scratch: Annotated[Flag, ENCODER] = False,
    preset: Preset | None = None,
    fields: Fields,
    task: Literal["segmentation", "pixels", "classification"],
    window: int | None = None,
    labels: Path | None = None,
    ignore: int = 255,
    classes: str | None = None,
    split: Annotated[str | None, tyro.conf.arg(metavar="SPLIT")] = None,
    validation: Annotated[str, tyro.conf.arg(metavar="NAME,...|SHARE")] = "0.2",
    fold: Annotated[str | None, tyro.conf.arg(metavar="K/N")] = None,
    seeds: int = 1,
    out: Path | None = None,
    config: Path | None = None,
    rgb: tuple[int, ...] | None = None,
    maps: int = 8,
    stored: Stored,
) -> None:
    """Train a classifier of subjects or of pixels on an encoder.

    Args:
        encoder: folder of a pretrained encoder, as RUN/encoder
        scratch: start from random weights instead, for comparison
        preset: the encoder of --scratch; None: that of --config, else base
        fields: change a config field of --scratch, as in image_size=64 or patch=3,8,8
        task: what to classify: all pixels of a subject or tile at once, each pixel by the window around it, or subjects
        window: side of the window around a pixel in pixels, odd, for --task pixels; None: 9
        labels: folder of rasters of class numbers with the cubes' stems, or the raster of the only scene; for
            classification a CSV file with the columns name and label
        ignore: number in rasters that means not labelled
        classes: names of the classes in rasters by ascending number, with commas between
        split: how labels are divided: subjects:SHARE (held out), pixels:SHARE (of each class, to train with),
            blocks:PIXELS (side of the blocks to hold out), table:FILE.csv (columns name, and group or split) or
            masks:TRAIN,TEST (rasters, instead of --labels; or one file with the arrays TR and TE); None: subjects, and
            blocks if there is one scene
        validation: subjects, scenes or groups to hold out, by name with commas between, or the share of subjects,
            groups or blocks to draw
        fold: hold out the K-th of N parts of the subjects, groups or blocks instead of a share
        seeds: repeat split and training with this many seeds, from --seed on, and report means and deviations
        out: the run's folder; None: runs/finetune, then runs/finetune-2, ...
        config: JSON or YAML file with settings, as config.json in a run's folder; options override it
        rgb: bands that maps show as red, green and blue
        maps: how many maps of held-out subjects to draw
        stored: what the file of --config holds
    """
    chosen = settings()
    if encoder is not None and (preset or fields):
        raise ValueError("--preset and --set are for --scratch: the encoder's folder says what the encoder is")
    shown = colours(rgb)
    if task == "classification" and (classes or ignore != 255):
        raise ValueError("--classes and --ignore are for segmentation; a CSV file names its classes")
    if (window is not None or data.tile is not None) and task == ("segmentation" if window is not None else "pixels"):
        raise ValueError("--window is for --task pixels, which takes whole scenes, and --tile for the other tasks")
    if task == "pixels":
        window = 9 if window is None else window
        if window < 1 or window % 2 == 0:
            raise ValueError(f"--window is {window}, expected an odd number of pixels, as in --window 9")
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}, expected at least 1")
    masks = split.partition(":")[2] if split is not None and split.startswith("masks:") else None
    if (labels is None) != (masks is not None):
        raise ValueError("--labels names the labels, unless --split masks:TRAIN,TEST does; expected one of them")
    if masks is not None and (task == "classification" or fold or validation != "0.2"):
        raise ValueError("--split masks holds out pixels of --task segmentation by itself; expected no other choice")
    from ..training.finetuning.finetune import check_free, finetune
    from ..training.finetuning.labels import read_class_labels, read_mask_labels
    from ..training.finetuning.masks import divide_by_masks
    from ..training.finetuning.page import TITLES
    from ..training.finetuning.pixels import check_window
    from ..training.finetuning.repeats import finetune_repeatedly
    from ..training.finetuning.scores import main_score
    from ..training.finetuning.splits import check_split, divide
    from ..training.finetuning.valid import valid_labels
    from ..training.folders import default_folder

    out = out or default_folder(Path("runs/finetune"))
    check_can_write(out)
    check_free(out)
    if encoder is not None:
        model, subjects = load_encoder(data, encoder, window)
    else:
        read_fields = {} if preset else stored.model
        model, subjects = _from_scratch(data, preset or "base", read_fields, config_fields(fields), chosen.seed, window)
    names = classes.split(",") if classes else None
    if masks is not None:
        read, parts = divide_by_masks(masks, subjects, ignore=ignore, names=names, window=window)
    else:
        assert labels is not None
        by_file = task == "classification"
        read = (
            read_class_labels(labels, subjects)
            if by_file
            else read_mask_labels(labels, subjects, ignore=ignore, names=names)
        )
        if window is not None:
            check_window(window, subjects, read)
        held = held_out(validation, subjects)
        check_split(subjects, read, split, validation=held, fold=fold)
        read = valid_labels(subjects, read, window)  # before the splits of several seeds, which would check it again
        parts = divide(subjects, read, split, validation=held, fold=fold, seed=chosen.seed, window=window)
    say(repr(subjects))
    say(f"{len(read.counts)} of {len(subjects)} labelled, classes: {', '.join(read.classes)}")
    say(f"split: {parts.text}")
    options: dict[str, Any] = {"window": window, "rgb": shown, "maps": maps}
    if seeds > 1:
        if masks is None:
            options |= {"split": split, "validation": held_out(validation, subjects), "fold": fold}
        else:
            options["split"] = parts
        with _unfinished_told(out):
            report = finetune_repeatedly(
                lambda seed: _another(model, seed, scratch), subjects, read, out, chosen, seeds, **options
            )
        for name, title in TITLES.items():
            if name in report:
                print(
                    f"{title}: {report[name]['mean']:.4f} ± {report[name]['deviation']:.4f} (n - 1) over {seeds} seeds"
                )
        say(f"wrote {out / 'report.html'} and {out / 'metrics.json'}")
        return
    with _unfinished_told(out):
        _, report = finetune(model, subjects, read, out, chosen, split=parts, **options)
    for name in report["not_trained"]:
        say(f"note: no training {'subject' if read.task == 'classification' else 'pixel'} has the class {name}")
    name = main_score(read.task)
    what = "pixel" if "pixels" in report else "tile" if subjects.positions else "subject"
    held = report["pixels"]["test"] if what == "pixel" else len(report["validation"])
    print(
        f"held out: {held:,} {what}{'' if held == 1 else 's'}; kept epoch {report['epoch']} of {report['epochs']}: "
        f"{name} {report[name]:.4f}, accuracy {report['accuracy']:.4f}, average accuracy "
        f"{report['average_accuracy']:.4f}, kappa {report['kappa']:.4f}"
    )
    say(f"wrote {out / 'model'}, {out / 'report.html'} and {out / 'metrics.json'}")


@contextlib.contextmanager
def _unfinished_told(out: Path) -> Iterator[None]:
    """Let an interrupt tell that a folder holds a run that can't be resumed, if it holds one by then."""
    try:
        yield
    except KeyboardInterrupt:
        if not [*out.glob("config.json"), *out.glob("seed-*/config.json")]:
            raise
        raise KeyboardInterrupt(f"{out} holds a run that can't go on: remove it, or name another --out") from None


def _from_scratch(
    data: TrainedDataOptions,
    preset: Preset,
    stored: Mapping[str, Any],
    fields: Mapping[str, Any],
    seed: int,
    window: int | None,
) -> tuple[HSIEncoder, Subjects]:
    """Make an encoder with random weights for the bands of the data; `fields` override those `stored` in a file.

    For windows of pixels, patch and image size have the window's size unless `fields` say otherwise.
    """
    import torch

    from ..model.encoder import HSIEncoder
    from ..training.pretrain import check_memory

    if data.aux:
        raise ValueError("--aux is not used: an encoder takes hyperspectral cubes alone")
    reasons = {
        "aux": "an encoder has none",
        "bands": "it follows from the cubes",
        "in_channels": "it follows from cubes, which have one",
    }
    for field, reason in reasons.items():
        if field in fields:
            raise ValueError(f"--set {field} can't be chosen: {reason}")
    fields = {**{field: value for field, value in stored.items() if field not in reasons}, **fields}
    if window is not None:
        bands = MMMAEConfig.preset(preset).patch[0]
        side = next(length for length in range(min(2, window), window + 1) if window % length == 0)
        fields = {"patch": [bands, side, side], **fields}
        fields.setdefault("image_size", image_size_for(window, fields["patch"]))
    subjects = trained_subjects(
        data, config_without_bands(preset, fields), None, tiles=None if window is None else "refuse"
    )
    config = MMMAEConfig.preset(preset, **{**fields, "bands": subjects.bands, "aux": {}})
    check_memory(config)
    torch.manual_seed(seed)
    return HSIEncoder(config), subjects


def _another(encoder: HSIEncoder, seed: int, scratch: bool) -> HSIEncoder:
    """Return a copy of a pretrained encoder, or one with random weights of the seed."""
    import copy

    import torch

    if not scratch:
        return copy.deepcopy(encoder)
    torch.manual_seed(seed)
    return type(encoder)(encoder.config, encoder.kernels, encoder.attention)


def held_out(text: str, subjects: Subjects) -> list[str] | float:
    """Return the names that --validation lists, which may hold commas themselves, or the share of subjects."""
    from ..training.finetuning.labels import scene_names

    try:
        if 0 < float(text) < 1:
            return float(text)
    except ValueError:
        pass
    known = {*subjects.names, *scene_names(subjects)}
    parts, names = text.split(","), []
    while parts:
        length = next((end for end in range(len(parts), 1, -1) if ",".join(parts[:end]).strip() in known), 1)
        names.append(",".join(parts[:length]).strip())
        parts = parts[length:]
    return names
