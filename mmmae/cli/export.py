"""`mmmae export`: an encoder as a file that runs without this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, config_fields


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "export",
        help="write an encoder for torch.export or ONNX",
        description="Write an encoder as a program of torch.export (.pt2) or an ONNX model (.onnx) that runs without "
        "mmmae. The batch is of 1 or more; images must have the encoder's image_size. The file is compared with the "
        "encoder before it is written.",
    )
    parser.add_argument("encoder", type=Path, metavar="DIR", help="folder of an encoder or of a whole model")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="NAME.pt2 or NAME.onnx")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a config field, as in image_size=448; positions are resized",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Export, and say what came out."""
    from ..model.encoder import HSIEncoder
    from ..model.export import check_export, export_encoder

    check_export(options.out)
    encoder = HSIEncoder.from_pretrained(options.encoder, **config_fields(options.set))
    difference = export_encoder(encoder, options.out)
    config = encoder.config
    print(
        f"wrote {options.out}\n"
        f"hsi [batch, {config.in_channels}, {config.bands}, {config.image_size}, {config.image_size}] float32 "
        f"-> tokens [batch, {config.tokens}, {config.dim}] float32\n"
        f"largest difference from PyTorch, on random volumes: {difference:.1e}"
    )
