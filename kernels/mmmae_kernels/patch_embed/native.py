"""Patch embedding on the CPU: a compiled gather of the asked patches feeds torch's own GEMM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..registry import Reason
from .reference import project


def patchify_native(volume: Tensor, patch: tuple[int, int, int], ids: Tensor | None = None) -> Tensor:
    """`patchify_reference` without the rows that are not asked for."""
    if ids is None:
        pt, ph, pw = patch
        _, _, bands, height, width = volume.shape
        tokens = (bands // pt) * (height // ph) * (width // pw)
        ids = torch.arange(tokens, device=volume.device).expand(volume.shape[0], tokens)
    rows: Tensor = gather_patches(volume, ids, list(patch))
    return rows


def patch_embed_native(
    volume: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, position: Tensor | None
) -> Tensor:
    """`patch_embed_reference` with the compiled gather."""
    rows = patchify_native(volume, (weight.shape[2], weight.shape[3], weight.shape[4]), ids)
    return project(rows, weight, bias, ids, position)


def _library() -> Any:
    library = native.library()
    if library is None:
        raise RuntimeError(f"the native library can't be used: {native.unavailable_reason()}")
    return library


def can_run(volume: Tensor, *args: object, **kwargs: object) -> Reason:
    """None if the compiled gather serves this volume, else the reason."""
    if volume.device.type != "cpu":
        return f"volume lies on {volume.device}, native kernels run on the CPU"
    if volume.dtype != torch.float32:
        return f"volume has dtype {volume.dtype}, the native gather takes torch.float32"
    return None


@torch.library.custom_op("mmmae::gather_patches", mutates_args=())
def gather_patches(volume: Tensor, ids: Tensor, patch: list[int]) -> Tensor:
    """Rows `[B, K, C*pt*ph*pw]` of the patches of `volume [B, C, T, H, W]` named by `ids [B, K]`."""
    pt, ph, pw = patch
    rows = volume.new_empty(*ids.shape, volume.shape[1] * pt * ph * pw)
    _library().gather_patches(volume.detach(), ids, (pt, ph, pw), rows.flatten(0, 1), torch.get_num_threads())
    return rows


@gather_patches.register_fake
def _(volume: Tensor, ids: Tensor, patch: list[int]) -> Tensor:
    return volume.new_empty(*ids.shape, volume.shape[1] * patch[0] * patch[1] * patch[2])


@torch.library.custom_op("mmmae::scatter_patches", mutates_args=())
def scatter_patches(rows: Tensor, ids: Tensor, patch: list[int], shape: list[int]) -> Tensor:
    """The transpose of `gather_patches`: a volume of `shape` with each row added at its patch, zero elsewhere."""
    volume = rows.new_zeros(shape)
    pt, ph, pw = patch
    flat = rows.detach().contiguous().flatten(0, 1)
    _library().scatter_patches(flat, ids, (pt, ph, pw), volume, torch.get_num_threads())
    return volume


@scatter_patches.register_fake
def _(rows: Tensor, ids: Tensor, patch: list[int], shape: list[int]) -> Tensor:
    return rows.new_empty(shape)


def _keep_for_gather(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, list[int]], output: Tensor
) -> None:
    volume, ids, patch = inputs
    ctx.save_for_backward(ids)
    ctx.patch, ctx.shape = patch, list(volume.shape)  # type: ignore[attr-defined]


def _gather_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
    (ids,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return scatter_patches(grad, ids, ctx.patch, ctx.shape), None, None  # type: ignore[attr-defined]


def _keep_for_scatter(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, list[int], list[int]], output: Tensor
) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.patch = inputs[2]  # type: ignore[attr-defined]


def _scatter_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (ids,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return gather_patches(grad, ids, ctx.patch), None, None, None  # type: ignore[attr-defined]


gather_patches.register_autograd(_gather_backward, setup_context=_keep_for_gather)
scatter_patches.register_autograd(_scatter_backward, setup_context=_keep_for_scatter)
