"""Initial weights, the same for every model of this package."""

from __future__ import annotations

import torch
from torch import nn

from ..config import MMMAEConfig
from .position import wavelength_embedding


def initialise(model: nn.Module, config: MMMAEConfig) -> None:
    """Initialise a model as MAE does, and its positions as SpectralGPT does.

    Linear layers and patch embeddings, taken as linear layers, are drawn by Xavier's rule. Spectral positions start
    from the wavelengths if the config has them.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)) or (isinstance(module, nn.Conv2d) and module.stride != (1, 1)):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if "pos_embed" in name or name == "mask_token":
            nn.init.trunc_normal_(parameter, std=0.02)  # drawn even if replaced below: other weights stay the same
        if name.endswith("pos_embed_spectral") and config.wavelengths is not None:
            with torch.no_grad():
                parameter.copy_(wavelength_embedding(config.wavelengths, config.patch[0], parameter.shape[2]))
