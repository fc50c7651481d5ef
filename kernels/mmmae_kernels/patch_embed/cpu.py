"""Patch embedding on the CPU: a compiled gather of the needed patches, then torch's GEMM."""

from __future__ import annotations

import math

import torch
from torch import Tensor, get_num_threads

from ..cpu import library
from ..linear import linear_no_grad
from .reference import token_count

_gather_patches = library.function("gather_patches")
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
        volume: `[B, C, T, H, W]` of a dtype in `library.DTYPES`, any strides.
        weight, bias: `[D, C, pt, ph, pw]` and `[D]`; patches are converted to the dtype of `weight`.
        ids: `[B, K]` token numbers; None means all, in order.
        position: `[N, D]`.

    Raises:
        ValueError: an id is outside 0..N-1.
    """
    ids = _ids(volume, weight, ids)
    (batch, keep), width = ids.shape, weight.size(0)
    rows = _gather(volume, weight, ids)
    tokens = linear_no_grad(rows, weight.detach().flatten(1), None if bias is None else bias.detach().to(weight.dtype))
    tokens.resize_(batch, keep, width)  # not a view: autograd would refuse to let the caller change it in place
    if position is None:
        return tokens
    position = library.contiguous_rows(position)
    dtype = torch.promote_types(tokens.dtype, position.dtype)
    out = tokens if tokens.dtype == dtype else torch.empty_like(tokens, dtype=dtype)
    _add_position(
        tokens.data_ptr(),
        ids.data_ptr(),
        ids.stride(),
        position.data_ptr(),
        position.stride(0),
        out.data_ptr(),
        (library.DTYPES[tokens.dtype], library.DTYPES[position.dtype], library.DTYPES[dtype]),
        (batch, keep, width),
        position.size(0),
        get_num_threads(),
    )
    return out


def patch_embed_backward(
    grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of volume, weight, bias and position, or None for those that are not needed.

    The patches are gathered again, so only the inputs have to be saved. Sums over a repeated id are taken in the order
    of `ids`, whatever the number of threads.

    Args:
        grad: `[B, K, D]`, any strides; rounded to the dtype of `weight` for the products.
        volume, weight, ids: inputs of `patch_embed_forward`.
        needs: which gradients to compute; False for an integer volume.

    Raises:
        ValueError: an id is outside 0..N-1.
    """
    ids = _ids(volume, weight, ids)
    grad = library.contiguous_rows(grad)
    sizes, width, dtype = tuple(grad.shape), grad.shape[2], library.DTYPES[grad.dtype]
    grad_volume = grad_weight = grad_bias = grad_position = None
    if needs[3]:
        tokens = token_count(volume, weight.shape[2:])
        grad_position = grad.new_empty(tokens, width)
        grad_bias = grad.new_empty(width, dtype=torch.float32) if needs[2] else None
        _embedding_gradients(
            grad.data_ptr(),
            grad.stride()[:2],
            ids.data_ptr(),
            ids.stride(),
            grad_position.data_ptr(),
            0 if grad_bias is None else grad_bias.data_ptr(),
            dtype,
            sizes,
            tokens,
            get_num_threads(),
        )
    elif needs[2]:
        grad_bias = grad.new_empty(width, dtype=torch.float32)
        _sum_of_rows(grad.data_ptr(), grad.stride()[:2], grad_bias.data_ptr(), dtype, sizes, get_num_threads())
    if grad_bias is not None:
        grad_bias = grad_bias.to(weight.dtype)
    flat = grad.detach().to(weight.dtype).flatten(0, 1) if needs[0] or needs[1] else grad
    if needs[1]:
        grad_weight = torch.mm(flat.t(), _gather(volume, weight, ids)).resize_(weight.shape)
    if needs[0]:
        rows = linear_no_grad(flat, weight.detach().flatten(1).t())
        grad_volume = _scatter(rows, ids, _patch(weight), tuple(volume.shape), volume.dtype)
    return grad_volume, grad_weight, grad_bias, grad_position


def gather_rows(volume: Tensor, patch: Patch, ids: Tensor, out: Tensor) -> None:
    """Write the patches `ids [B, K]` of `volume` into `out [B*K, C*pt*ph*pw]`, which is contiguous, in its dtype."""
    _gather_patches(
        volume.data_ptr(),
        volume.stride(),
        tuple(volume.shape),
        ids.data_ptr(),
        ids.stride(),
        ids.size(1),
        patch,
        out.data_ptr(),
        (library.DTYPES[volume.dtype], library.DTYPES[out.dtype]),
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
    """Return the patches `ids [B, K]` of `volume [B, C, T, H, W]` as rows `[B, K, C*pt*ph*pw]` of its dtype."""
    rows = volume.new_empty(*ids.shape, volume.shape[1] * math.prod(patch))
    gather_rows(volume, patch, ids, rows)
    return rows


def scatter_patches(rows: Tensor, ids: Tensor, patch: Patch, shape: tuple[int, ...]) -> Tensor:
    """Return a volume of `shape` with each row added to its patch, the rest zero: the transpose of `gather_patches`."""
    return _scatter(rows.detach().flatten(0, 1), ids, patch, shape, rows.dtype)


def _scatter(rows: Tensor, ids: Tensor, patch: Patch, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a volume of `shape` and `dtype` with each of `rows [B*K, C*pt*ph*pw]` added to its patch, in float32."""
    rows = rows.to(torch.float32)
    volume = rows.new_zeros(shape)
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
    return volume.to(dtype)
