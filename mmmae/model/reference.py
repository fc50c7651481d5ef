"""The definition of the model in plain PyTorch: one file, nothing fused, everything computed for all tokens.

The fast model is compared with it and timed against it. The two share the config, the checks of inputs and the drawing
of masks, but no computation. Shapes: B samples, N tokens, K of them visible, M masked, M' of these predicted,
D channels, m auxiliary images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmmae_kernels import TokenMask

from ..config import MMMAEConfig, resolve_config
from .initialisation import initialise
from .inputs import Output, check_aux, check_hsi, check_valid, decoded_ids, draw_conditioning, draw_mask, draw_seed

VALID_SHARE = 0.3  # a token with a smaller share of valid pixels does not count in the reconstruction loss


def reference_model(
    config: MMMAEConfig | str = "base", *, attention: str = "eager", **overrides: Any
) -> ReferenceModel:
    """Make a freshly initialised reference model, in plain PyTorch.

    Args:
        config: a config, or the name of a preset: `base`, `vit` or `tiny`.
        attention: `eager` holds the attention scores in memory, `sdpa` calls PyTorch's fused attention.
        overrides: config fields to change.
    """
    return ReferenceModel(resolve_config(config, **overrides), attention)


class ReferenceModel(nn.Module):
    """Multi-modal guided masked autoencoder in plain PyTorch.

    MAE (He et al., 2022) with SpectralGPT's 3D tokens (Hong et al., 2024), guided by auxiliary images. It runs in one
    process; the fast model on several ranks gives the numbers that this model gives for their joined batch.
    """

    def __init__(self, config: MMMAEConfig, attention: str = "eager") -> None:
        super().__init__()
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"attention is {attention!r}, must be one of eager, sdpa")
        self.config = config
        groups, rows, columns = config.grid
        dim, width = config.dim, config.decoder_dim
        ratio, recompute = config.plain_mlp_ratio, config.activation_checkpointing

        self.patch_embed = PatchEmbed(config)
        self.pos_embed_spatial = nn.Parameter(torch.empty(1, rows * columns, dim))
        self.pos_embed_spectral = nn.Parameter(torch.empty(1, groups, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, config.mlp_ratio, attention, recompute) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        aux_encoder = AUX_ENCODERS[config.aux_encoder]
        self.aux_encoders = nn.ModuleDict(
            {name: aux_encoder(config, channels, attention) for name, channels in config.aux.items()}
        )
        self.aux_projections = nn.ModuleDict({name: nn.Linear(config.aux_dim, dim) for name in config.aux})
        depth = config.conditioning_depth if config.aux else 0
        self.conditioning = nn.ModuleList(Conditioning(dim, config.heads, attention) for _ in range(depth))

        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed_spatial = nn.Parameter(torch.empty(1, rows * columns, width))
        self.decoder_pos_embed_spectral = nn.Parameter(torch.empty(1, groups, width))
        self.decoder_blocks = nn.ModuleList(
            Block(width, config.decoder_heads, ratio, attention, recompute) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, config.target_dim)

        if config.aux:
            self.contrastive_head = nn.Linear(dim, config.aux_dim)
        initialise(self, config)

    def forward(
        self,
        hsi: Tensor,
        aux: Mapping[str, Tensor | None] | None = None,
        present: Mapping[str, Tensor] | None = None,
        valid: Tensor | None = None,
        *,
        mask: TokenMask | None = None,
        seed: int | Tensor | None = None,
    ) -> Output:
        """Mask, encode, condition and decode a batch, and compute its loss.

        Arguments and results are those of `FastModel.forward`.
        """
        check_hsi(self.config, hsi, self.pos_embed_spatial.device)
        images, presence = check_aux(self.config, hsi, aux, present)
        check_valid(hsi, valid)
        seed = draw_seed() if seed is None else seed
        mask = draw_mask(self.config, hsi, mask, seed)
        ids_predicted = decoded_ids(self.config, mask)  # [B, M']

        # 1, 2: registration, embedding and position of all tokens, then the visible ones
        volume = resize_volume(hsi, self.config.image_size)
        embedded = self.patch_embed(volume)  # [B, N, D]
        tokens = _take(embedded + _position(self.pos_embed_spectral, self.pos_embed_spatial), mask.ids_keep)

        # 3, 4: one vector for each modality, and one attention from the tokens to tokens and vectors
        dtype = self.patch_embed.proj.weight.dtype
        vectors = {
            name: self.aux_encoders[name](resize_image(image.to(dtype), presence[name], self.config.image_size))
            for name, image in images.items()
        }  # [B, aux_dim] each
        if vectors:
            guides = draw_conditioning(self.config, presence, seed, training=self.training)  # [B, m]
            stacked = torch.stack([self.aux_projections[name](vector) for name, vector in vectors.items()], dim=1)
            for step in self.conditioning:
                tokens = step(tokens, stacked, guides)

        # 5: encoder
        for block in self.blocks:
            tokens = block(tokens)
        latent = self.norm(tokens)  # [B, K, D]

        # 6, 7: decoder over visible and predicted tokens, prediction, target and loss
        target = self.target(volume, embedded)
        predicted = self.decode(latent, mask, ids_predicted)  # [B, N, target_dim]
        error = (predicted - target).square().mean(-1)  # [B, N]
        weights = torch.zeros_like(error).scatter(1, ids_predicted, 1.0) * token_weights(self.config, hsi, valid)
        reconstruction = (error * weights).sum() / weights.sum().clamp(min=1)

        # 8: contrastive
        contrastive = self.contrast(latent, vectors, presence)
        loss = reconstruction + self.config.contrastive_weight * contrastive
        return Output(loss, reconstruction, contrastive, _take(predicted, ids_predicted), latent, mask)

    def decode(self, latent: Tensor, mask: TokenMask, ids_predicted: Tensor) -> Tensor:
        """Predict all tokens, `[B, N, target_dim]`, from the visible ones, `latent [B, K, D]`.

        With a `decode_fraction` below 1 the decoder sees only the visible tokens and `ids_predicted [B, M']`, and the
        prediction of all others is 0.
        """
        visible = self.decoder_embed(latent)
        batch, masked = mask.ids_masked.shape
        tokens = torch.cat([visible, self.mask_token.expand(batch, masked, -1)], dim=1)
        tokens = _take(tokens, mask.ids_restore)
        tokens = tokens + _position(self.decoder_pos_embed_spectral, self.decoder_pos_embed_spatial)
        is_part = self.config.decode_fraction < 1
        if is_part:
            seen = torch.cat([mask.ids_keep, ids_predicted], dim=1)  # [B, K + M']
            tokens = _take(tokens, seen)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        predicted: Tensor = self.decoder_pred(self.decoder_norm(tokens))
        if is_part:
            nothing = predicted.new_zeros(batch, self.config.tokens, predicted.shape[2])
            predicted = nothing.scatter(1, seen[:, :, None].expand_as(predicted), predicted)
        return predicted

    def target(self, volume: Tensor, embedded: Tensor) -> Tensor:
        """Return what the decoder has to predict, `[B, N, target_dim]`, without a gradient."""
        target = embedded.detach()
        if self.config.target == "pixels":
            target = patches(volume.detach(), self.config.patch)
        if self.config.normalize_target:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return target

    def contrast(self, latent: Tensor, vectors: Mapping[str, Tensor], presence: Mapping[str, Tensor]) -> Tensor:
        """Compute InfoNCE between each sample's mean token and its auxiliary vectors, averaged over the modalities."""
        losses = []
        for name, vector in vectors.items():
            samples = presence[name].nonzero().flatten()  # that have the modality
            if len(samples) == 0:
                continue
            query = F.normalize(self.contrastive_head(latent.mean(1)), dim=-1)[samples]
            logits = query @ F.normalize(vector, dim=-1)[samples].T / self.config.temperature
            own = torch.arange(len(samples), device=logits.device)
            loss = F.cross_entropy(logits, own)
            if self.config.symmetric:
                loss = (loss + F.cross_entropy(logits.T, own)) / 2
            losses.append(loss)
        return torch.stack(losses).mean() if losses else latent.new_zeros(())

    def hsi_encoder(self) -> ReferenceEncoder:
        """Return the HSI encoder alone, over all tokens; it shares this model's parameters."""
        return ReferenceEncoder(self)


