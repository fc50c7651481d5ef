"""`mmmae import`: an encoder from the checkpoint of another network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from ..text import printable
from .output import say

if TYPE_CHECKING:
    from ..model.encoder import HSIEncoder
    from ..model.imports import Entry


def run(
    checkpoint: Positional[Path],
    *,
    out: Path,
    heads: int | None = None,
    image_size: int | None = None,
    bands: int | None = None,
    patch_bands: int | None = None,
) -> None:
    """Make the folder of an encoder from the checkpoint of another network, and list what became of its weights.

    The networks are SpectralGPT, ViTs of MAE and timm, SatMAE, HyperSIGMA and SpectralEarth; the names of the weights
    tell which. A file that holds more than tensors and plain values is refused.

    Args:
        checkpoint: a file of PyTorch, or NAME.safetensors
        out: the encoder's folder
        heads: attention heads; None: as many as are 64 wide, or 16 where large ViTs have 16
        image_size: resize position embeddings to images of this many pixels; None: the checkpoint's
        bands: resize position embeddings to this many bands; None: the checkpoint's
        patch_bands: adapt the patch kernel to this many bands of a token; None: the checkpoint's
    """
    from ..model.imports import import_encoder

    sizes = {"image_size": image_size, "bands": bands, "patch_bands": patch_bands}
    _write(out, lambda: import_encoder(checkpoint, heads=heads, **sizes))


def run_spectralgpt(
    checkpoint: Positional[Path],
    *,
    out: Path,
    heads: int | None = None,
    image_size: int | None = None,
    bands: int | None = None,
) -> None:
    """Do what `mmmae import` does, for a checkpoint of SpectralGPT only.

    Args:
        checkpoint: a file of PyTorch, or NAME.safetensors
        out: the encoder's folder
        heads: attention heads; None: as many as are 64 wide
        image_size: resize position embeddings to images of this many pixels; None: the checkpoint's
        bands: resize position embeddings to this many bands; None: the checkpoint's
    """
    from ..model.imports import import_spectralgpt

    _write(out, lambda: import_spectralgpt(checkpoint, heads=heads, image_size=image_size, bands=bands))


def _write(out: Path, load: Callable[[], tuple[HSIEncoder, list[Entry]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..files import check_can_write

    check_can_write(out)
    encoder, entries = load()
    table = Table("in the file", "weights", "outcome", "", box=None, pad_edge=False)
    for entry in entries:
        cells = entry.name, entry.weights, entry.outcome, entry.reason
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console().print(table)
    encoder.save_pretrained(out)
    config = encoder.config
    pt, ph, pw = config.patch
    say(
        f"wrote {out}: {config.depth} blocks, width {config.dim}, {config.heads} heads, "
        f"{config.bands} bands of {config.image_size} x {config.image_size} pixels in patches of {pt} x {ph} x {pw}"
    )
