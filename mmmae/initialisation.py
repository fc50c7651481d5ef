"""Initial weights, the same for every model of this package."""

from __future__ import annotations

from torch import nn


def initialise(model: nn.Module) -> None:
    """As in MAE: Xavier for linear layers and for patch embeddings, seen as linear; positions as in SpectralGPT."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)) or (isinstance(module, nn.Conv2d) and module.stride != (1, 1)):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if "pos_embed" in name or name == "mask_token":
            nn.init.trunc_normal_(parameter, std=0.02)
