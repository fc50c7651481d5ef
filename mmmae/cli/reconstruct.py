"""`mmmae reconstruct`: pictures and errors of what a pretrained model predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import check_can_write
from ..precision import Precision
from .options import colours
from .output import say
from .trained import TrainedDataOptions, trained_subjects


def run(
    data: TrainedDataOptions,
    *,
    model: Path,
    out: Path,
    first: int | None = None,
    seed: int = 0,
    mask_ratio: float | None = None,
    rgb: tuple[int, ...] | None = None,
    device: str = "cpu",
    precision: Precision = "auto",
) -> None:
    """Draw what a model predicts, and write its errors band by band.

    Args:
        model: folder of a pretrained model, as RUN/model
        out: folder for pictures and errors.csv
        first: only the first so many subjects; None: all
        seed: seed of the masks
        mask_ratio: share of the tokens that is masked; None: the model's
        rgb: bands that pictures show as red, green and blue
        device: cpu or cuda
        precision: 32 bits, or autocast to bf16 or 16 bits; auto: bf16 where it is faster
    """
    from ..model.fast import FastModel
    from ..training.inference.encode import usable_device
    from ..training.inference.reconstruct import ALL, reconstruct

    shown = colours(rgb)
    if not 0 <= seed < 2**31:
        raise ValueError(f"--seed is {seed}, expected 0..2^31-1")
    check_can_write(out)
    changes: dict[str, Any] = {} if mask_ratio is None else {"mask_ratio": mask_ratio}
    loaded = FastModel.from_pretrained(model, **changes).to(usable_device(device))
    subjects = trained_subjects(data, loaded.config, model)
    for row in reconstruct(loaded, subjects, out, first=first, seed=seed, rgb=shown, precision=precision):
        if row["subject"] == ALL:
            print("  ".join(f"{name} {value}" for name, value in list(row.items())[1:] if value != ""))
    say(f"wrote pictures and errors.csv into {out}")
