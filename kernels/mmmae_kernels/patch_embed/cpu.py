"""Patch embedding on the CPU: a compiled gather of the asked patches feeds torch's own GEMM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cpu import library
from ..linear import product
from .reference import token_count


def patch_embed_forward(
    volume: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, position: Tensor | None
) -> Tensor:
    """`[B, K, D]`: gather, GEMM with the bias, position added in place.

    Args:
        volume: `[B, C, T, H, W]` float32, int16 or uint8, any strides.
        weight, bias: `[D, C, pt, ph, pw]` and `[D]`, float32.
        ids: `[B, K]` token numbers; None means all, in order.
        position: `[N, D]`.

    Raises:
        ValueError: a shape, dtype or device does not fit, or an id is out of range.
    """
    matrix = weight_matrix(weight, volume)
    ids = _ids(volume, weight, ids)
    if bias is not None:
        library.check("bias", bias, (weight.shape[0],))
    if position is not None:
        library.check("position", position, (token_count(volume, weight.shape[2:]), weight.shape[0]))
    rows = _gather(volume, weight, ids)
    tokens = product(rows, matrix, None if bias is None else bias.detach())
    tokens = tokens.view(*ids.shape, weight.shape[0])
    if position is not None:
        library.call("add_position", tokens, ids, library.rows_of(position))
    return tokens


def patch_embed_backward(
    grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of volume, weight, bias and position, those that `needs` asks for.

    The patches are gathered again: nothing but the inputs need be kept for this. The sums over a repeated id are taken
    in the order of `ids`, whatever the number of threads.

    Args:
        grad: `[B, K, D]` float32, any strides.
        volume, weight, ids: those of `patch_embed_forward`.
        needs: whose gradients are wanted; that of an integer volume can't be.

    Raises:
        ValueError: as `patch_embed_forward` does.
    """
    matrix, width = weight_matrix(weight, volume), weight.shape[0]
    ids = _ids(volume, weight, ids)
    library.check("grad", grad, (*ids.shape, width))
    grad = library.rows_of(grad)
    if needs[0] and not volume.is_floating_point():
        raise ValueError(f"volume has dtype {volume.dtype}, which has no gradient")
    patch = (weight.shape[2], weight.shape[3], weight.shape[4])
    grad_volume = grad_weight = grad_bias = grad_position = None
    if needs[3]:
        grad_position = weight.new_empty(token_count(volume, weight.shape[2:]), width)
        grad_bias = weight.new_empty(width) if needs[2] else None
        library.call("embedding_gradients", grad, ids, grad_position, grad_bias)
    elif needs[2]:
        grad_bias = weight.new_empty(width)
        library.call("sum_of_rows", grad, grad_bias)
    flat = grad.flatten(0, 1) if needs[0] or needs[1] else grad
    if needs[1]:
        grad_weight = torch.mm(flat.t(), _gather(volume, weight, ids)).view(weight.shape)
    if needs[0]:
        grad_volume = torch.zeros_like(volume, memory_format=torch.contiguous_format)
        library.call("scatter_patches", product(flat, matrix.t()), ids, patch, grad_volume)
    return grad_volume, grad_weight, grad_bias, grad_position


def gather_rows(volume: Tensor, patch: tuple[int, int, int], ids: Tensor, out: Tensor) -> None:
    """Write the patches of `volume` that `ids [B, K]` names into `out [B*K, C*pt*ph*pw]`, which is contiguous."""
    library.call("gather_patches", volume.detach(), ids, patch, out)


def _gather(volume: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    rows = weight.new_empty(ids.numel(), math.prod(weight.shape[1:]))
    gather_rows(volume, (weight.shape[2], weight.shape[3], weight.shape[4]), ids, rows)
    return rows


def _ids(volume: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
    if ids is not None:
        return ids
    return torch.arange(token_count(volume, weight.shape[2:])).expand(volume.shape[0], -1)


def weight_matrix(weight: Tensor, volume: Tensor) -> Tensor:
    """`weight [D, C, pt, ph, pw]` as `[D, C*pt*ph*pw]`; ValueError where it can't embed patches of `volume`."""
    if weight.dim() != 5 or volume.dim() != 5 or volume.shape[1] != weight.shape[1] or 0 in weight.shape[1:]:
        shapes = f"weight has shape {list(weight.shape)}, volume {list(volume.shape)}"
        raise ValueError(f"{shapes}; expected are [D, C, pt, ph, pw] and [B, C, T, H, W]")
    library.check("weight", weight, weight.shape)
    if volume.device.type != "cpu":
        raise ValueError(f"volume lies on {volume.device}, native kernels run on the CPU")
    return weight.detach().flatten(1)


def gather_patches(volume: Tensor, ids: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Rows `[B, K, C*pt*ph*pw]` of the patches of `volume [B, C, T, H, W]` that `ids [B, K]` names, float32."""
    rows = torch.empty(*ids.shape, volume.shape[1] * math.prod(patch))
    gather_rows(volume, patch, ids, rows.flatten(0, 1))
    return rows


def scatter_patches(rows: Tensor, ids: Tensor, patch: tuple[int, int, int], shape: tuple[int, ...]) -> Tensor:
    """The transpose of `gather_patches`: a volume of `shape` with each row added at its patch, zero elsewhere."""
    volume = torch.zeros(shape)
    flat = rows.detach().contiguous().flatten(0, 1)
    library.call("scatter_patches", flat, ids, patch, volume)
    return volume
