"""`mmmae encode`: features of a folder of cubes."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, add_data_options, process_count
from .trained import add_statistics_option, load_encoder


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("encode", help="write the features of cubes")
    parser.add_argument("--encoder", type=Path, required=True, metavar="DIR", help="as in RUN/encoder")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="features.safetensors or features.npz, by the suffix"
    )
    parser.add_argument(
        "--pool",
        choices=("mean", "spatial", "tokens"),
        default="mean",
        help="mean: one vector a cube (default); spatial: a map of vectors; tokens: all, over bands too",
    )
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="cubes at once; default: 8")
    parser.add_argument(
        "--workers", type=process_count, default=0, metavar="N", help="processes that read data; default: 0"
    )
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda")
    add_data_options(parser, generated=False)
    add_statistics_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Encode, and write."""
    from ..training.inference.encode import encode

    encoder, subjects = load_encoder(options, options.encoder)
    shape = encode(
        encoder,
        subjects,
        options.out,
        pool=options.pool,
        batch=options.batch,
        workers=options.workers,
        device=options.device,
    )
    print(f"{subjects!r}\nwrote features [{', '.join(map(str, shape))}] into {options.out}")
