"""The definition of `transformer_block`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..add_layer_norm.reference import add_layer_norm_reference
from ..attention.reference import attention_eager
from ..gelu_linear.reference import gelu_linear_reference


class BlockWeights(NamedTuple):
    """The parameters of a pre-norm block of width D, hidden width H of its MLP."""

    norm1_weight: Tensor  # [D]
    norm1_bias: Tensor  # [D]
    qkv_weight: Tensor  # [3*D, D]
    qkv_bias: Tensor  # [3*D]
    proj_weight: Tensor  # [D, D]
    proj_bias: Tensor  # [D]
    norm2_weight: Tensor  # [D]
    norm2_bias: Tensor  # [D]
    fc1_weight: Tensor  # [H, D]
    fc1_bias: Tensor  # [H]
    fc2_weight: Tensor  # [D, H]


def transformer_block_reference(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    weights: BlockWeights,
    heads: int,
    ids: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Apply attention and the MLP, each to the layer norm of the stream; the last addition is left to the caller."""
    w = weights
    x, norm = add_layer_norm_reference(x, residual, w.norm1_weight, w.norm1_bias, epsilon, residual_bias)
    qkv = F.linear(norm, w.qkv_weight, w.qkv_bias).view(*norm.shape[:2], 3, heads, norm.shape[2] // heads)
    q, k, v = qkv.unbind(2)
    if ids is not None:
        x, q = take(x, ids), take(q, ids)
    attended = F.linear(attention_eager(q, k, v, None).flatten(2), w.proj_weight)
    x, norm = add_layer_norm_reference(x, attended, w.norm2_weight, w.norm2_bias, epsilon, w.proj_bias)
    return x, gelu_linear_reference(F.linear(norm, w.fc1_weight), w.fc2_weight, None, w.fc1_bias)


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Gather the tokens `ids [B, M]` of `tokens [B, N, ...]` into `[B, M, ...]`."""
    index = ids.view(*ids.shape, *(1,) * (tokens.dim() - 2)).expand(-1, -1, *tokens.shape[2:])
    return tokens.gather(1, index)
