"""`mmmae export`: an encoder as a file that runs without this package."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from .options import Fields, config_fields


def run(encoder: Positional[Path], *, out: Path, fields: Fields) -> None:
    """Write an encoder as a program of torch.export (.pt2) or an ONNX model (.onnx) that runs without mmmae.

    The batch may have any size from 1; images must have the encoder's image_size. The file is compared with the
    encoder before it is written.

    Args:
        encoder: folder of an encoder or of a whole model
        out: NAME.pt2 or NAME.onnx
        fields: change a config field, as in image_size=448; position embeddings are resized
    """
    from ..model.encoder import HSIEncoder
    from ..model.export import check_export, export_encoder

    check_export(out)
    model = HSIEncoder.from_pretrained(encoder, **config_fields(fields))
    difference = export_encoder(model, out)
    config = model.config
    print(
        f"wrote {out}\n"
        f"hsi [batch, {config.in_channels}, {config.bands}, {config.image_size}, {config.image_size}] float32 "
        f"-> tokens [batch, {config.tokens}, {config.dim}] float32\n"
        f"largest difference from PyTorch, on random volumes: {difference:.1e}"
    )
