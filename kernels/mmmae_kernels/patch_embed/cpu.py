"""Patch embedding on the CPU: a compiled gather of the needed patches, then torch's GEMM."""

from __future__ import annotations

import math

import torch
from torch import Tensor, get_num_threads

from ..cpu import library
from ..linear import linear_no_grad
from .reference import token_count

_gather_patches = {
    torch.float32: library.function("gather_patches_float32"),
    torch.int16: library.function("gather_patches_int16"),
    torch.uint8: library.function("gather_patches_uint8"),
}
_scatter_patches = library.function("scatter_patches")
_add_position = library.function("add_position")
_embedding_gradients = library.function("embedding_gradients")
_sum_of_rows = library.function("sum_of_rows")

Patch = tuple[int, int, int]


def patch_embed_forward(
    volume: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, position: Tensor | None
) -> Tensor:
    """Return the embedding `[B, K, D]`: gather, GEMM with bias, positions added in place.

    Args:
        volume: `[B, C, T, H, W]` float32, int16 or uint8, any strides.
        weight, bias: `[D, C, pt, ph, pw]` and `[D]`, float32.
        ids: `[B, K]` token numbers; None means all, in order.
        position: `[N, D]`.

    Raises:
        ValueError: an id is outside 0..N-1.
    """
    ids = _ids(volume, weight, ids)
    (batch, keep), width = ids.shape, weight.size(0)
    rows = _gather(volume, weight, ids)
    tokens = linear_no_grad(rows, weight.detach().flatten(1), None if bias is None else bias.detach())
    tokens.resize_(batch, keep, width)  # not a view: autograd would refuse to let the caller change it in place
    if position is not None:
        position = library.contiguous_rows(position)
        _add_position(
            tokens.data_ptr(),
            ids.data_ptr(),
            ids.stride(),
            position.data_ptr(),
            position.stride(0),
            (batch, keep, width),
            position.size(0),
            get_num_threads(),
        )
    return tokens


def patch_embed_backward(
    grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of volume, weight, bias and position, or None for those that are not needed.

    The patches are gathered again, so only the inputs have to be saved. Sums over a repeated id are taken in the order
    of `ids`, whatever the number of threads.

    Args:
        grad: `[B, K, D]` float32, any strides.
        volume, weight, ids: inputs of `patch_embed_forward`.
        needs: which gradients to compute; False for an integer volume.

    Raises:
        ValueError: an id is outside 0..N-1.
    """
    ids = _ids(volume, weight, ids)
    grad = library.contiguous_rows(grad)
    sizes, width = tuple(grad.shape), grad.shape[2]
    grad_volume = grad_weight = grad_bias = grad_position = None
    if needs[3]:
        tokens = token_count(volume, weight.shape[2:])
        grad_position = grad.new_empty(tokens, width)
        grad_bias = grad.new_empty(width) if needs[2] else None
        _embedding_gradients(
            grad.data_ptr(),
            grad.stride()[:2],
            ids.data_ptr(),
            ids.stride(),
            grad_position.data_ptr(),
            library.address(grad_bias),
            sizes,
            tokens,
            get_num_threads(),
        )
    elif needs[2]:
        grad_bias = grad.new_empty(width)
        _sum_of_rows(grad.data_ptr(), grad.stride()[:2], grad_bias.data_ptr(), sizes, get_num_threads())
    flat = grad.detach().flatten(0, 1) if needs[0] or needs[1] else grad
    if needs[1]:
        grad_weight = torch.mm(flat.t(), _gather(volume, weight, ids)).resize_(weight.shape)
    if needs[0]:
        grad_volume = grad.new_zeros(volume.shape)
        _scatter_rows(linear_no_grad(flat, weight.detach().flatten(1).t()), ids, _patch(weight), grad_volume)
    return grad_volume, grad_weight, grad_bias, grad_position


def gather_rows(volume: Tensor, patch: Patch, ids: Tensor, out: Tensor) -> None:
    """Write the patches `ids [B, K]` of `volume` into `out [B*K, C*pt*ph*pw]`, which is contiguous."""
    _gather_patches[volume.dtype](
        volume.data_ptr(),
        volume.stride(),
        tuple(volume.shape),
        ids.data_ptr(),
        ids.stride(),
        ids.size(1),
        patch,
        out.data_ptr(),
        get_num_threads(),
    )


def _gather(volume: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    rows = weight.new_empty(ids.numel(), math.prod(weight.shape[1:]))
    gather_rows(volume, _patch(weight), ids, rows)
    return rows


def _patch(weight: Tensor) -> Patch:
    return weight.size(2), weight.size(3), weight.size(4)


def _ids(volume: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
    if ids is not None:
        return ids
    return torch.arange(token_count(volume, weight.shape[2:]), device=volume.device).expand(volume.shape[0], -1)


def gather_patches(volume: Tensor, ids: Tensor, patch: Patch) -> Tensor:
    """Return the patches `ids [B, K]` of `volume [B, C, T, H, W]` as rows `[B, K, C*pt*ph*pw]`, float32."""
    rows = volume.new_empty(*ids.shape, volume.shape[1] * math.prod(patch), dtype=torch.float32)
    gather_rows(volume, patch, ids, rows)
    return rows


def scatter_patches(rows: Tensor, ids: Tensor, patch: Patch, shape: tuple[int, ...]) -> Tensor:
    """Return a volume of `shape` with each row added to its patch, the rest zero: the transpose of `gather_patches`."""
    volume = rows.new_zeros(shape)
    _scatter_rows(rows.detach().flatten(0, 1), ids, patch, volume)
    return volume


def _scatter_rows(rows: Tensor, ids: Tensor, patch: Patch, volume: Tensor) -> None:
    """Add each of `rows [B*K, C*pt*ph*pw]` to the patch of `volume`, contiguous, that `ids [B, K]` names."""
    _scatter_patches(
        rows.data_ptr(),
        rows.stride(),
        ids.data_ptr(),
        ids.stride(),
        ids.size(1),
        patch,
        volume.data_ptr(),
        tuple(volume.shape),
        get_num_threads(),
    )
