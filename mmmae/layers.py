"""The fast model's layers: the reference's parameters under the reference's names, computed by `mmmae_kernels`.

A residual stream travels as a pair (x, pending): the value is their sum, and the next norm adds them on its way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmmae_kernels import add_layer_norm, attention, gelu_linear, norm_linear

from .config import MMMAEConfig

EPSILON = 1e-6


class Attention(nn.Module):
    """Multi-head attention whose queries may be fewer than, and other than, its keys."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, norm: nn.LayerNorm, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """The settled stream `[B, N, D]`, and self-attention of its norm."""
        x, (q, k, v) = self._project(norm, x, pending, 0, 3)
        return x, self._mix(q, k, v, None)

    def of_tokens(self, norm: nn.LayerNorm, x: Tensor, pending: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The settled stream of the tokens `ids [B, M]` alone, and their attention to all; both `[B, M, D]`."""
        x, (k, v) = self._project(norm, x, pending, 1, 3)
        x, (q,) = self._project(norm, x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2])), None, 0, 1)
        return x, self._mix(q, k, v, None)

    def to_vectors(
        self, norm: nn.LayerNorm, x: Tensor, pending: Tensor | None, vectors: Tensor, guides: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The settled stream `[B, K, D]`, and its attention to itself and the vectors that `guides [B, m]` names."""
        x, (q, k, v) = self._project(norm, x, pending, 0, 3)
        _, (vector_k, vector_v) = self._project(norm, vectors, None, 1, 3)
        key_present = torch.cat([guides.new_ones(x.shape[:2]), guides], dim=1)
        return x, self._mix(q, torch.cat([k, vector_k], dim=1), torch.cat([v, vector_v], dim=1), key_present)

    def _project(
        self, norm: nn.LayerNorm, x: Tensor, pending: Tensor | None, start: int, stop: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The settled stream, and a part of q, k and v of its norm."""
        dim = self.proj.in_features
        parameters: tuple[Tensor, ...] = (self.qkv.weight, self.qkv.bias)
        if stop - start < 3:  # a slice of all would still be copied in backward
            parameters = tuple(parameter[start * dim : stop * dim] for parameter in parameters)
        weight, bias = parameters
        x, projected = norm_linear(x, pending, norm.weight, norm.bias, weight, bias, norm.eps)
        return x, self._split(projected, stop - start)

    def _split(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        batch, tokens, width = projected.shape
        head = width // (parts * self.heads)
        return projected.view(batch, tokens, parts, self.heads, head).unbind(2)  # [B, N, h, d] each

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> Tensor:
        mixed = attention(q, k, v, key_present=key_present, backend=self.backend)
        out: Tensor = self.proj(mixed.flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, norm: nn.LayerNorm, x: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
        """The settled stream, and the layers' output for its norm."""
        x, hidden = norm_linear(x, pending, norm.weight, norm.bias, self.fc1.weight, self.fc1.bias, norm.eps)
        return x, gelu_linear(hidden, self.fc2.weight, self.fc2.bias)


class Block(nn.Module):
    """Pre-norm transformer block on a residual stream (x, pending)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, backend: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPSILON)
        self.attn = Attention(dim, heads, backend)
        self.norm2 = nn.LayerNorm(dim, eps=EPSILON)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[B, N, D]` twice -> the same twice."""
        x, mixed = self.attn(self.norm1, x, pending)
        x, pending = self.mlp(self.norm2, x, mixed)
        return x, pending

    def of_tokens(self, x: Tensor, pending: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The stream of the tokens `ids [B, M]` alone after this block: `[B, M, D]` twice."""
        x, mixed = self.attn.of_tokens(self.norm1, x, pending, ids)
        x, pending = self.mlp(self.norm2, x, mixed)
        return x, pending


class Conditioning(nn.Module):
    """Guidance by concatenation: tokens attend to themselves and the auxiliary vectors a sample has."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPSILON)
        self.attn = Attention(dim, heads, backend)

    def forward(self, x: Tensor, pending: Tensor | None, vectors: Tensor, guides: Tensor) -> tuple[Tensor, Tensor]:
        """Stream `[B, K, D]` twice, vectors `[B, m, D]`, guides bool `[B, m]` -> stream `[B, K, D]` twice."""
        x, guidance = self.attn.to_vectors(self.norm, x, pending, vectors, guides)
        return x, torch.where(guides.any(dim=1)[:, None, None], guidance, 0.0)


class PatchEmbed(nn.Module):
    """Holds the projection of 3D patches; `mmmae_kernels.patch_embed` reads it."""

    def __init__(self, config: MMMAEConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.dim, kernel_size=config.patch, stride=config.patch)


def norm(layer: nn.LayerNorm, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
    """The settled stream and its norm."""
    return add_layer_norm(x, pending, layer.weight, layer.bias, layer.eps)
