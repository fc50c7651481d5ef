"""The command line: `mmmae info`, `mmmae profile`, `mmmae pretrain`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import PRESETS, MMMAEConfig
from .tuning import tune_cpu

if TYPE_CHECKING:
    from .recipes.sampling import Subjects

# A command imports what it needs when it runs: `mmmae --help` answers at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input gets one line on standard error and status 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    tune_cpu()
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        if options.traceback:
            raise
        print(f"mmmae {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mmmae {options.command}: interrupted; pretraining goes on with --resume auto", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmmae", description="Multi-modal guided masked autoencoders for hyperspectral images, made fast."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="versions, devices, and which implementation serves each op")
    info.add_argument(
        "--for",
        dest="calls",
        action="append",
        default=[],
        metavar="TARGET:DTYPE[:WIDTH]",
        help="which backend of attention would be chosen elsewhere, as in sm_90:bf16; may be repeated",
    )
    info.set_defaults(run=_info)

    profile = commands.add_parser("profile", help="the bill of a model: parameters, MACs, bytes, launches")
    profile.add_argument("preset", nargs="?", default="base", choices=list(PRESETS), help="default: base")
    profile.add_argument("--batch", type=int, default=1, metavar="B")
    profile.add_argument("--reference", action="store_true", help="bill the plain reference model instead")
    profile.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a config field")
    form = profile.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    profile.set_defaults(run=_profile)

    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain a model",
        description="Pretrain a model. Without --hsi the subjects are generated (a retina-like phantom, not real data) "
        "and the preset is tiny.",
    )
    _add_pretrain_options(pretrain)
    pretrain.set_defaults(run=_pretrain)
    return parser


def _add_pretrain_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--hsi", type=Path, metavar="DIR", help="folder of hyperspectral cubes, one file a subject")
    data.add_argument(
        "--aux",
        action="append",
        default=[],
        metavar="NAME=DIR[:BANDS]",
        help="folder of auxiliary images of the same file stems; :0 or :0,2 picks bands; may be repeated",
    )
    data.add_argument("--bands", type=band_numbers, metavar="I,J,..", help="bands of the cubes to take; default: all")
    data.add_argument("--wavelengths", type=wavelengths, metavar="NM,..", help="the same by wavelength in nm")
    data.add_argument("--normalization", type=Path, metavar="FILE", help="statistics to read, or to write if not there")
    model = parser.add_argument_group("model")
    model.add_argument("--preset", choices=list(PRESETS), help="default: tiny without --hsi, base with it")
    model.add_argument("--target", choices=("embedding", "pixels"), help="what the decoder predicts")
    model.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a config field")
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs/pretrain"), metavar="DIR", help="default: runs/pretrain")
    run.add_argument("--resume", metavar="FILE", help="checkpoint to go on from; auto: the last one in --out, if any")
    run.add_argument("--rgb", type=band_numbers, metavar="R,G,B", help="bands that the picture shows as colours")
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
        run.add_argument(
            f"--{field.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=meaning + default
        )
    run.add_argument("--device", help="auto (the default), cpu, cuda")


def _setting_defaults() -> dict[str, Any]:
    from .recipes.settings import PretrainSettings

    return dataclasses.asdict(PretrainSettings())


def _info(options: argparse.Namespace) -> None:
    from .info import parse_call, print_info, print_info_for

    calls = [parse_call(text) for text in options.calls]
    if calls:
        print_info_for(calls)
    else:
        print_info()


def _profile(options: argparse.Namespace) -> None:
    from rich.console import Console

    from . import profile, reference
    from .pretrained import check_can_write, write_atomically

    if options.html is not None:
        if not options.html.parent.is_dir() or options.html.is_dir():
            raise ValueError(f"--html is {options.html}, expected is a file in a folder that exists")
        check_can_write(options.html.parent)
    config = MMMAEConfig.preset(options.preset, **_fields(options.set))
    report = profile(reference.reference_model(config) if options.reference else config, batch=options.batch)
    if options.html is not None:
        write_atomically(options.html, lambda path: path.write_text(report.to_html()))
        print(f"wrote {options.html}")
    elif options.json:
        print(report.to_json())
    elif options.markdown:
        print(report.to_markdown())
    else:
        Console().print(report)


def _pretrain(options: argparse.Namespace) -> None:
    from .recipes.pretrain import find_checkpoint, pretrain, resumed_settings
    from .recipes.settings import PretrainSettings

    fields = _fields(options.set)
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
    subjects = _subjects(options, preset, fields, settings.seed)
    config = MMMAEConfig.preset(preset, **{**fields, "bands": subjects.bands, "aux": dict(subjects.modalities)})
    print(f"{subjects!r}\npreset {preset}, {settings.steps} steps of {settings.batch} subjects, into {options.out}")
    pretrain(config, subjects, options.out, settings, resume=options.resume, rgb=options.rgb)
    print(f"wrote {options.out / 'encoder'} and {options.out / 'reconstruction.png'}")


def _subjects(options: argparse.Namespace, preset: str, fields: dict[str, Any], seed: int) -> Subjects:
    from .data import PairedFolder, Phantom

    for field, source in (("aux", "--aux"), ("in_channels", "cubes, which have one")):
        if field in fields:
            raise ValueError(f"--set {field} can't be chosen: it follows from {source}")
    if options.hsi is None:
        for option in ("aux", "bands", "wavelengths", "normalization"):
            if getattr(options, option):
                raise ValueError(f"--{option} needs --hsi, the folder of cubes")
        config = MMMAEConfig.preset(preset, **fields)
        return Phantom(image_size=config.image_size, bands=config.bands, seed=seed)
    if "bands" in fields:
        raise ValueError("--set bands can't be chosen: it follows from the cubes, or from --bands")
    patch = fields.get("patch")
    bands = patch[0] if isinstance(patch, list) and patch else MMMAEConfig.preset(preset).patch[0]
    config = MMMAEConfig.preset(preset, **fields, bands=bands)  # all but the bands, which the files tell
    aux = {}
    for item in options.aux:
        name, _, folder = item.partition("=")
        if not name or not folder:
            raise ValueError(f"--aux is {item!r}, expected is NAME=DIR or NAME=DIR:BANDS")
        if name in aux:
            raise ValueError(f"--aux names {name!r} twice")
        aux[name] = folder
    config.replace(aux=dict.fromkeys(aux, 1))  # raises if a name can't be registered
    stored = options.out / "normalization.json"
    return PairedFolder(
        options.hsi,
        aux,
        image_size=config.image_size,
        bands=options.bands,
        wavelengths=options.wavelengths,
        normalization=options.normalization or (stored if options.resume and stored.exists() else None),
    )


def _fields(items: Sequence[str]) -> dict[str, Any]:
    """Config fields from FIELD=VALUE, the value as JSON or else as a word."""
    fields: dict[str, Any] = {}
    for item in items:
        field, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set is {item!r}, expected is FIELD=VALUE")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError:
            fields[field] = value
    return fields


def band_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def wavelengths(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))
