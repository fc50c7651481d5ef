"""Every public function in plain PyTorch, written from the docstrings; in float64 the result is taken as exact.

Every intermediate result passes through `step`, which inside of `rounded` changes it at random by up to one rounding
error, forward and backward: how far the results move tells how well conditioned the computation is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Rounding:
    """Multiplies each number by a random factor in 1 - eps .. 1 + eps."""

    def __init__(self, eps: float, seed: int) -> None:
        self.eps, self.generator = eps, torch.Generator().manual_seed(seed)

    def __call__(self, tensor: Tensor) -> Tensor:
        moves = torch.rand(tensor.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        return tensor * (1 + self.eps * moves)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rounding: Rounding) -> Tensor:
        ctx.rounding = rounding
        return rounding(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rounding(grad), None


_roundings: list[Rounding] = []


@contextlib.contextmanager
def rounded(eps: float, seed: int) -> Iterator[None]:
    """Change every intermediate result in the block by a random relative error of up to `eps`."""
    _roundings.append(Rounding(eps, seed))
    try:
        yield
    finally:
        _roundings.pop()


def step(tensor: Tensor) -> Tensor:
    """Return an intermediate result, changed at random inside of `rounded`."""
    return _Step.apply(tensor, _roundings[-1]) if _roundings else tensor  # type: ignore[no-untyped-call]


def wide(tensor: Tensor) -> Tensor:
    """Convert to at least float32, in which PyTorch's kernels compute on half types; their results are rounded once."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cut(volume: Tensor, patch: Sequence[int], ids: Tensor | None) -> Tensor:
    batch = volume.shape[0]
    counts = [size // part for size, part in zip(volume.shape[2:], patch, strict=True)]
    rows = []
    for t in range(counts[0]):
        for h in range(counts[1]):
            for w in range(counts[2]):
                piece = volume
                for axis, (place, part) in enumerate(zip((t, h, w), patch, strict=True)):
                    piece = piece.narrow(2 + axis, place * part, part)
                rows.append(piece.reshape(batch, math.prod(piece.shape[1:])))
    width = volume.shape[1] * math.prod(patch)
    every = torch.stack(rows, dim=1) if rows else volume.new_zeros(batch, 0, width)
    return every if ids is None else every[torch.arange(batch)[:, None], ids]


def patchify(volume: Tensor, patch: Sequence[int], ids: Tensor | None = None) -> Sequence[Tensor]:
    return [cut(volume, patch, ids)]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[Tensor]:
    product = step(x @ weight.T)
    return [product if bias is None else step(product + bias.to(product.dtype))]


def patch_embed(
    volume: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, position: Tensor | None
) -> Sequence[Tensor]:
    rows = cut(volume.to(weight.dtype), weight.shape[2:], ids)
    (tokens,) = linear(rows, weight.flatten(1), bias)
    if position is None:
        return [tokens]
    return [step(tokens + (position if ids is None else position[ids]))]


def masked_l2_loss(
    prediction: Tensor, target: Tensor, ids: Tensor | None, weights: Tensor | None, normalize: bool
) -> Sequence[Tensor]:
    prediction = wide(prediction)
    target = target.to(prediction.dtype)
    if ids is not None:
        target = target[torch.arange(len(ids))[:, None], ids]
    if normalize:
        centred = step(target - step(target.mean(-1, keepdim=True)))
        variance = step((centred**2).sum(-1, keepdim=True) / max(target.shape[-1] - 1, 1))
        target = step(centred / step((variance + 1e-6).sqrt()))
    errors = step((step(prediction - target) ** 2).mean(-1))
    weights = torch.ones_like(errors) if weights is None else weights.to(prediction.dtype)
    total = weights.sum()
    return [step(step((errors * weights).sum()) / step(torch.where(total == 0, 1.0, total)))]


def patch_l2_loss(
    prediction: Tensor,
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    normalize: bool,
) -> Sequence[Tensor]:
    (target,) = patch_embed(volume, weight, bias, ids, None)
    return masked_l2_loss(prediction, target.detach(), None, weights, normalize)


def decoder_tokens(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor) -> Sequence[Tensor]:
    batch, keep, _ = visible.shape
    tokens = mask_token.to(visible.dtype).expand(*ids_restore.shape, -1)
    if keep > 0:
        shown = visible[torch.arange(batch)[:, None], ids_restore.clamp(max=keep - 1)]
        tokens = torch.where((ids_restore < keep)[:, :, None], shown, tokens)
    return [step(tokens + position)]


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    residual_bias: Tensor | None,
) -> Sequence[Tensor]:
    if residual is not None and residual_bias is not None:
        residual = step(residual + residual_bias.to(residual.dtype))
    total = x if residual is None else step(x + residual)
    centred = step(wide(total) - step(wide(total).mean(-1, keepdim=True)))
    deviation = step((step((centred**2).mean(-1, keepdim=True)) + epsilon).sqrt())
    return [total, step(step(centred / deviation) * weight + bias).to(total.dtype)]


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    residual_bias: Tensor | None,
) -> Sequence[Tensor]:
    total, norm = add_layer_norm(x, residual, norm_weight, norm_bias, epsilon, residual_bias)
    return [total, *linear(norm, weight, bias)]


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_bias: Tensor | None) -> Sequence[Tensor]:
    whole = hidden if hidden_bias is None else step(hidden + hidden_bias.to(hidden.dtype))
    activated = step(wide(whole) * step(1 + step(torch.erf(step(wide(whole) / math.sqrt(2))))) / 2)
    return linear(activated.to(hidden.dtype), weight, bias)


