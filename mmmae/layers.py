"""The fast model's layers: the reference's parameters under the reference's names, computed by `mmmae_kernels`.

A residual stream travels as three tensors, a `Stream`: the value is their sum, and the next norm adds them on its way.
So the last linear layer of a sublayer multiplies only; its bias is added, and the bias's gradient summed up, by kernels
that pass over these numbers anyway. The bias before a GELU travels to it for the same reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmmae_kernels import add_layer_norm, attention, concat_attention, gelu_linear, norm_linear, use_backend
from mmmae_kernels.dispatch import current_backend
from mmmae_kernels.linear import linear

from .config import MMMAEConfig

EPSILON = 1e-6


class Stream(NamedTuple):
    """A residual stream that is x + pending + pending_bias: `[B, N, D]` twice and `[D]`, None for zero."""

    x: Tensor
    pending: Tensor | None = None
    pending_bias: Tensor | None = None


class Attention(nn.Module):
    """Multi-head attention whose queries may be fewer than, and other than, its keys."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, norm: nn.LayerNorm, stream: Stream) -> Stream:
        """The stream `[B, N, D]`, settled, with self-attention of its norm pending."""
        x, qkv = self._project(norm, stream, 0, 3)
        mixed = attention(qkv, backend=self.backend)
        return Stream(x, linear(mixed.flatten(2), self.proj.weight), self.proj.bias)

    def of_tokens(self, norm: nn.LayerNorm, stream: Stream, ids: Tensor) -> Stream:
        """The stream of the tokens `ids [B, M]` alone, settled, with their attention to all pending; `[B, M, D]`."""
        x, kv = self._project(norm, stream, 1, 3)
        x, q = self._project(norm, Stream(x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))), 0, 1)
        mixed = attention(q.squeeze(2), kv, backend=self.backend)
        return Stream(x, linear(mixed.flatten(2), self.proj.weight), self.proj.bias)

    def to_vectors(self, norm: nn.LayerNorm, stream: Stream, vectors: Tensor, guides: Tensor) -> tuple[Tensor, Tensor]:
        """The settled stream `[B, K, D]`, and its attention to itself and the vectors that `guides [B, m]` names."""
        x, qkv = self._project(norm, stream, 0, 3)
        _, kv = self._project(norm, Stream(vectors), 1, 3)
        mixed = concat_attention(qkv, kv, guides, backend=self.backend)
        return x, linear(mixed.flatten(2), self.proj.weight, self.proj.bias)

    def _project(self, norm: nn.LayerNorm, stream: Stream, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The settled stream, and a part of q, k and v of its norm, packed `[B, N, parts, h, d]`."""
        dim, parts = self.proj.in_features, stop - start
        parameters: tuple[Tensor, ...] = (self.qkv.weight, self.qkv.bias)
        if parts < 3:  # a slice of all would still be copied in backward
            parameters = tuple(parameter[start * dim : stop * dim] for parameter in parameters)
        weight, bias = parameters
        x, pending, pending_bias = stream
        x, projected = norm_linear(x, pending, norm.weight, norm.bias, weight, bias, norm.eps, pending_bias)
        return x, projected.view(*projected.shape[:2], parts, self.heads, dim // self.heads)


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, norm: nn.LayerNorm, stream: Stream) -> Stream:
        """The stream, settled, with the layers' output for its norm pending."""
        x, pending, pending_bias = stream
        x, hidden = norm_linear(x, pending, norm.weight, norm.bias, self.fc1.weight, None, norm.eps, pending_bias)
        return Stream(x, gelu_linear(hidden, self.fc2.weight, None, self.fc1.bias), self.fc2.bias)


class Block(nn.Module):
    """Pre-norm transformer block on a residual stream; `recompute`: in training, see `recomputed`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, backend: str, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm1 = nn.LayerNorm(dim, eps=EPSILON)
        self.attn = Attention(dim, heads, backend)
        self.norm2 = nn.LayerNorm(dim, eps=EPSILON)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(self, stream: Stream) -> Stream:
        """`[B, N, D]` -> the same."""
        return self._run(self.attn, stream)

    def of_tokens(self, stream: Stream, ids: Tensor) -> Stream:
        """The stream of the tokens `ids [B, M]` alone after this block: `[B, M, D]`."""
        return self._run(self.attn.of_tokens, stream, ids)

    def _run(self, attend: Callable[..., Stream], stream: Stream, *ids: Tensor) -> Stream:
        def sublayers(stream: Stream) -> Stream:
            out: Stream = self.mlp(self.norm2, attend(self.norm1, stream, *ids))
            return out

        if self.recompute and self.training and torch.is_grad_enabled():
            return recomputed(sublayers, stream)
        return sublayers(stream)


class Conditioning(nn.Module):
    """Guidance by concatenation: tokens attend to themselves and the auxiliary vectors a sample has."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPSILON)
        self.attn = Attention(dim, heads, backend)

    def forward(self, stream: Stream, vectors: Tensor, guides: Tensor) -> Stream:
        """Stream `[B, K, D]`, vectors `[B, m, D]`, guides bool `[B, m]` -> stream `[B, K, D]`."""
        x, guidance = self.attn.to_vectors(self.norm, stream, vectors, guides)
        return Stream(x, torch.where(guides.any(dim=1)[:, None, None], guidance, 0.0))


class PatchEmbed(nn.Module):
    """Holds the projection of 3D patches; `mmmae_kernels.patch_embed` reads it."""

    def __init__(self, config: MMMAEConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.dim, kernel_size=config.patch, stride=config.patch)


def norm(layer: nn.LayerNorm, stream: Stream) -> tuple[Tensor, Tensor]:
    """The settled stream and its norm."""
    x, pending, pending_bias = stream
    return add_layer_norm(x, pending, layer.weight, layer.bias, layer.eps, pending_bias)


def recomputed(layers: Callable[[Stream], Stream], stream: Stream) -> Stream:
    """`layers(stream)`, of which the input alone is kept: backward computes the rest again. Both are settled."""
    # Backward comes after the block that chose the kernels; what is compiled made its choice when it was traced.
    chosen = current_backend()

    def run(x: Tensor) -> Tensor:
        with contextlib.nullcontext() if torch.compiler.is_compiling() else use_backend(chosen):
            return settled(layers(Stream(x)))

    # Nothing in a block is random.
    return Stream(checkpoint(run, settled(stream), use_reentrant=False, preserve_rng_state=False))


def settled(stream: Stream) -> Tensor:
    """The stream's value."""
    x, pending, pending_bias = stream
    if pending is None:
        return x
    return x + (pending if pending_bias is None else pending + pending_bias)
