"""Layers of the fast model: the parameters of the reference under the same names, computed by `mmmae_kernels`.

Layers pass the residual stream on as three tensors whose sum is deferred (`Stream`): the kernel of the next norm adds
them. The last linear layer of a block is then a plain product; kernels that read these numbers anyway add its bias and
sum up the bias's gradient.

A layer with unchanged children computes with their parameters directly. If a child was replaced, wrapped, hooked or
parametrised, the layer calls its children one by one: the results are the same, and the change takes effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmmae_kernels import (
    BlockWeights,
    add_layer_norm,
    attention,
    use_backend,
)
from mmmae_kernels.autocast import autocast_dtype, current_copies, use_copies
from mmmae_kernels.dispatch import current_backend
from mmmae_kernels.linear import linear
from mmmae_kernels.transformer_block.conditioning import ConditioningCall, ConditioningWeights, run_conditioning
from mmmae_kernels.transformer_block.op import BlockCall, run_block
from mmmae_kernels.transformer_block.reference import take

from ..config import MMMAEConfig

EPSILON = 1e-6


class Stream(NamedTuple):
    """A residual stream with a deferred add: x + residual + residual_bias, of shapes `[B, N, D]` twice and `[D]`.

    None stands for zero. `materialised` returns the sum.
    """

    x: Tensor
    residual: Tensor | None = None
    residual_bias: Tensor | None = None


def begin_stream(tokens: Tensor, config: MMMAEConfig) -> Stream:
    """Return the residual stream that begins with tokens `[B, N, D]`, in the type of the config's `residual_stream`."""
    in_bf16 = config.residual_stream == "bfloat16" and autocast_dtype(tokens.device.type) == torch.bfloat16
    return Stream(tokens.to(torch.bfloat16) if in_bf16 else tokens)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, ids: Tensor | None = None, key_present: Tensor | None = None) -> Tensor:
        """Apply self-attention.

        Args:
            x: `[B, N, D]`.
            ids: `[B, M]`, tokens to compute queries and results for; None means all.
            key_present: bool `[B, N]`, tokens that may be attended to; None means all.

        Returns:
            `[B, N, D]` or `[B, M, D]`.
        """
        qkv = self.qkv(x)
        q, k, v = qkv.view(*x.shape[:2], 3, self.heads, qkv.shape[2] // (3 * self.heads)).unbind(2)  # [B, N, h, d]
        q = q if ids is None else take(q, ids)
        mixed = attention(q, k, v, key_present=key_present, backend=self.backend)
        out: Tensor = self.proj(mixed.flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to each token of `[B, N, D]`."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block on a residual stream; with `recompute`, training uses `recomputed`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, backend: str, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm1 = nn.LayerNorm(dim, eps=EPSILON)
        self.attn = Attention(dim, heads, backend)
        self.norm2 = nn.LayerNorm(dim, eps=EPSILON)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self._made = Made(self)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, residual_bias: Tensor | None = None, ids: Tensor | None = None
    ) -> Stream:
        """Apply the block to a stream `[B, N, D]`.

        Args:
            x, residual, residual_bias: see `Stream`.
            ids: `[B, M]`, tokens to compute; they attend to all tokens. None means all.

        Returns:
            The stream after the block, `[B, N, D]` or `[B, M, D]`.
        """
        stream = Stream(x, residual, residual_bias)
        if self.recompute and self.training and torch.is_grad_enabled():
            return recomputed(lambda stream: self.transform(stream, ids), stream)
        return self.transform(stream, ids)

    def transform(self, stream: Stream, ids: Tensor | None) -> Stream:
        """Apply the block, as one op if its children are unchanged."""
        attn, mlp = self.attn, self.mlp
        if not self._made.holds(self):
            x = materialised(stream)
            attended = attn(self.norm1(x)) if ids is None else attn(self.norm1(x), ids)
            x = (x if ids is None else take(x, ids)) + attended
            return Stream(x, mlp(self.norm2(x)))
        weights, last_bias = self.weights()
        x, residual = run_block(BlockCall(*stream, weights, attn.heads, ids, EPSILON), attn.backend)
        return Stream(x, residual, last_bias)

    def weights(self) -> tuple[BlockWeights, Tensor]:
        """Return the parameters, that of the last bias apart; the children must be unchanged, see `is_plain`."""
        norm1, qkv, proj, norm2, fc1, fc2 = self._made.parameters
        weights = BlockWeights(
            *(norm1["weight"], norm1["bias"], qkv["weight"], qkv["bias"], proj["weight"], proj["bias"]),
            *(norm2["weight"], norm2["bias"], fc1["weight"], fc1["bias"], fc2["weight"]),
        )
        return weights, fc2["bias"]

    def is_plain(self) -> bool:
        """Return whether this layer and its children are unchanged since they were made, and not compiled."""
        return self._compiled_call_impl is None and is_plain(self, Block) and self._made.holds(self)


class Conditioning(nn.Module):
    """Guidance by concatenation: tokens attend to each other and to the auxiliary vectors that their sample has."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPSILON)
        self.attn = Attention(dim, heads, backend)
        self._made = Made(self)

    def forward(
        self, x: Tensor, residual: Tensor | None, residual_bias: Tensor | None, vectors: Tensor, guides: Tensor
    ) -> Stream:
        """Apply one step of guidance to a stream `[B, K, D]`.

        Args:
            x, residual, residual_bias: see `Stream`.
            vectors: `[B, m, D]`.
            guides: bool `[B, m]`, which vector guides which sample.

        Returns:
            The stream after the step, `[B, K, D]`; that of a sample without vectors is unchanged.
        """
        if self._made.holds(self):
            norm, qkv, proj = self._made.parameters
            weights = ConditioningWeights(
                *(norm["weight"], norm["bias"], qkv["weight"], qkv["bias"], proj["weight"], proj["bias"])
            )
            stream = (x, residual, residual_bias)
            call = ConditioningCall(*stream, vectors, guides, weights, self.attn.heads, EPSILON)
            x, guidance = run_conditioning(call, self.attn.backend)
        else:
            x = materialised(Stream(x, residual, residual_bias))
            joined = self.norm(torch.cat([x, vectors], dim=1))
            present = torch.cat([guides.new_ones(x.shape[:2]), guides], dim=1)
            guidance = self.attn(joined, key_present=present)[:, : x.shape[1]]
        return Stream(x, torch.where(guides.any(dim=1)[:, None, None], guidance, 0.0))


class PatchEmbed(nn.Module):
    """Non-overlapping 3D patches, linearly embedded."""

    def __init__(self, config: MMMAEConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.dim, kernel_size=config.patch, stride=config.patch)
        self._made = Made(self)

    def forward(self, volume: Tensor) -> Tensor:
        """Return all patches of `[B, C, T, H, W]` embedded, `[B, N, D]`; `mmmae_kernels.patch_embed` can embed some."""
        embedded: Tensor = self.proj(volume.to(self.proj.weight.dtype))  # [B, D, t, h, w]
        return embedded.flatten(2).transpose(1, 2)

    def is_plain(self) -> bool:
        """Return whether this layer and its projection are unchanged since they were made."""
        return self._made.holds(self) and is_plain(self, PatchEmbed)


class Made:
    """A record of the modules in a layer as they were made, to find out whether they have been changed."""

    def __init__(self, layer: nn.Module) -> None:
        modules = [*_descendants(layer)]
        self.root = layer._modules
        self.places = tuple((parent._modules, name, child, type(child)) for parent, name, child in modules)
        self.hooks = tuple(hooks for *_, child in modules for hooks in _hooks_of(child))
        # Of the modules that have parameters, in the order in which they were made.
        self.parameters: tuple[dict[str, Any], ...] = tuple(
            child._parameters for *_, child in modules if child._parameters
        )
        self.names = tuple((parameters, name) for parameters in self.parameters for name in parameters)
        self.norms = tuple(child for *_, child in modules if isinstance(child, nn.LayerNorm))

    def holds(self, layer: nn.Module) -> bool:
        """Return whether no module was replaced, hooked or changed.

        Each module must be the same object of the same class, without hooks, with the forward of its class and all of
        its parameters, and norms must have the epsilon of this package.
        """
        for modules, name, child, kind in self.places:
            if modules.get(name) is not child or child.__class__ is not kind or "forward" in child.__dict__:
                return False
        for parameters, name in self.names:
            if parameters.get(name) is None:
                return False
        for norm in self.norms:
            if norm.eps != EPSILON:
                return False
        return layer._modules is self.root and not _has_hooks(self.hooks)


_hooks_only_mark = False


@contextlib.contextmanager
def hooks_only_mark() -> Iterator[None]:
    """Ignore hooks within the block, and a module's own `forward`, which only observe which module runs."""
    global _hooks_only_mark
    before, _hooks_only_mark = _hooks_only_mark, True
    try:
        yield
    finally:
        _hooks_only_mark = before


def _has_hooks(hooks: tuple[dict[int, Callable[..., object]], ...]) -> bool:
    """Return whether a layer has hooks of its own; hooks on all modules of a process, as a counter's, do not matter."""
    return not _hooks_only_mark and any(hooks)


def _descendants(layer: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for name, child in layer.named_children():
        yield layer, name, child
        yield from _descendants(child)


def _hooks_of(module: nn.Module) -> tuple[dict[int, Callable[..., object]], ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is exactly of class `kind`, without hooks and with the forward of its class."""
    has_own_forward = "forward" in module.__dict__ and not _hooks_only_mark
    return module.__class__ is kind and not has_own_forward and not _has_hooks(_hooks_of(module))


def norm(layer: nn.Module, stream: Stream) -> Tensor:
    """Apply a layer norm to a stream; return `[B, N, D]`."""
    if not is_plain(layer, nn.LayerNorm):
        normed: Tensor = layer(materialised(stream))
        return normed
    x, residual, residual_bias = stream
    assert isinstance(layer, nn.LayerNorm)
    return add_layer_norm(x, residual, layer.weight, layer.bias, layer.eps, residual_bias)[1]


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer to `[..., H]`."""
    if not is_plain(layer, nn.Linear):
        projected: Tensor = layer(x)
        return projected
    assert isinstance(layer, nn.Linear)
    return linear(x, layer.weight, layer.bias)


def product_parameters(layers: Iterable[nn.Module]) -> Iterator[Tensor | None]:
    """Yield the parameters that the matrix products of layers read; None for one that is gone.

    A compiled layer is left out, because it can't be given copies, see `mmmae_kernels.autocast.cast_once`.
    """
    for layer in layers:
        if layer._compiled_call_impl is not None:
            continue
        if isinstance(layer, Block):
            _, qkv, proj, _, fc1, fc2 = layer._made.parameters
            yield from (qkv.get("weight"), qkv.get("bias"), proj.get("weight"), fc1.get("weight"), fc2.get("weight"))
        elif isinstance(layer, Conditioning):
            _, qkv, proj = layer._made.parameters
            yield from (qkv.get("weight"), qkv.get("bias"), proj.get("weight"), proj.get("bias"))
        elif isinstance(layer, nn.Linear):
            yield from (layer._parameters.get("weight"), layer._parameters.get("bias"))
        elif isinstance(layer, PatchEmbed):
            yield layer.proj._parameters.get("weight")


def recomputed(layers: Callable[[Stream], Stream], stream: Stream) -> Stream:
    """Return `layers(stream)`, keeping only the input for backward, which computes the rest again."""
    # Backward runs after `use_backend` and `use_copies` have ended, so that the backend and the copies of now are kept.
    # A compiled graph has the backend built in.
    backend, copies = current_backend(), current_copies()

    def run(x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return materialised(layers(Stream(x)))
        with use_backend(backend), use_copies(copies):
            return materialised(layers(Stream(x)))

    # Nothing in a block is random.
    return Stream(checkpoint(run, materialised(stream), use_reentrant=False, preserve_rng_state=False))


def materialised(stream: Stream) -> Tensor:
    """Return the value of a stream, with its deferred add carried out."""
    x, residual, residual_bias = stream
    if residual is None:
        return x
    total = x + (residual if residual_bias is None else residual + residual_bias)
    return total.to(torch.promote_types(x.dtype, residual.dtype))  # the bias does not widen the stream
