"""Auxiliary encoders of the fast model, which encode an image of one modality to one vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmmae_kernels import patch_embed
from mmmae_kernels.transformer_block.op import BlockCall
from mmmae_kernels.transformer_block.plan import Plan
from mmmae_kernels.transformer_block.stacked import (
    plan_together,
    run_stacked_blocks,
    run_stacked_norm,
    stack_weights,
)

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
        return self.encode(self.prepare(image, present))

    def prepare(self, image: Tensor, present: Tensor) -> Tensor:
        """Return the image `[B, C, image_size, image_size]` of the samples that have it, and zeros for the others."""
        # NaN in an absent image would reach the gradients of the weights even through a zero gradient.
        dtype = next(self.parameters()).dtype
        image = torch.where(present[:, None, None, None], image.to(dtype), 0.0)
        return resize(image, self.image_size)

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
        stream = Stream(self.embed(image))
        for block in self.blocks:
            stream = block(*stream)
        return norm(self.norm, stream).mean(dim=1)

    def embed(self, image: Tensor) -> Tensor:
        """Return the tokens `[B, N, aux_dim]` of an image, with their positions added."""
        if is_plain(self.patch_embed, nn.Conv2d):  # an image is embedded as a volume of one band
            weight, bias = self.patch_embed.weight[:, :, None], self.patch_embed.bias
            return patch_embed(image[:, :, None], weight, bias, position=self.pos_embed.squeeze(0))
        embedded: Tensor = self.patch_embed(image)
        return embedded.flatten(2).transpose(1, 2) + self.pos_embed

    def is_plain(self) -> bool:
        """Return whether this encoder, its blocks and its norm are unchanged since they were made, and not compiled."""
        if self._compiled_call_impl is not None or not is_plain(self, AuxiliaryViT):
            return False
        if not is_plain(self.norm, nn.LayerNorm) or self.norm.eps != EPSILON:
            return False
        return len(self.blocks) > 0 and all(isinstance(block, Block) and block.is_plain() for block in self.blocks)

    def plain_blocks(self) -> list[Block]:
        """Return the blocks, which are all if they are plain."""
        return [block for block in self.blocks if isinstance(block, Block)]


class Together(NamedTuple):
    """Encoders that are computed as one, and the plan of each of their blocks."""

    encoders: tuple[AuxiliaryViT, ...]
    plans: tuple[Plan, ...]


def plan_encoders(encoders: Sequence[nn.Module]) -> Together | None:
    """Decide to compute encoders as one: unchanged ViTs of equal shape on a GPU. None means each by itself.

    Small ViTs make half of the launches of a step, and a few percent of its arithmetic. On a CPU, where a launch costs
    next to nothing, batched products would only be slower. In a compiled graph each encoder runs by itself too.
    """
    if torch.compiler.is_compiling():
        return None
    vits: list[AuxiliaryViT] = []
    for encoder in encoders:
        if not (isinstance(encoder, AuxiliaryViT) and encoder.is_plain()):
            return None
        vits.append(encoder)
    if len(vits) < 2 or len({_kind(encoder) for encoder in vits}) > 1:
        return None
    plans: list[Plan] = []
    for blocks in zip(*(encoder.plain_blocks() for encoder in vits), strict=True):
        heads, backend = blocks[0].attn.heads, blocks[0].attn.backend
        calls = [BlockCall(vits[0].pos_embed, None, None, block.weights()[0], heads, None, EPSILON) for block in blocks]
        plan = plan_together(calls, backend)
        if plan is None:
            return None
        plans.append(plan)
    return Together(tuple(vits), tuple(plans))


def _kind(encoder: AuxiliaryViT) -> tuple[object, ...]:
    """Return what has to be equal in encoders that are computed as one, except what `plan_together` compares."""
    others = (encoder.pos_embed, encoder.norm.weight, encoder.norm.bias)
    attentions = tuple((block.attn.heads, block.attn.backend) for block in encoder.plain_blocks())
    return *((parameter.shape, parameter.dtype, parameter.device) for parameter in others), attentions


def encode_together(together: Together, images: Iterable[Tensor], presence: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Encode an image of each encoder, as `AuxiliaryViT.forward` does; return a vector `[B, aux_dim]` of each."""
    encoders, plans = together
    embedded = [
        encoder.embed(encoder.prepare(image, present))
        for encoder, image, present in zip(encoders, images, presence, strict=True)
    ]
    blocks = [*zip(*(encoder.plain_blocks() for encoder in encoders), strict=True)]
    parameters = [[block.weights() for block in alike] for alike in blocks]
    norms = [[encoder.norm.weight for encoder in encoders], [encoder.norm.bias for encoder in encoders]]
    weights, (norm_weight, norm_bias) = stack_weights(parameters, norms, plans[0].dtype)
    x = torch.cat(embedded)  # [encoders * B, N, D]
    residual, bias = None, None
    for stacked, plan, (block, *_) in zip(weights, plans, blocks, strict=True):
        x, residual = run_stacked_blocks(x, residual, bias, stacked, block.attn.heads, EPSILON, plan)
        bias = stacked.last_bias
    vectors = run_stacked_norm(x, residual, bias, norm_weight, norm_bias, EPSILON).mean(dim=1)
    return vectors.chunk(len(encoders))


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
