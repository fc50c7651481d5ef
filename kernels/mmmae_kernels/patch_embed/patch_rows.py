"""Implicit GEMM over patches: offsets of their elements in a volume, and their product with a weight.

Used by the kernels of `patch_embed` and `patch_l2_loss`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..gpu.config import strides


def patch_arguments(shape: tuple[int, ...], stride: tuple[int, ...], patch: tuple[int, ...]) -> dict[str, Any]:
    """Return the kernel arguments that describe a volume of this shape and stride, and its patches."""
    pt, ph, pw = patch
    sizes = (shape[1], pt, ph, pw)
    span = sum((size - 1) * step for size, step in zip(sizes, stride[1:], strict=True))
    return {
        "GRID_H": shape[3] // ph,
        "GRID_W": shape[4] // pw,
        **strides("volume", "bcthw", stride),
        "PT": pt,
        "PH": ph,
        "PW": pw,
        "P": shape[1] * pt * ph * pw,
        "WIDE": span >= 2**31,
    }


@triton.jit
def patch_corners(
    row,               # [BLOCK] row numbers, sample after sample
    ids_ptr,           # [B, K] int64 token numbers, or None: row k is token k
    stride_ids_b, stride_ids_k,
    K,
    GRID_H, GRID_W,    # patches along H and W
    stride_volume_b, stride_volume_t, stride_volume_h, stride_volume_w,  # of the volume
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):
    """Return the token number of each row, and the offset of its first element in the volume, both int64."""
    sample = (row // K).to(tl.int64)
    k = row % K
    if ids_ptr is None:
        token = k.to(tl.int64)
    else:
        token = tl.load(ids_ptr + sample * stride_ids_b + k.to(tl.int64) * stride_ids_k)
    # The token number fits 32 bits, and 64-bit division is a long subroutine.
    number = token.to(tl.int32)
    t, h, w = number // (GRID_H * GRID_W), number // GRID_W % GRID_H, number % GRID_W
    corner = sample * stride_volume_b + (t * PT).to(tl.int64) * stride_volume_t
    corner += (h * PH).to(tl.int64) * stride_volume_h + (w * PW).to(tl.int64) * stride_volume_w
    return token, corner


@triton.jit
def patch_offsets(
    element,           # [BLOCK] element numbers in a patch, in the order (c, t, h, w)
    stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w,  # of the volume
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    WIDE: tl.constexpr,  # whether a patch spans 2^31 or more elements of memory
):
    """Return the offset of each element from the first one of its patch."""
    c, t, h, w = element // (PT * PH * PW), element // (PH * PW) % PT, element // PW % PH, element % PW
    if WIDE:
        c, t, h, w = c.to(tl.int64), t.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return c * stride_volume_c + t * stride_volume_t + h * stride_volume_h + w * stride_volume_w


@triton.jit
def project_patches(
    volume_ptr,        # [B, C, T, H, W]
    weight_ptr,        # [D, P], P = C*PT*PH*PW
    corner,            # [BLOCK_M] int64, see patch_corners
    column,            # [BLOCK_N] < D
    stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    """Return the product of patches and weight, `[BLOCK_M, BLOCK_N]` float32."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_K):
        element = start + tl.arange(0, BLOCK_K)
        offset = patch_offsets(
            element, stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w, PT, PH, PW, WIDE
        )
        patch_at = volume_ptr + corner[:, None] + offset[None, :]
        weight_at = weight_ptr + column[None, :].to(tl.int64) * P + element[:, None]
        if P % BLOCK_K == 0:
            patch, weight = tl.load(patch_at), tl.load(weight_at)
        else:
            patch = tl.load(patch_at, mask=element[None, :] < P, other=0)
            weight = tl.load(weight_at, mask=element[:, None] < P, other=0)
        product = tl.dot(patch.to(weight.dtype), weight, product, input_precision=PRECISION)
    return product
