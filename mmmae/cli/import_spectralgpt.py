"""`mmmae import-spectralgpt`: an encoder from a SpectralGPT checkpoint."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional


def run(
    checkpoint: Positional[Path],
    *,
    out: Path,
    heads: int | None = None,
    image_size: int | None = None,
    bands: int | None = None,
) -> None:
    """Make the folder of an encoder from a SpectralGPT checkpoint, and list what became of each of its weights.

    A file that holds more than tensors and plain values is refused.

    Args:
        checkpoint: a file of PyTorch, or NAME.safetensors
        out: the encoder's folder
        heads: attention heads; None: as many as are 64 wide
        image_size: resize position embeddings to images of this many pixels; None: the checkpoint's
        bands: resize position embeddings to this many bands; None: the checkpoint's
    """
    from rich.console import Console
    from rich.table import Table

    from ..files import check_can_write
    from ..model.spectralgpt import import_spectralgpt

    check_can_write(out)
    encoder, entries = import_spectralgpt(checkpoint, heads=heads, image_size=image_size, bands=bands)
    table = Table("in the file", "weights", "outcome", "", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(entry.name, str(entry.weights), entry.outcome, entry.reason)
    Console().print(table)
    encoder.save_pretrained(out)
    config = encoder.config
    pt, ph, pw = config.patch
    print(
        f"wrote {out}: {config.depth} blocks, width {config.dim}, {config.heads} heads, "
        f"{config.bands} bands of {config.image_size} x {config.image_size} pixels in patches of {pt} x {ph} x {pw}"
    )
