"""The fast model's layers: the reference's parameters under the reference's names, computed by `mmmae_kernels`.

A residual stream travels as a pair (x, pending): the value is their sum, and the next norm adds them on its way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmmae_kernels import add_layer_norm, attention

from .config import MMMAEConfig

EPSILON = 1e-6


class Attention(nn.Module):
    """Multi-head attention whose queries may be fewer than, and other than, its keys."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention, `[B, N, D]` -> `[B, N, D]`."""
        q, k, v = self._split(self.qkv(x), 3)
        return self._mix(q, k, v, None)

    def from_queries(self, queries: Tensor, x: Tensor) -> Tensor:
        """Attention of some rows `[B, M, D]` to all rows `[B, N, D]`: projects no query of the others."""
        (q,) = self._split(F.linear(queries, *self._rows(0, 1)), 1)
        k, v = self._split(F.linear(x, *self._rows(1, 3)), 2)
        return self._mix(q, k, v, None)

    def to_vectors(self, x: Tensor, vectors: Tensor, guides: Tensor) -> Tensor:
        """Attention of tokens `[B, K, D]` to themselves and the vectors `[B, m, D]` that `guides [B, m]` names."""
        q, k, v = self._split(self.qkv(x), 3)
        vector_k, vector_v = self._split(F.linear(vectors, *self._rows(1, 3)), 2)
        key_present = torch.cat([guides.new_ones(x.shape[:2]), guides], dim=1)
        return self._mix(q, torch.cat([k, vector_k], dim=1), torch.cat([v, vector_v], dim=1), key_present)

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a part of q, k and v."""
        dim = self.proj.in_features
        return self.qkv.weight[start * dim : stop * dim], self.qkv.bias[start * dim : stop * dim]

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

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


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
        x, normed = norm(self.norm1, x, pending)
        x, normed = norm(self.norm2, x, self.attn(normed))
        return x, self.mlp(normed)

    def of_tokens(self, x: Tensor, pending: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The stream of the tokens `ids [B, M]` alone after this block: `[B, M, D]` twice."""
        x, normed = norm(self.norm1, x, pending)
        rows = ids[:, :, None].expand(-1, -1, x.shape[2])
        mixed = self.attn.from_queries(normed.gather(1, rows), normed)
        x, normed = norm(self.norm2, x.gather(1, rows), mixed)
        return x, self.mlp(normed)


class Conditioning(nn.Module):
    """Guidance by concatenation: tokens attend to themselves and the auxiliary vectors a sample has."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPSILON)
        self.attn = Attention(dim, heads, backend)

    def forward(self, x: Tensor, pending: Tensor | None, vectors: Tensor, guides: Tensor) -> tuple[Tensor, Tensor]:
        """Stream `[B, K, D]` twice, vectors `[B, m, D]`, guides bool `[B, m]` -> stream `[B, K, D]` twice."""
        x, normed = norm(self.norm, x, pending)
        _, normed_vectors = norm(self.norm, vectors, None)
        guidance = self.attn.to_vectors(normed, normed_vectors, guides)
        return x, torch.where(guides.any(dim=1)[:, None, None], guidance, 0.0)


class PatchEmbed(nn.Module):
    """Holds the projection of 3D patches; `mmmae_kernels.patch_embed` reads it."""

    def __init__(self, config: MMMAEConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.dim, kernel_size=config.patch, stride=config.patch)


def norm(layer: nn.LayerNorm, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
    """The settled stream and its norm."""
    return add_layer_norm(x, pending, layer.weight, layer.bias, layer.eps)
