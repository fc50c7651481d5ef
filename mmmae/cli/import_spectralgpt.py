"""`mmmae import-spectralgpt`: an encoder from a checkpoint of SpectralGPT."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "import-spectralgpt",
        help="make an encoder of a SpectralGPT checkpoint",
        description="Make the folder of an encoder from a checkpoint of SpectralGPT, and list what became of each of "
        "its weights. A file that holds more than tensors and plain values is refused.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="FILE", help="of PyTorch, or NAME.safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the encoder's folder")
    parser.add_argument("--heads", type=int, metavar="N", help="of attention; default: each is 64 wide")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="resize positions; default: the checkpoint's")
    parser.add_argument("--bands", type=int, metavar="T", help="resize positions; default: the checkpoint's")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Import, list and write."""
    from rich.console import Console
    from rich.table import Table

    from ..files import check_can_write
    from ..model.spectralgpt import import_spectralgpt

    check_can_write(options.out)
    encoder, entries = import_spectralgpt(
        options.checkpoint, heads=options.heads, image_size=options.image_size, bands=options.bands
    )
    table = Table("in the file", "weights", "outcome", "", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(entry.name, str(entry.weights), entry.outcome, entry.reason)
    Console().print(table)
    encoder.save_pretrained(options.out)
    config = encoder.config
    pt, ph, pw = config.patch
    print(
        f"wrote {options.out}: {config.depth} blocks, width {config.dim}, {config.heads} heads, "
        f"{config.bands} bands of {config.image_size} x {config.image_size} pixels in patches of {pt} x {ph} x {pw}"
    )