def attention(q: Tensor, k: Tensor | None, v: Tensor | None, key_present: Tensor | None) -> Sequence[Tensor]:
    if k is None:
        q, k, v = q.unbind(2)
    elif v is None:
        k, v = k.unbind(2)
    assert k is not None
    assert v is not None
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if k.shape[2] == 0:
        return [torch.zeros_like(q).transpose(1, 2)]
    scores = wide(step(step(q @ k.transpose(2, 3)) / math.sqrt(max(q.shape[-1], 1))))
    has = torch.ones(len(k), k.shape[2], dtype=torch.bool) if key_present is None else key_present
    has = has[:, None, None, :]
    largest = torch.where(has, scores, -1e9).amax(-1, keepdim=True).detach()  # any number gives the same
    powers = step(torch.where(has, scores - largest, -1e9).exp()) * has
    total = step(powers.sum(-1, keepdim=True))
    share = step(powers / torch.where(total == 0, 1.0, total)).to(q.dtype)
    return [step(share @ v).transpose(1, 2)]


def concat_attention(qkv: Tensor, vectors: Tensor, present: Tensor) -> Sequence[Tensor]:
    q, k, v = qkv.unbind(2)
    keys, values = vectors.unbind(2)
    has = torch.cat([torch.ones(qkv.shape[:2], dtype=torch.bool), present], dim=1)
    return attention(q, torch.cat([k, keys], dim=1), torch.cat([v, values], dim=1), has)


def transformer_block(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    heads: int,
    ids: Tensor | None,
    epsilon: float,
    **weights: Tensor,
) -> Sequence[Tensor]:
    w = weights
    x, norm = add_layer_norm(x, residual, w["norm1_weight"], w["norm1_bias"], epsilon, residual_bias)
    (qkv,) = linear(norm, w["qkv_weight"], w["qkv_bias"])
    (attended,) = attention(qkv.reshape(*x.shape[:2], 3, heads, x.shape[2] // heads), None, None, None)
    attended = attended.flatten(2)
    if ids is not None:
        rows = torch.arange(len(ids))[:, None]
        x, attended = x[rows, ids], attended[rows, ids]
    (attended,) = linear(attended, w["proj_weight"])
    x, norm = add_layer_norm(x, attended, w["norm2_weight"], w["norm2_bias"], epsilon, w["proj_bias"])
    (hidden,) = linear(norm, w["fc1_weight"])
    return [x, *gelu_linear(hidden, w["fc2_weight"], None, w["fc1_bias"])]


def random_masking(
    batch: int, tokens: int, keep: int, seed: int | Tensor, device: Any, first_sample: int
) -> Sequence[Tensor]:
    """Sort a sample's tokens by their words of Philox, whose counter is (token // 4, 0, sample)."""
    batch, tokens, keep, rows = int(batch), int(tokens), int(keep), []
    for sample in range(first_sample, first_sample + batch):
        words = [word for call in range((tokens + 3) // 4) for word in _philox(call, sample, int(seed) % 2**64)]
        rows.append([token for _, token in sorted(zip(words, range(tokens), strict=False))])
    order = torch.tensor(rows, dtype=torch.int64).reshape(batch, tokens)
    restore = torch.zeros_like(order).scatter(1, order, torch.arange(tokens).expand(batch, tokens))
    return [order[:, :keep], order[:, keep:], restore]


def _philox(call: int, sample: int, key: int) -> list[int]:
    """Compute Philox 4x32-10 (Salmon et al., SC 2011)."""
    word = 2**32
    c = [call, 0, sample % word, sample // word]
    k = [key % word, key // word]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second // word ^ c[1] ^ k[0], second % word, first // word ^ c[3] ^ k[1], first % word]
        k = [(k[0] + 0x9E3779B9) % word, (k[1] + 0xBB67AE85) % word]
    return c
