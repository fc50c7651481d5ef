"""Patch embedding of all or some tokens: gather, project, add bias and position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import cast, cast_again, for_backward, matmul_dtype
from ..checks import (
    check_device,
    check_floating,
    check_ids,
    check_like,
    check_rank,
    check_real,
    check_shape,
    check_vector,
)
from ..dispatch import Arguments, Reason, declare, native_refuses, triton_refuses
from ..operators import declare_operator, fast_apply, first_derivative_only, kernels_for
from .reference import patch_embed_reference, token_count

INTEGERS = (torch.uint8, torch.int16)  # volumes of these dtypes are converted by the kernels


def patch_embed(
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """Compute embeddings of the 3D patches of `volume`, or only of those that `ids` names.

    Args:
        volume: `[B, C, T, H, W]`, any strides.
        weight: `[D, C, pt, ph, pw]`; defines the patch size.
        bias: `[D]` or None.
        ids: `[B, K]` int64 token numbers, row-major over (t, h, w); None means all N tokens in order.
        position: `[N, D]`, one embedding for each token number, or None.

    Returns:
        `[B, K, D]` in the dtype that `weight` and `position` promote to.

    Raises:
        ValueError: shapes or devices do not match, T, H or W is not a multiple of the patch, or an id is outside 0..N-1
            (checked on the CPU and in debug mode).

    Example:
        >>> volume = torch.randn(2, 1, 12, 32, 32)
        >>> weight, bias = torch.randn(64, 1, 3, 16, 16), torch.zeros(64)
        >>> patch_embed(volume, weight, bias).shape  # 4 x 2 x 2 tokens
        torch.Size([2, 16, 64])
        >>> ids = torch.tensor([[0, 5, 9], [3, 1, 15]])
        >>> patch_embed(volume, weight, bias, ids).shape
        torch.Size([2, 3, 64])
    """
    tokens = check_embedding(volume, weight, bias, ids)
    if position is not None:
        check_shape("position", position, (tokens, weight.shape[0]))
        check_device("position", position, volume.device)
        check_floating("position", position)
    arguments = (volume, weight, bias, ids, position)
    embedded: Tensor = PATCH_EMBED.select(
        (*dispatch_key(volume, weight, bias, position), matmul_dtype(weight)), *arguments
    )(*arguments)
    return embedded


def dispatch_key(volume: Tensor, *floats: Tensor | None) -> tuple[Any, ...]:
    """Return the dispatch key of an op on patches: device and dtypes."""
    return volume.device, volume.dtype, *[None if tensor is None else tensor.dtype for tensor in floats]


def check_embedding(volume: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> int:
    """Return the number of tokens N of `volume`, or raise unless `weight`, `bias` and `ids` match it."""
    check_rank("volume", volume, "[B, C, T, H, W]")
    check_real("volume", volume)
    check_rank("weight", weight, "[D, C, pt, ph, pw]")
    check_floating("weight", weight)
    check_device("weight", weight, volume.device)
    if volume.shape[1] != weight.shape[1]:
        raise ValueError(f"volume has {volume.shape[1]} channels, expected {weight.shape[1]} as in weight")
    tokens = check_grid(volume, weight.shape[2:])
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], volume.device)
        if bias.dtype != weight.dtype:
            check_like("bias", bias, weight.dtype, "weight")
    if ids is not None:
        check_token_ids(ids, volume, tokens)
    return tokens


def check_grid(volume: Tensor, patch: Sequence[int]) -> int:
    """Return the number of tokens N of `volume`, or raise unless its sizes are multiples of `patch`."""
    for axis, size, part in zip("THW", volume.shape[2:], patch, strict=True):
        if part < 1 or size % part:
            raise ValueError(f"volume has {axis} = {size}, expected a multiple of the patch size {part}")
    return token_count(volume, patch)


def check_token_ids(ids: Tensor, volume: Tensor, tokens: int) -> None:
    """Raise unless `ids [B, K]` contains token numbers for `volume`, whose samples have `tokens` tokens."""
    check_rank("ids", ids, "[B, K]")
    check_shape("ids", ids, (volume.shape[0], ids.shape[1]))
    check_device("ids", ids, volume.device)
    check_ids("ids", ids, tokens)


def _by_kernels(backend: str) -> Callable[..., Tensor]:
    def run(volume: Tensor, weight: Tensor, *others: Tensor | None) -> Tensor:
        embedded: Tensor = _apply(volume, weight, *others, matmul_dtype(weight), backend)
        return embedded

    return run


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        volume: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,
        position: Tensor | None,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (volume, weight, bias, position)]
        used = cast(weight, dtype)
        ctx.save_for_backward(volume, for_backward(weight, used), ids)
        ctx.dtype, ctx.backend = dtype, backend
        embedded: Tensor = kernels_for(volume, backend).patch_embed_forward(volume, used, bias, ids, position)
        return embedded

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        volume, weight, ids = ctx.saved_tensors
        needs = tuple([ctx.needs_input_grad[place] for place in (0, 1, 2, 4)])
        weight = cast_again(weight, ctx.dtype)
        gradients = kernels_for(volume, ctx.backend).patch_embed_backward(grad, volume, weight, ids, needs)
        grad_volume, grad_weight, grad_bias, grad_position = (
            gradient.to(dtype) if need else None
            for gradient, need, dtype in zip(gradients, needs, ctx.dtypes, strict=True)
        )
        return grad_volume, grad_weight, grad_bias, None, grad_position, None, None


_apply = fast_apply(_PatchEmbed)


def _forward_fake(volume: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
    _, ids, position = rest
    tokens = token_count(volume, weight.shape[2:]) if ids is None else ids.shape[1]
    dtype = weight.dtype if position is None else torch.promote_types(weight.dtype, position.dtype)
    return volume.new_empty(volume.shape[0], tokens, weight.shape[0], dtype=dtype)


# Returns `[B, K, D]` in the dtype that weight and position promote to.
declare_operator(
    "patch_embed",
    "patch_embed_forward(Tensor volume, Tensor weight, Tensor? bias, Tensor? ids, Tensor? position) -> Tensor",
    _forward_fake,
    name="patch_embed",
)


def _backward_fake(grad: Tensor, volume: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    none, width = (0,), weight.shape[0]
    return (
        volume.new_empty(volume.shape) if needs[0] else grad.new_empty(none),
        weight.new_empty(weight.shape) if needs[1] else grad.new_empty(none),
        weight.new_empty(width) if needs[2] else grad.new_empty(none),
        grad.new_empty((token_count(volume, weight.shape[2:]), width) if needs[3] else none),
    )


# Returns the gradients of volume, weight, bias and position; empty tensors for those that `needs` excludes.
declare_operator(
    "patch_embed",
    "patch_embed_backward(Tensor grad, Tensor volume, Tensor weight, Tensor? ids, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


def embedding_native_refuses(arguments: Arguments) -> Reason:
    """Return None if the native kernels can embed these patches, else the reason."""
    return native_refuses(_tensors(arguments))


def embedding_triton_refuses(arguments: Arguments) -> Reason:
    """Return None if the Triton kernels can embed these patches, else the reason."""
    return triton_refuses(_tensors(arguments))


def _tensors(arguments: Arguments) -> Iterator[tuple[str, Tensor]]:
    yield as_float(arguments["volume"])
    for name in ("weight", "bias", "position"):
        if arguments.get(name) is not None:
            yield name, arguments[name]


def as_float(tensor: Tensor, name: str = "volume") -> tuple[str, Tensor]:
    """Return name and tensor, with an empty float32 tensor in place of integers that the kernels convert."""
    return name, tensor.new_empty(0, dtype=torch.float32) if tensor.dtype in INTEGERS else tensor


PATCH_EMBED = declare(
    "patch_embed",
    patch_embed_reference,
    _by_kernels,
    native_refuses=embedding_native_refuses,
    triton_refuses=embedding_triton_refuses,
)
