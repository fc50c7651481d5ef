"""`mmmae pretrain`: train a masked autoencoder."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PRESETS, MMMAEConfig
from .options import Commands, add_data_options, band_numbers, config_fields, names_data, subjects_of

if TYPE_CHECKING:
    from ..data.subjects import Subjects

SETTINGS = {
    "steps": "optimiser steps",
    "batch": "samples a forward pass of one process takes",
    "accumulate": "forward passes that make one step",
    "learning_rate": "peak of the learning rate",
    "warmup": "steps of linear warm-up; default: a tenth of the steps",
    "weight_decay": "of AdamW",
    "clip": "largest norm of the gradient",
    "ema": "decay of the moving average of the weights that is saved in the end; 0: none",
    "precision": "32, bf16, or 16 with a loss scaler",
    "crop": "smallest share of an image that a random crop keeps; 1: no crops",
    "flip": "mirror and transpose subjects at random",
    "validation": "subjects held out to measure the loss on",
    "patience": "validations without a lower loss that end the run; 0: never",
    "seed": "of weights, orders, masks, crops and flips",
    "workers": "processes that read data",
    "checkpoint_every": "steps between checkpoints",
    "log_every": "steps between readings of the losses from a GPU",
    "report_every": "steps between measurements of features and contrast",
    "pictures_every": "steps between pictures; 0: one at the end",
    "device": "auto, cpu, cuda",
    "strategy": "of several processes: ddp, or fsdp to share the weights among them",
    "compile": "hand the transformer blocks to torch.compile, in its default mode or the one named",
    "cuda_graph": "record a step as one CUDA graph: auto, on, off",
}


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
    model.add_argument(
        "--target",
        choices=("embedding", "pixels"),
        help="what the decoder predicts; default: pixels without --hsi, embedding with it",
    )
    model.add_argument(
        "--wavelength-positions",
        action="store_true",
        help="spectral positions by the wavelengths of the files: other sensors can take the encoder over",
    )
    model.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a config field")
    course = parser.add_argument_group("run")
    course.add_argument("--out", type=Path, metavar="DIR", help="default: runs/pretrain, then runs/pretrain-2, ...")
    course.add_argument(
        "--resume",
        metavar="FILE",
        help="checkpoint to go on from; auto: that of --out or else of the last run, if any",
    )
    course.add_argument("--rgb", type=band_numbers, metavar="R,G,B", help="bands that the picture shows as colours")
    from ..training.settings import PretrainSettings

    for field in dataclasses.fields(PretrainSettings):
        _add_setting(course, field.name, field.default, SETTINGS[field.name])
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train."""
    from ..training.checkpoints import find_checkpoint
    from ..training.distributed import find_world
    from ..training.folders import default_folder
    from ..training.pretrain import pretrain
    from ..training.settings import PretrainSettings

    fields = config_fields(options.set)
    if options.target is not None:
        fields["target"] = options.target
    elif not names_data(options):
        fields.setdefault("target", "pixels")  # so that the picture of the demonstration shows pixels
    preset = options.preset or ("base" if names_data(options) else "tiny")
    if options.rgb is not None and len(options.rgb) != 3:
        raise ValueError(f"--rgb has {len(options.rgb)} bands, expected three")
    changes = {field: getattr(options, field) for field in _setting_defaults() if getattr(options, field) is not None}
    options.out = options.out or default_folder(Path("runs/pretrain"), options.resume)
    checkpoint = find_checkpoint(options.out, options.resume)
    if checkpoint is not None:
        changes = {**checkpoint.settings, **changes}
    settings = PretrainSettings(**changes)
    subjects = subjects_of(options, preset, fields, settings.seed)
    if options.wavelength_positions:
        fields["wavelengths"] = _wavelengths_of(subjects)
    config = MMMAEConfig.preset(preset, **{**fields, "bands": subjects.bands, "aux": dict(subjects.modalities)})
    world = find_world()
    if world.rank == 0:
        of_ranks = f" on each of {world.ranks} processes" if world.ranks > 1 else ""
        course = f"{settings.steps} steps of {settings.batch * settings.accumulate} subjects{of_ranks}"
        print(f"{subjects!r}\npreset {preset}, {course}, into {options.out}")
    pretrain(config, subjects, options.out, settings, resume=checkpoint, rgb=options.rgb)
    if world.rank == 0:
        written = ("model", "encoder", "reconstruction.png")
        print("wrote " + ", ".join(str(options.out / name) for name in written))


def _wavelengths_of(subjects: Subjects) -> list[float]:
    if subjects.wavelengths is None:
        raise ValueError(
            "--wavelength-positions needs the wavelengths of the bands, which the files do not tell; give them by "
            "--set wavelengths=[NM,..]"
        )
    return [float(wavelength) for wavelength in subjects.wavelengths]


def _add_setting(group: Any, field: str, default: Any, meaning: str) -> None:
    flag = f"--{field.replace('_', '-')}"
    if field == "compile":
        group.add_argument(flag, nargs="?", const=True, metavar="MODE", help=meaning)
        group.add_argument("--no-compile", dest=field, action="store_const", const=False, help="undo --compile")
        return
    if isinstance(default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=meaning)
        return
    told = "" if "default" in meaning else f"; default: {default}"
    kind = int if field == "warmup" else type(default)
    group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=meaning + told)


def _setting_defaults() -> dict[str, Any]:
    from ..training.settings import PretrainSettings

    return dataclasses.asdict(PretrainSettings())