class ReferenceEncoder(nn.Module):
    """Registration, patch embedding, positions and blocks of a `ReferenceModel`, without masking and guidance."""

    def __init__(self, model: ReferenceModel) -> None:
        super().__init__()
        self.config = model.config
        self.patch_embed = model.patch_embed
        self.pos_embed_spatial, self.pos_embed_spectral = model.pos_embed_spatial, model.pos_embed_spectral
        self.blocks, self.norm = model.blocks, model.norm

    def forward(self, hsi: Tensor) -> Tensor:
        """Encode `[B, C, T, H, W]` to tokens `[B, N, D]`."""
        tokens, _ = self.forward_intermediates(hsi, ())
        return tokens

    def forward_intermediates(
        self, hsi: Tensor, indices: Sequence[int], *, normalize: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode, and return the outputs of some blocks too, as `HSIEncoder.forward_intermediates` does."""
        check_hsi(self.config, hsi, self.pos_embed_spatial.device)
        tokens = self.patch_embed(resize_volume(hsi, self.config.image_size))
        tokens = tokens + _position(self.pos_embed_spectral, self.pos_embed_spatial)
        outputs = []
        for block in self.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        maps = [self.norm(outputs[index]) if normalize else outputs[index] for index in indices]  # [B, N, D]
        return self.norm(tokens), [each.transpose(1, 2).unflatten(2, self.config.grid) for each in maps]


class PatchEmbed(nn.Module):
    """Non-overlapping 3D patches, linearly embedded."""

    def __init__(self, config: MMMAEConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.dim, kernel_size=config.patch, stride=config.patch)

    def forward(self, volume: Tensor) -> Tensor:
        embedded: Tensor = self.proj(volume.to(self.proj.weight.dtype))  # [B, D, t, h, w]
        return embedded.flatten(2).transpose(1, 2)  # [B, N, D]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, attention: str) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, key_present: Tensor | None = None) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B, h, N, d]
        allowed = None if key_present is None else key_present[:, None, None, :]
        if self.attention == "sdpa":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, h, N, N]
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -math.inf)
            mixed = scores.softmax(dim=-1) @ v
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block; with `recompute`, training keeps its input alone and backward recomputes the rest."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, attention: str, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, attention)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(self.transform, x, use_reentrant=False)
            return recomputed
        return self.transform(x)

    def transform(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class Conditioning(nn.Module):
    """Guidance by concatenation: tokens and vectors attend to each other, and only the tokens are kept."""

    def __init__(self, dim: int, heads: int, attention: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, attention)

    def forward(self, tokens: Tensor, vectors: Tensor, guides: Tensor) -> Tensor:
        keep = tokens.shape[1]
        joined = torch.cat([tokens, vectors], dim=1)  # [B, K + m, D]
        key_present = torch.cat([guides.new_ones(len(guides), keep), guides], dim=1)
        guided = tokens + self.attn(self.norm(joined), key_present)[:, :keep]
        return torch.where(guides.any(dim=1)[:, None, None], guided, tokens)


class AuxiliaryViT(nn.Module):
    """A small ViT that encodes an image to one vector."""

    def __init__(self, config: MMMAEConfig, channels: int, attention: str) -> None:
        super().__init__()
        dim, patch = config.aux_dim, config.aux_patch
        self.patch_embed = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.empty(1, (config.image_size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.aux_heads, config.plain_mlp_ratio, attention) for _ in range(config.aux_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.patch_embed(image).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        encoded: Tensor = self.norm(tokens)
        return encoded.mean(dim=1)  # [B, aux_dim]


class AuxiliaryCNN(nn.Module):
    """A small pre-activation ResNet (He et al., 2016) that encodes an image to one vector.

    A stem of stride aux_patch / 4, then three stages of aux_dim / 4, aux_dim / 2 and aux_dim channels, each half the
    size of the one before; aux_depth blocks are spread over them. Group norm keeps the samples of a batch independent.
    """

    def __init__(self, config: MMMAEConfig, channels: int, attention: str) -> None:
        super().__init__()
        stride = config.aux_patch // 4
        widths = [config.aux_dim // 4, config.aux_dim // 2, config.aux_dim]
        self.stem = nn.Conv2d(channels, widths[0], kernel_size=stride, stride=stride)
        layers: list[nn.Module] = []
        for stage, width in enumerate(widths):
            if stage > 0:
                layers.append(nn.Conv2d(widths[stage - 1], width, kernel_size=2, stride=2, padding=0))
            layers += [ResidualBlock(width) for _ in range((config.aux_depth + 2 - stage) // 3)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.GroupNorm(GROUPS, widths[-1])

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = F.gelu(self.norm(self.layers(self.stem(image))))
        return features.mean(dim=(2, 3))  # [B, aux_dim]


class ResidualBlock(nn.Module):
    """Norm, GELU, 3 x 3 convolution, twice, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)  # a norm follows
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.gelu(self.norm1(x)))
        out: Tensor = x + self.conv2(F.gelu(self.norm2(hidden)))
        return out


