"""`mmmae reconstruct`: pictures and errors of what a pretrained model predicts."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, add_data_options, band_numbers
from .trained import add_statistics_option, trained_subjects


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("reconstruct", help="pictures and errors by band of what a model predicts")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a pretrained model, as in RUN/model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for pictures and errors.csv")
    parser.add_argument("--first", type=int, metavar="N", help="of the first N subjects; default: of all")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the masks; default: 0")
    parser.add_argument("--mask-ratio", type=float, metavar="R", help="share of tokens to mask; default: the model's")
    parser.add_argument("--rgb", type=band_numbers, metavar="R,G,B", help="bands that pictures show as colours")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda")
    add_data_options(parser, generated=False)
    add_statistics_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Reconstruct, and write."""
    from ..model.fast import FastModel
    from ..training.inference.encode import usable_device
    from ..training.inference.reconstruct import ALL, reconstruct

    if options.rgb is not None and len(options.rgb) != 3:
        raise ValueError(f"--rgb has {len(options.rgb)} bands, expected three")
    if not 0 <= options.seed < 2**31:
        raise ValueError(f"--seed is {options.seed}, expected 0..2^31-1")
    changes = {} if options.mask_ratio is None else {"mask_ratio": options.mask_ratio}
    device = usable_device(options.device)
    model = FastModel.from_pretrained(options.model, **changes).to(device)
    subjects = trained_subjects(options, model.config, options.model)
    rows = reconstruct(model, subjects, options.out, first=options.first, seed=options.seed, rgb=options.rgb)
    for row in rows:
        if row["subject"] == ALL:
            print("  ".join(f"{name} {value}" for name, value in list(row.items())[1:] if value != ""))
    print(f"wrote pictures and errors.csv into {options.out}")
