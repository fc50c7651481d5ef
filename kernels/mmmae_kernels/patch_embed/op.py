"""Patch embedding of chosen tokens: gather, project, add bias and position."""

from __future__ import annotations

from torch import Tensor

from .. import native, registry
from ..checks import check_device, check_floating, check_ids, check_rank, check_shape
from .native import can_run, patch_embed_native, patchify_native
from .reference import patch_embed_reference, patchify_reference


def patch_embed(
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """Embed 3D patches of `volume`, only those named by `ids`.

    Args:
        volume: `[B, C, T, H, W]`, any strides.
        weight: `[D, C, pt, ph, pw]`; the patch size is read from it.
        bias: `[D]` or None.
        ids: `[B, K]` int64 token numbers, row-major over (t, h, w); None means all, in order.
        position: `[N, D]` added to each token by its number, or None.

    Returns:
        `[B, K, D]` in the dtype of `weight`, or what it and that of `position` promote to.

    Raises:
        ValueError: a shape or device does not fit, T, H or W is no multiple of the patch, or an id is outside 0..N-1
            (checked on the CPU and in debug mode).
    """
    tokens = check_embedding(volume, weight, bias, ids)
    if position is not None:
        check_shape("position", position, (tokens, weight.shape[0]))
        check_device("position", position, volume.device)
    function = registry.choose("patch_embed", volume, weight, bias, ids, position)
    embedded: Tensor = function(volume, weight, bias, ids, position)
    return embedded


def patchify(volume: Tensor, patch: tuple[int, int, int], ids: Tensor | None = None) -> Tensor:
    """Cut `volume [B, C, T, H, W]` into rows `[B, K, C*pt*ph*pw]`, only those named by `ids [B, K]` if given.

    Raises:
        ValueError: a shape does not fit, or an id is outside 0..N-1 (checked on the CPU and in debug mode).
    """
    check_rank("volume", volume, "[B, C, T, H, W]")
    tokens = _count_tokens(volume, patch)
    if ids is not None:
        _check_token_ids(ids, volume, tokens)
    rows: Tensor = registry.choose("patchify", volume, patch, ids)(volume, patch, ids)
    return rows


def check_embedding(volume: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> int:
    """The number of tokens N of `volume`, after checking that `weight` and `bias` embed those of `ids`."""
    check_rank("volume", volume, "[B, C, T, H, W]")
    check_rank("weight", weight, "[D, C, pt, ph, pw]")
    check_floating("weight", weight)
    check_device("weight", weight, volume.device)
    if volume.shape[1] != weight.shape[1]:
        raise ValueError(f"volume has {volume.shape[1]} channels, expected is {weight.shape[1]} as in weight")
    tokens = _count_tokens(volume, (weight.shape[2], weight.shape[3], weight.shape[4]))
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
        check_device("bias", bias, volume.device)
    if ids is not None:
        _check_token_ids(ids, volume, tokens)
    return tokens


def _count_tokens(volume: Tensor, patch: tuple[int, int, int]) -> int:
    tokens = 1
    for axis, size, part in zip("THW", volume.shape[2:], patch, strict=True):
        if size % part:
            raise ValueError(f"volume has {axis} = {size}, expected is a multiple of the patch's {part}")
        tokens *= size // part
    return tokens


def _check_token_ids(ids: Tensor, volume: Tensor, tokens: int) -> None:
    check_rank("ids", ids, "[B, K]")
    check_shape("ids", ids, (volume.shape[0], ids.shape[1]))
    check_device("ids", ids, volume.device)
    check_ids("ids", ids, tokens)


for _op, _eager, _native in (
    ("patch_embed", patch_embed_reference, patch_embed_native),
    ("patchify", patchify_reference, patchify_native),
):
    registry.register(
        _op,
        native=registry.Implementation(_native, can_run, native.unavailable_reason),
        eager=registry.Implementation(_eager),
    )