GROUPS = 8  # of the group norms
AUX_ENCODERS = {"vit": AuxiliaryViT, "cnn": AuxiliaryCNN}


def resize_volume(hsi: Tensor, size: int) -> Tensor:
    """Resize `[B, C, T, H, W]` to `[B, C, T, size, size]`, bilinearly within each band."""
    if hsi.shape[-2:] == (size, size):
        return hsi
    bands = F.interpolate(hsi.flatten(1, 2), size=(size, size), mode="bilinear", align_corners=False)
    return bands.reshape(*hsi.shape[:3], size, size)


def resize_image(image: Tensor, present: Tensor, size: int) -> Tensor:
    """Resize `[B, C, H, W]` bilinearly to `[B, C, size, size]`, with zeros for samples that lack the image."""
    image = torch.where(present[:, None, None, None], image, 0.0)
    if image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image, size=(size, size), mode="bilinear", align_corners=False)


def patches(volume: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cut `[B, C, T, H, W]` into patches, and return their pixels, `[B, N, C*pt*ph*pw]`."""
    pt, ph, pw = patch
    rows = volume.unfold(2, pt, pt).unfold(3, ph, ph).unfold(4, pw, pw)  # [B, C, t, h, w, pt, ph, pw]
    return rows.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(1, 3)


def token_weights(config: MMMAEConfig, hsi: Tensor, valid: Tensor | None) -> Tensor:
    """Return `[B, N]`: 1 for tokens with enough valid pixels, else 0."""
    groups, rows, columns = config.grid
    if valid is None:
        return hsi.new_ones(len(hsi), config.tokens)
    size = config.image_size
    share = valid.to(torch.float32)[:, None]
    if valid.shape[1:] != (size, size):
        share = F.interpolate(share, size=(size, size), mode="bilinear", align_corners=False)
    share = F.avg_pool2d(share, kernel_size=config.patch[1:])  # [B, 1, h, w]
    enough = (share >= VALID_SHARE).to(hsi.dtype)
    return enough.expand(-1, groups, rows, columns).flatten(1)


def _take(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def _position(spectral: Tensor, spatial: Tensor) -> Tensor:
    return (spectral[:, :, None] + spatial[:, None]).flatten(1, 2)  # [1, N, D], token t*h*w-major
