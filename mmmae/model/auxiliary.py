"""Auxiliary encoders of the fast model, which encode an image of one modality to one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmmae_kernels import patch_embed

from ..config import MMMAEConfig
from .layers import EPSILON, Block, Stream, is_plain, norm
from .resize import resize

GROUPS = 8  # of the group norms; with batch norm a sample's result would depend on the rest of the batch


class AuxiliaryEncoder(nn.Module):
    """Base class of the auxiliary encoders, which resizes images and replaces absent ones by zeros."""

    def __init__(self, config: MMMAEConfig) -> None:
        super().__init__()
        self.image_size = config.image_size

    def forward(self, image: Tensor, present: Tensor) -> Tensor:
        """Encode `image [B, C, H, W]`, which the samples in `present [B]` have, to `[B, aux_dim]`.

        The vectors of the other samples have no meaning.
        """
        # NaN in an absent image would reach the gradients of the weights even through a zero gradient.
        dtype = next(self.parameters()).dtype
        image = torch.where(present[:, None, None, None], image.to(dtype), 0.0)
        return self.encode(resize(image, self.image_size))

    def encode(self, image: Tensor) -> Tensor:
        """Encode `[B, C, image_size, image_size]` to `[B, aux_dim]`."""
        raise NotImplementedError


class AuxiliaryViT(AuxiliaryEncoder):
    """A small ViT, averaged over its tokens."""

    def __init__(self, config: MMMAEConfig, channels: int, backend: str) -> None:
        super().__init__(config)
        dim, patch = config.aux_dim, config.aux_patch
        self.patch_embed = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.empty(1, (config.image_size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.aux_heads, config.plain_mlp_ratio, backend) for _ in range(config.aux_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=EPSILON)

    def encode(self, image: Tensor) -> Tensor:
        if is_plain(self.patch_embed, nn.Conv2d):  # an image is embedded as a volume of one band
            weight, bias = self.patch_embed.weight[:, :, None], self.patch_embed.bias
            stream = Stream(patch_embed(image[:, :, None], weight, bias, position=self.pos_embed[0]))
        else:
            stream = Stream(self.patch_embed(image).flatten(2).transpose(1, 2) + self.pos_embed)
        for block in self.blocks:
            stream = block(*stream)
        return norm(self.norm, stream).mean(dim=1)


class AuxiliaryCNN(AuxiliaryEncoder):
    """A small pre-activation ResNet of three stages, averaged over its pixels."""

    def __init__(self, config: MMMAEConfig, channels: int, backend: str) -> None:
        super().__init__(config)
        stride = config.aux_patch // 4
        widths = [config.aux_dim // 4, config.aux_dim // 2, config.aux_dim]
        self.stem = nn.Conv2d(channels, widths[0], kernel_size=stride, stride=stride)
        self.layers = nn.Sequential()
        for stage, width in enumerate(widths):
            if stage > 0:
                self.layers.append(nn.Conv2d(widths[stage - 1], width, kernel_size=2, stride=2))
            self.layers.extend(ResidualBlock(width) for _ in range((config.aux_depth + 2 - stage) // 3))
        self.norm = nn.GroupNorm(GROUPS, widths[-1])

    def encode(self, image: Tensor) -> Tensor:
        features: Tensor = F.gelu(self.norm(self.layers(self.stem(image))))
        return features.mean(dim=(2, 3))


class ResidualBlock(nn.Module):
    """Norm, GELU, 3 x 3 convolution, twice, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)  # a norm follows
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `[B, C, H, W]`; the shape stays the same."""
        hidden = self.conv1(F.gelu(self.norm1(x)))
        out: Tensor = x + self.conv2(F.gelu(self.norm2(hidden)))
        return out


AUX_ENCODERS = {"vit": AuxiliaryViT, "cnn": AuxiliaryCNN}
