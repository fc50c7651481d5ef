"""`mmmae export`: an encoder or a fine-tuned model as a file that runs without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from .options import Fields, config_fields
from .output import say
from .trained import STATISTICS


def run(folder: Positional[Path | None] = None, *, model: Path | None = None, out: Path, fields: Fields) -> None:
    """Write a model as a program of torch.export (.pt2) or an ONNX model (.onnx) that runs without mmmae.

    The batch may have any size from 1; images must have the encoder's image_size. The file is compared with the model
    before it is written, and holds the statistics by which its input has to be normalised, and the names of classes.

    Args:
        folder: folder of an encoder, of a whole model, whose encoder is written, or of a fine-tuned model
        model: the same, as other commands name it
        out: NAME.pt2 or NAME.onnx
        fields: change a config field of an encoder, as in image_size=448; position embeddings are resized
    """
    if (folder is None) == (model is None):
        raise ValueError("expected the folder of one model, as in mmmae export RUN/model")
    model = folder or model
    assert model is not None
    from ..data import Normalization
    from ..model.encoder import HSIEncoder
    from ..model.export import check_export, export_encoder, export_finetuned
    from ..model.finetuned import is_finetuned, load_finetuned, read_finetuned, task_of

    check_export(out)
    statistics = model / STATISTICS
    known: dict[str, Any] = {}
    if statistics.exists():
        known["normalization"] = Normalization.load(statistics).to_json()
    if is_finetuned(model):
        if fields:
            raise ValueError("--set is for encoders: the head of a fine-tuned model fits its own encoder alone")
        finetuned, classes = load_finetuned(model)
        stored = read_finetuned(model)
        known |= {"numbers": stored.numbers, "window": stored.window if stored.task == "pixels" else None}
        difference = export_finetuned(finetuned, classes, out, **known)
        config = finetuned.encoder.config
        size = f", {config.image_size}, {config.image_size}" if task_of(finetuned) == "segmentation" else ""
        made = f"logits [batch, {len(classes)}{size}]"
    else:
        encoder = HSIEncoder.from_pretrained(model, **config_fields(fields))
        difference = export_encoder(encoder, out, **known)
        config = encoder.config
        made = f"tokens [batch, {config.tokens}, {config.dim}]"
    say(f"wrote {out}")
    print(
        f"hsi [batch, {config.in_channels}, {config.bands}, {config.image_size}, {config.image_size}] float32 "
        f"-> {made} float32\n"
        f"largest difference from PyTorch, on random volumes: {difference:.1e}"
    )
