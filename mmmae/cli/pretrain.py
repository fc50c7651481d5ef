"""`mmmae pretrain`: train a masked autoencoder."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..config import PRESETS, MMMAEConfig
from .options import Commands, add_data_options, band_numbers, config_fields, subjects_of


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "pretrain",
        help="pretrain a model",
        description="Pretrain a model. Without --hsi the subjects are generated (a retina-like phantom, not real data) "
        "and the preset is tiny.",
    )
    add_data_options(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--preset", choices=list(PRESETS), help="default: tiny without --hsi, base with it")
    model.add_argument("--target", choices=("embedding", "pixels"), help="what the decoder predicts")
    model.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a config field")
    course = parser.add_argument_group("run")
    course.add_argument("--out", type=Path, default=Path("runs/pretrain"), metavar="DIR", help="default: runs/pretrain")
    course.add_argument("--resume", metavar="FILE", help="checkpoint to go on from; auto: the last one in --out, if any")
    course.add_argument("--rgb", type=band_numbers, metavar="R,G,B", help="bands that the picture shows as colours")
    from_settings = {
        "steps": "optimiser steps",
        "batch": "samples a step and device",
        "learning_rate": "peak of the learning rate",
        "warmup": "steps of linear warm-up; default: a tenth of the steps",
        "weight_decay": "of AdamW",
        "clip": "largest norm of the gradient",
        "seed": "of weights, orders and masks",
        "workers": "processes that read data",
        "checkpoint_every": "steps between checkpoints",
    }
    defaults = _setting_defaults()
    for field, meaning in from_settings.items():
        default = "" if field == "warmup" else f"; default: {defaults[field]}"
        kind = type(defaults[field])
        course.add_argument(
            f"--{field.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=meaning + default
        )
    course.add_argument("--device", help="auto (the default), cpu, cuda")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train."""
    from ..recipes.pretrain import find_checkpoint, pretrain, resumed_settings
    from ..recipes.settings import PretrainSettings

    fields = config_fields(options.set)
    if options.target is not None:
        fields["target"] = options.target
    preset = options.preset or ("base" if options.hsi else "tiny")
    if options.rgb is not None and len(options.rgb) != 3:
        raise ValueError(f"--rgb has {len(options.rgb)} bands, expected are three")
    changes = {field: getattr(options, field) for field in _setting_defaults() if getattr(options, field) is not None}
    if options.warmup is None and options.steps is not None:
        changes["warmup"] = options.steps // 10
    checkpoint = find_checkpoint(options.out, options.resume)
    if checkpoint is not None:
        changes = {**resumed_settings(checkpoint), **changes}
    settings = PretrainSettings(**changes)
    subjects = subjects_of(options, preset, fields, settings.seed)
    config = MMMAEConfig.preset(preset, **{**fields, "bands": subjects.bands, "aux": dict(subjects.modalities)})
    print(f"{subjects!r}\npreset {preset}, {settings.steps} steps of {settings.batch} subjects, into {options.out}")
    pretrain(config, subjects, options.out, settings, resume=options.resume, rgb=options.rgb)
    print(f"wrote {options.out / 'encoder'} and {options.out / 'reconstruction.png'}")


def _setting_defaults() -> dict[str, Any]:
    from ..recipes.settings import PretrainSettings

    return dataclasses.asdict(PretrainSettings())
