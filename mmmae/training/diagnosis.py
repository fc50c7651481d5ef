"""Find where numbers leave their range: the largest activation of a forward pass, by layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..model.auxiliary import AuxiliaryEncoder
from ..model.fast import FastModel
from ..model.layers import Block, Conditioning, Stream, materialised


def largest_activation(model: FastModel, batch: Batch, seed: int) -> str:
    """Return a sentence with the largest finite activation and the first layer whose output is not finite.

    Runs the forward pass again, without gradients. If several processes train, all of them must call this.
    """
    found: list[tuple[str, float, bool]] = []  # by layer, in order: name, largest finite value, all finite
    layers = (Block, Conditioning, AuxiliaryEncoder)
    watched = [(name, module) for name, module in model.named_modules() if isinstance(module, layers)]
    handles = [module.register_forward_hook(_recorder(name, found)) for name, module in watched]
    broken = next((name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())), None)
    try:
        with torch.no_grad():  # a call, not `forward`: FSDP2's hooks gather the weights
            output = model(batch.hsi, batch.aux, batch.present, batch.valid, seed=seed)
    finally:
        for handle in handles:
            handle.remove()
    for name, tensor in (("latent", output.latent), ("prediction", output.prediction)):
        found.append((name, *_extent(tensor)))
    name, largest, _ = max(found, key=lambda entry: entry[1])
    sentence = f"the largest activation is {largest:.3g}, in {name}"
    first = next((name for name, _, finite in found if not finite), None)
    if first is not None:
        sentence += f", and the first that is not finite is in {first}"
    if broken is not None:
        sentence += f"; the weights of {broken} are not finite"
    return sentence


def _recorder(name: str, found: list[tuple[str, float, bool]]) -> Any:
    def record(module: nn.Module, arguments: object, result: Stream | Tensor) -> None:
        found.append((name, *_extent(materialised(result) if isinstance(result, Stream) else result)))

    return record


def _extent(tensor: Tensor) -> tuple[float, bool]:
    """Return the largest finite magnitude, and whether all values are finite."""
    finite = torch.isfinite(tensor)
    magnitude = tensor.detach().abs().masked_fill(~finite, 0.0)
    return (float(magnitude.max()) if tensor.numel() else -math.inf), bool(finite.all())
