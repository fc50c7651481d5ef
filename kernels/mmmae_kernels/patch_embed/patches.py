"""Patches as rows, for example as the target of a loss on pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_rank, check_real, check_whole, described
from ..dispatch import Arguments, Reason, declare, native_refuses, triton_refuses
from ..operators import declare_operator, kernels_for
from .op import as_float, check_grid, check_token_ids
from .reference import patchify_reference, token_count


def patchify(volume: Tensor, patch: tuple[int, int, int], ids: Tensor | None = None) -> Tensor:
    """Cut a volume into patches, or only those that `ids` names.

    Args:
        volume: `[B, C, T, H, W]`, any strides.
        patch: sizes (pt, ph, pw), which divide T, H and W.
        ids: `[B, K]` int64 token numbers, row-major over (t, h, w); None means all N tokens in order.

    Returns:
        `[B, K, C*pt*ph*pw]` in the dtype of `volume`, elements in the order (c, t, h, w).

    Raises:
        ValueError: shapes do not match, or an id is outside 0..N-1 (checked on the CPU and in debug mode).

    Example:
        >>> patchify(torch.arange(16.0).view(1, 1, 1, 4, 4), (1, 2, 2), torch.tensor([[3]]))
        tensor([[[10., 11., 14., 15.]]])
    """
    check_rank("volume", volume, "[B, C, T, H, W]")
    check_real("volume", volume)
    patch = _check_patch(patch)
    tokens = check_grid(volume, patch)
    if ids is not None:
        check_token_ids(ids, volume, tokens)
    key = (volume.device, volume.dtype, volume.requires_grad and torch.is_grad_enabled())
    rows: Tensor = PATCHIFY.select(key, volume, patch, ids)(volume, patch, ids)
    return rows


def _check_patch(patch: tuple[int, int, int]) -> tuple[int, int, int]:
    if not isinstance(patch, (tuple, list)) or len(patch) != 3:
        given = f"has {len(patch)} sizes" if isinstance(patch, (tuple, list)) else f"is {described(patch)}"
        raise ValueError(f"patch {given}, expected three sizes (bands, rows, columns)")
    bands, rows, columns = (check_whole(f"patch[{axis}]", size, least=1) for axis, size in enumerate(patch))
    return bands, rows, columns


def _by_kernels(backend: str) -> Callable[..., Tensor]:
    def run(volume: Tensor, patch: tuple[int, int, int], ids: Tensor | None) -> Tensor:
        if ids is None:
            tokens = token_count(volume, patch)
            ids = torch.arange(tokens, device=volume.device).expand(volume.shape[0], tokens)
        rows: Tensor = _Gather.apply(volume, ids, patch, backend)  # type: ignore[no-untyped-call]
        return rows

    return run


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, volume: Tensor, ids: Tensor, patch: tuple[int, int, int], backend: str) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.patch, ctx.shape, ctx.backend = patch, tuple(volume.shape), backend
        rows: Tensor = kernels_for(volume, backend).gather_patches(volume, ids, patch)
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        grad_volume: Tensor = _Scatter.apply(grad, ids, ctx.patch, ctx.shape, ctx.backend)  # type: ignore[no-untyped-call]
        return grad_volume, None, None, None


class _Scatter(torch.autograd.Function):
    """The transpose of `_Gather`, and its gradient; the two are each other's gradients."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, ids: Tensor, patch: tuple[int, int, int], shape: tuple[int, ...], backend: str
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.patch, ctx.backend = patch, backend
        volume: Tensor = kernels_for(rows, backend).scatter_patches(rows, ids, patch, shape)
        return volume

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (ids,) = ctx.saved_tensors
        grad_rows: Tensor = _Gather.apply(grad, ids, ctx.patch, ctx.backend)  # type: ignore[no-untyped-call]
        return grad_rows, None, None, None, None


# Returns the patches `ids [B, K]` of `volume [B, C, T, H, W]` as rows `[B, K, C*pt*ph*pw]`.
declare_operator(
    "patch_embed",
    "gather_patches(Tensor volume, Tensor ids, SymInt[] patch) -> Tensor",
    lambda volume, ids, patch: volume.new_empty(*ids.shape, volume.shape[1] * patch[0] * patch[1] * patch[2]),
)
# Returns a volume of `shape` with each row added to its patch, zero elsewhere: the transpose of `gather_patches`.
declare_operator(
    "patch_embed",
    "scatter_patches(Tensor rows, Tensor ids, SymInt[] patch, SymInt[] shape) -> Tensor",
    lambda rows, ids, patch, shape: rows.new_empty(shape),
)


def _native_refuses(arguments: Arguments) -> Reason:
    return native_refuses([("volume", arguments["volume"])])


def _triton_refuses(arguments: Arguments) -> Reason:
    volume = arguments["volume"]
    if volume.requires_grad and torch.is_grad_enabled():
        return "volume requires a gradient, which the Triton gather does not compute"
    return triton_refuses([as_float(volume)])


PATCHIFY = declare(
    "patchify", patchify_reference, _by_kernels, native_refuses=_native_refuses, triton_refuses=_triton_refuses
)
