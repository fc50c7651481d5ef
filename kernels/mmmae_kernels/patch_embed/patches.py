"""Patches as rows: what a patch embedding multiplies, and what a loss on pixels compares with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_rank
from ..dispatch import kernels, native_refuses, native_unavailable, triton_refuses, triton_unavailable
from .op import as_float, check_grid, check_token_ids
from .reference import patchify_reference, token_count


def patchify(volume: Tensor, patch: tuple[int, int, int], ids: Tensor | None = None) -> Tensor:
    """Cut `volume [B, C, T, H, W]` into rows `[B, K, C*pt*ph*pw]`, only those named by `ids [B, K]` if given.

    Raises:
        ValueError: a shape does not fit, or an id is outside 0..N-1 (checked on the CPU and in debug mode).
    """
    check_rank("volume", volume, "[B, C, T, H, W]")
    tokens = check_grid(volume, patch)
    if ids is not None:
        check_token_ids(ids, volume, tokens)
    rows: Tensor = dispatch.choose("patchify", volume, patch, ids)(volume, patch, ids)
    return rows


def _fused(volume: Tensor, patch: tuple[int, int, int], ids: Tensor | None, backend: str) -> Tensor:
    if ids is None:
        tokens = token_count(volume, patch)
        ids = torch.arange(tokens, device=volume.device).expand(volume.shape[0], tokens)
    rows: Tensor = gather_patches(volume, ids, list(patch), backend)
    return rows


@torch.library.custom_op("mmmae::gather_patches", mutates_args=())
def gather_patches(volume: Tensor, ids: Tensor, patch: list[int], backend: str) -> Tensor:
    """Rows `[B, K, C*pt*ph*pw]` of the patches of `volume [B, C, T, H, W]` named by `ids [B, K]`."""
    rows: Tensor = kernels("patch_embed", backend).gather_patches(volume, ids, tuple(patch))
    return rows


@gather_patches.register_fake
def _(volume: Tensor, ids: Tensor, patch: list[int], backend: str) -> Tensor:
    return volume.new_empty(*ids.shape, volume.shape[1] * patch[0] * patch[1] * patch[2])


@torch.library.custom_op("mmmae::scatter_patches", mutates_args=())
def scatter_patches(rows: Tensor, ids: Tensor, patch: list[int], shape: list[int], backend: str) -> Tensor:
    """The transpose of `gather_patches`: a volume of `shape` with each row added at its patch, zero elsewhere."""
    volume: Tensor = kernels("patch_embed", backend).scatter_patches(rows, ids, tuple(patch), tuple(shape))
    return volume


@scatter_patches.register_fake
def _(rows: Tensor, ids: Tensor, patch: list[int], shape: list[int], backend: str) -> Tensor:
    return rows.new_empty(shape)


def _keep_for_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    volume, ids, ctx.patch, ctx.backend = inputs
    ctx.save_for_backward(ids)
    ctx.shape = list(volume.shape)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (ids,) = ctx.saved_tensors
    return scatter_patches(grad, ids, ctx.patch, ctx.shape, ctx.backend), None, None, None


def _keep_for_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, ctx.patch, _, ctx.backend = inputs
    ctx.save_for_backward(ids)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    (ids,) = ctx.saved_tensors
    return gather_patches(grad, ids, ctx.patch, ctx.backend), None, None, None, None


gather_patches.register_autograd(_gather_backward, setup_context=_keep_for_gather)
scatter_patches.register_autograd(_scatter_backward, setup_context=_keep_for_scatter)


def _native_runs(volume: Tensor, *rest: object) -> dispatch.Reason:
    if volume.dtype != torch.float32:
        return f"volume has dtype {volume.dtype}, the native gather gives torch.float32"
    return native_refuses((("volume", volume),))


def _triton_runs(volume: Tensor, *rest: object) -> dispatch.Reason:
    if volume.requires_grad and torch.is_grad_enabled():
        return "volume requires a gradient, which the Triton gather does not give"
    return triton_refuses((as_float(volume),))


dispatch.register(
    "patchify",
    triton=dispatch.Implementation(functools.partial(_fused, backend="triton"), _triton_runs, triton_unavailable),
    native=dispatch.Implementation(functools.partial(_fused, backend="native"), _native_runs, native_unavailable),
    eager=dispatch.Implementation(patchify_reference),
)
