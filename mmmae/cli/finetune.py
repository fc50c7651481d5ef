"""`mmmae finetune`: train a classifier of subjects or of pixels on an encoder."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PRESETS, MMMAEConfig
from ..training.finetuning.settings import FinetuneSettings
from .options import Commands, add_data_options, band_numbers, config_fields
from .trained import add_statistics_option, load_encoder, trained_subjects

if TYPE_CHECKING:
    from ..data.subjects import Subjects
    from ..model.encoder import HSIEncoder

MEANINGS = {
    "epochs": "passes over the training subjects",
    "batch": "samples a step",
    "learning_rate": "peak of the learning rate, that of the head",
    "layer_decay": "factor of the learning rate from each block to the one before it",
    "warmup": "share of the steps in which the learning rate rises",
    "weight_decay": "of AdamW",
    "clip": "largest norm of the gradient",
    "seed": "of head, orders, flips and the draw of validation subjects",
    "workers": "processes that read data",
}


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("finetune", help="train a classifier of subjects or of pixels on an encoder")
    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group(required=True)
    source.add_argument("--encoder", type=Path, metavar="DIR", help="a pretrained encoder, as in RUN/encoder")
    source.add_argument("--scratch", action="store_true", help="begin with random weights instead, to compare")
    model.add_argument("--preset", choices=list(PRESETS), help="of --scratch; default: base")
    model.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a config field of --scratch")
    model.add_argument("--mode", choices=("full", "probe"), default="full", help="train all, or the head alone")
    add_data_options(parser, generated=False)
    add_statistics_option(parser)
    labels = parser.add_argument_group("labels")
    labels.add_argument("--task", choices=("segmentation", "classification"), required=True)
    labels.add_argument(
        "--labels",
        type=Path,
        required=True,
        metavar="PATH",
        help="segmentation: folder of rasters of class numbers with the cubes' stems; classification: CSV file with "
        "the columns name and label",
    )
    labels.add_argument("--ignore", type=int, default=255, metavar="N", help="in rasters: not labelled; default: 255")
    labels.add_argument("--classes", metavar="NAME,..", help="of the classes in rasters, by ascending number")
    labels.add_argument(
        "--validation",
        default="0.2",
        metavar="NAMES|SHARE",
        help="subjects or scenes to hold out, by name with commas between, or the share of them to draw; default: 0.2",
    )
    course = parser.add_argument_group("run")
    course.add_argument("--out", type=Path, metavar="DIR", help="default: runs/finetune, then runs/finetune-2, ...")
    course.add_argument("--class-weights", default="none", metavar="none|balanced|W,..", help="default: none")
    course.add_argument("--augment", action="store_true", help="flip and transpose subjects, and their labels")
    course.add_argument("--keep", choices=("best", "last"), default="best", help="which epoch's model; default: best")
    course.add_argument("--rgb", type=band_numbers, metavar="R,G,B", help="bands that maps show as colours")
    course.add_argument("--maps", type=int, default=8, metavar="N", help="pictures of held-out subjects; default: 8")
    defaults = dataclasses.asdict(FinetuneSettings())
    for field, meaning in MEANINGS.items():
        kind, default = type(defaults[field]), defaults[field]
        course.add_argument(
            f"--{field.replace('_', '-')}",
            type=kind,
            default=default,
            metavar=kind.__name__.upper(),
            help=f"{meaning}; default: {default}",
        )
    course.add_argument("--device", default="auto", help="auto (the default), cpu, cuda")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, and say what came out."""
    settings = _settings(options)
    if options.encoder is not None and (options.preset or options.set):
        raise ValueError("--preset and --set are for --scratch: the encoder's folder says what the encoder is")
    if options.rgb is not None and len(options.rgb) != 3:
        raise ValueError(f"--rgb has {len(options.rgb)} bands, expected three")
    if options.task == "classification" and (options.classes or options.ignore != 255):
        raise ValueError("--classes and --ignore are for segmentation; a CSV file names its classes")
    from ..training.finetuning.finetune import finetune
    from ..training.finetuning.labels import read_class_labels, read_mask_labels
    from ..training.finetuning.scores import main_score
    from ..training.folders import default_folder

    options.out = options.out or default_folder(Path("runs/finetune"))
    encoder, subjects = _from_scratch(options) if options.scratch else load_encoder(options, options.encoder)
    if options.task == "classification":
        labels = read_class_labels(options.labels, subjects)
    else:
        names = options.classes.split(",") if options.classes else None
        labels = read_mask_labels(options.labels, subjects, ignore=options.ignore, names=names)
    print(f"{subjects!r}\n{len(labels.counts)} of {len(subjects)} labelled, classes: {', '.join(labels.classes)}")
    _, report = finetune(
        encoder,
        subjects,
        labels,
        options.out,
        settings,
        validation=_validation(options.validation),
        rgb=options.rgb,
        maps=options.maps,
    )
    for name in report["not_trained"]:
        print(f"note: no training subject has the class {name}")
    name = main_score(labels.task)
    print(
        f"held out: {len(report['validation'])}; kept epoch {report['epoch']} of {report['epochs']}: "
        f"{name} {report[name]:.4f}, accuracy {report['accuracy']:.4f}\nwrote {options.out / 'model'} and "
        f"{options.out / 'metrics.json'}"
    )


def _settings(options: argparse.Namespace) -> FinetuneSettings:
    weights: Any = options.class_weights
    if weights not in ("none", "balanced"):
        try:
            weights = tuple(float(part) for part in weights.split(","))
        except ValueError:
            raise ValueError(f"--class-weights is {weights!r}, expected none, balanced or numbers") from None
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(FinetuneSettings)}
    return FinetuneSettings(**{**fields, "class_weights": weights})


def _from_scratch(options: argparse.Namespace) -> tuple[HSIEncoder, Subjects]:
    import torch

    from ..model.encoder import HSIEncoder

    if options.aux:
        raise ValueError("--aux is not used: an encoder takes hyperspectral cubes alone")
    fields = config_fields(options.set)
    for field, source in (("aux", "not used"), ("bands", "told by the cubes"), ("in_channels", "one")):
        if field in fields:
            raise ValueError(f"--set {field} can't be chosen: it is {source}")
    patch = fields.get("patch")
    bands = patch[0] if isinstance(patch, list) and patch else MMMAEConfig.preset("base").patch[0]
    config = MMMAEConfig.preset(options.preset or "base", **fields, aux={}, bands=bands)  # all but the bands
    subjects = trained_subjects(options, config, None)
    torch.manual_seed(options.seed)
    return HSIEncoder(config.replace(bands=subjects.bands)), subjects


def _validation(text: str) -> list[str] | float:
    names = [name.strip() for name in text.split(",")]
    try:
        return float(text) if 0 < float(text) < 1 else names
    except ValueError:
        return names
