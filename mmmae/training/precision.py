"""Lightning's side of a run's precision: the device that it follows from, and the plugin that casts."""

from __future__ import annotations

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision


def find_device(name: str, number: int = 0) -> torch.device:
    """Return the device of a process: the GPU of this number if there is one, unless `name` is `cpu`."""
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", number)


def precision_plugin(precision: str, device: torch.device) -> Precision:
    """Return Lightning's plugin for the precision `32`, `bf16` or `16`, the last one with a loss scaler."""
    if precision == "32":
        return Precision()
    # By hand, because Lightning would take bf16 for fp16 on a CPU.
    half = precision == "16"
    scaler = torch.amp.GradScaler(device.type) if half else None
    return MixedPrecision("16-mixed" if half else "bf16-mixed", device.type, scaler)
