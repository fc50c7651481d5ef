"""Patch embedding of chosen tokens: gather, project, add bias and position."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autocast import matmul_dtype
from ..checks import check_device, check_floating, check_ids, check_rank, check_shape
from ..dispatch import kernels, native_refuses, native_unavailable, triton_refuses, triton_unavailable
from .reference import patch_embed_reference, token_count

INTEGERS = (torch.uint8, torch.int16)  # that kernels convert on their way from the volume


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
    function = dispatch.choose("patch_embed", volume, weight, bias, ids, position)
    embedded: Tensor = function(volume, weight, bias, ids, position)
    return embedded


def check_embedding(volume: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> int:
    """The number of tokens N of `volume`, after checking that `weight` and `bias` embed those of `ids`."""
    check_rank("volume", volume, "[B, C, T, H, W]")
    check_rank("weight", weight, "[D, C, pt, ph, pw]")
    check_floating("weight", weight)
    check_device("weight", weight, volume.device)
    if volume.shape[1] != weight.shape[1]:
        raise ValueError(f"volume has {volume.shape[1]} channels, expected is {weight.shape[1]} as in weight")
    tokens = check_grid(volume, weight.shape[2:])
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
        check_device("bias", bias, volume.device)
    if ids is not None:
        check_token_ids(ids, volume, tokens)
    return tokens


def check_grid(volume: Tensor, patch: Sequence[int]) -> int:
    """The number of tokens N of `volume`, after checking that `patch` divides it."""
    for axis, size, part in zip("THW", volume.shape[2:], patch, strict=True):
        if part < 1 or size % part:
            raise ValueError(f"volume has {axis} = {size}, expected is a multiple of the patch's {part}")
    return token_count(volume, patch)


def check_token_ids(ids: Tensor, volume: Tensor, tokens: int) -> None:
    """Raise unless `ids [B, K]` names tokens of `volume`, of which a sample has `tokens`."""
    check_rank("ids", ids, "[B, K]")
    check_shape("ids", ids, (volume.shape[0], ids.shape[1]))
    check_device("ids", ids, volume.device)
    check_ids("ids", ids, tokens)


def _fused(
    volume: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, position: Tensor | None, backend: str
) -> Tensor:
    weight = weight.to(matmul_dtype(weight))
    embedded: Tensor = patch_embed_forward(volume, weight, bias, ids, position, backend)
    return embedded


@torch.library.custom_op("mmmae::patch_embed", mutates_args=())
def patch_embed_forward(
    volume: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, position: Tensor | None, backend: str
) -> Tensor:
    """`[B, K, D]` in the type that weight and position promote to."""
    forward = kernels("patch_embed", backend).patch_embed_forward
    embedded: Tensor = forward(volume, weight, bias, ids, position)
    return embedded


@patch_embed_forward.register_fake
def _(
    volume: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, position: Tensor | None, backend: str
) -> Tensor:
    tokens = token_count(volume, weight.shape[2:]) if ids is None else ids.shape[1]
    dtype = weight.dtype if position is None else torch.promote_types(weight.dtype, position.dtype)
    return volume.new_empty(volume.shape[0], tokens, weight.shape[0], dtype=dtype)


@torch.library.custom_op("mmmae::patch_embed_backward", mutates_args=())
def patch_embed_backward(
    grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None, needs: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by volume, weight, bias and position; of no elements for those that `needs` does not ask for."""
    backward = kernels("patch_embed", backend).patch_embed_backward
    grads = backward(grad, volume, weight, ids, tuple(needs))
    first, second, third, fourth = (grad.new_empty(0) if gradient is None else gradient for gradient in grads)
    return first, second, third, fourth


@patch_embed_backward.register_fake
def _(
    grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None, needs: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none, width = (0,), weight.shape[0]
    return (
        volume.new_empty(volume.shape) if needs[0] else grad.new_empty(none),
        weight.new_empty(weight.shape) if needs[1] else grad.new_empty(none),
        weight.new_empty(width) if needs[2] else grad.new_empty(none),
        grad.new_empty((token_count(volume, weight.shape[2:]), width) if needs[3] else none),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    volume, weight, bias, ids, position, ctx.backend = inputs
    ctx.save_for_backward(volume, weight, ids)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (volume, weight, bias, position)]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    volume, weight, ids = ctx.saved_tensors
    needs = [ctx.needs_input_grad[place] for place in (0, 1, 2, 4)]
    grads = patch_embed_backward(grad, volume, weight, ids, needs, ctx.backend)
    by_volume, by_weight, by_bias, by_position = (
        gradient.to(dtype) if need else None for gradient, need, dtype in zip(grads, needs, ctx.dtypes, strict=True)
    )
    return by_volume, by_weight, by_bias, None, by_position, None


patch_embed_forward.register_autograd(_backward, setup_context=_keep)


def native_runs(
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    position: Tensor | None = None,
) -> dispatch.Reason:
    """None if the native kernels take these arguments, else the reason."""
    floats = (("weight", weight), ("bias", bias), ("position", position))
    if matmul_dtype(weight) != torch.float32:
        return f"the product is in {matmul_dtype(weight)}, native kernels take torch.float32"
    return native_refuses((as_float(volume), *floats))


def triton_runs(
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    position: Tensor | None = None,
) -> dispatch.Reason:
    """None if the Triton kernels take these arguments, else the reason."""
    return triton_refuses((as_float(volume), ("weight", weight), ("bias", bias), ("position", position)))


def as_float(tensor: Tensor, name: str = "volume") -> tuple[str, Tensor]:
    """A tensor by name, to be checked among floating point ones: integers that kernels convert count as float32."""
    return name, tensor.new_empty(0, dtype=torch.float32) if tensor.dtype in INTEGERS else tensor


dispatch.register(
    "patch_embed",
    triton=dispatch.Implementation(functools.partial(_fused, backend="triton"), triton_runs, triton_unavailable),
    native=dispatch.Implementation(functools.partial(_fused, backend="native"), native_runs, native_unavailable),
    eager=dispatch.Implementation(patch_embed_reference),
)
