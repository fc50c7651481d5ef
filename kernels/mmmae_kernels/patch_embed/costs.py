"""Costs of the operators of patch embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..shapes import (
    BATCH,
    KEEP,
    PATCH,
    SIZE,
    TOKENS,
    WIDTH,
    empty,
    parameter_dtype,
    precisions,
    token_ids,
    volumes,
)
from .tiles import weight_splits


def patch_embed_macs(
    volume: Sequence[int], weight: Sequence[int], bias: object, ids: Sequence[int] | None, *rest: object
) -> int:
    """Return the multiply-adds of the patches that `ids [B, K]` names, or all, with `weight [D, C, pt, ph, pw]`."""
    sizes = zip(volume[2:], weight[2:], strict=True)
    tokens = math.prod(size // part for size, part in sizes) if ids is None else ids[1]
    return volume[0] * tokens * math.prod(weight)


def patch_embed_backward_macs(
    grad: Sequence[int],
    volume: Sequence[int],
    weight: Sequence[int],
    ids: object,
    needs: Sequence[bool],
    *rest: object,
) -> int:
    """Return the multiply-adds of the gradients of volume and weight that are needed: each costs as much as forward."""
    return (needs[0] + needs[1]) * grad[0] * grad[1] * math.prod(weight)


def patch_embed_backward_launches(
    grad: Tensor, volume: Tensor, weight: Tensor, ids: object, needs: Sequence[bool], *rest: object
) -> int:
    """Count the kernels of each gradient, with their sums of partial sums and torch's sort of repeated tokens."""
    volume_launches = 2 if ids is None else 12
    weight_launches = int(needs[2])
    if needs[1]:
        rows, width = grad.shape[0] * grad.shape[1], weight.shape[0]
        sizes = math.prod(weight.shape[1:]), weight.element_size(), volume.element_size()
        weight_launches = 1 if weight_splits(rows, width, *sizes) == 1 else 2 + needs[2]
    return needs[0] * volume_launches + weight_launches + needs[3] * (1 if ids is None else 4)


MACS: dict[str, Callable[..., int]] = {
    "mmmae::patch_embed": patch_embed_macs,
    "mmmae::patch_embed_backward": patch_embed_backward_macs,
}
WITHOUT_MACS = ("mmmae::gather_patches", "mmmae::scatter_patches")
LAUNCHES: dict[str, Callable[..., int]] = {"mmmae::patch_embed_backward": patch_embed_backward_launches}


def compile_cases(dtype: torch.dtype) -> None:
    """Launch each kernel once for each combination of arguments that compiles to different code."""
    from . import gpu  # imports triton

    weight, bias = empty(WIDTH, 1, *PATCH, dtype=dtype), empty(WIDTH, dtype=parameter_dtype(dtype))
    position, ids = empty(TOKENS, WIDTH, dtype=parameter_dtype(dtype)), token_ids(KEEP)
    for precision in precisions(dtype):
        torch.set_float32_matmul_precision(precision)
        for volume in volumes(dtype):
            gpu.patch_embed_forward(volume, weight, bias, ids, position)
            grad = empty(BATCH, KEEP, WIDTH, dtype=parameter_dtype(dtype))
            gpu.patch_embed_backward(grad, volume, weight, ids, (volume.is_floating_point(), True, True, False))
            more = [tensor[:1].expand(8 * BATCH, *tensor.shape[1:]) for tensor in (grad, volume, ids)]  # several sums
            gpu.patch_embed_backward(more[0], more[1], weight, more[2], (False, True, True, False))
    _compile_auxiliary_patches(dtype)


def _compile_auxiliary_patches(dtype: torch.dtype) -> None:
    """Launch the kernels of an auxiliary encoder: a 2D image, all its patches."""
    from . import gpu  # imports triton

    weight, dtype = empty(256, 1, 1, 32, 32, dtype=dtype), parameter_dtype(dtype)
    volume = empty(BATCH, 1, 1, SIZE, SIZE, dtype=dtype)
    gpu.patch_embed_forward(volume, weight, empty(256, dtype=dtype), None, empty(49, 256, dtype=dtype))
    grad = empty(BATCH, 49, 256, dtype=dtype)
    gpu.patch_embed_backward(grad, volume, weight, None, (False, True, True, True))


def compile_patchify_cases(dtype: torch.dtype) -> None:
    """Launch the gather for volumes of each dtype."""
    from . import gpu  # imports triton

    for volume in volumes(dtype):
        gpu.gather_patches(volume, token_ids(TOKENS - KEEP), PATCH)


COMPILED: dict[str, Callable[[torch.dtype], None]] = {"patch_embed": compile_cases, "patchify": compile_patchify_cases}
