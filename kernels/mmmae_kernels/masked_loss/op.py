"""Mean squared error of masked tokens, against a given target or against the embedding of the masked patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..autocast import cast, matmul_dtype
from ..checks import (
    check_device,
    check_flag,
    check_floating,
    check_ids,
    check_rank,
    check_real,
    check_shape,
    check_tensor,
)
from ..dispatch import Arguments, Reason, declare, native_refuses, triton_refuses
from ..operators import declare_operator, fast_apply, first_derivative_only, kernels_for, needs_operators
from ..patch_embed.op import (
    as_float,
    check_embedding,
    dispatch_key,
    embedding_native_refuses,
    embedding_triton_refuses,
)
from .reference import gradient_dtype, masked_l2_loss_reference, patch_l2_loss_reference

LONGEST_ROW = 8192  # channels: a GPU thread then holds 16 of each operand


def masked_l2_loss(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    normalize: bool = False,
) -> Tensor:
    """Compute the weighted mean squared error of predicted tokens against the target tokens that `ids` names.

    The result is `(((prediction - target)**2).mean(-1) * weights).sum() / weights.sum()` with `target` gathered by
    `ids`, accumulated in float32 or higher precision.

    Args:
        prediction: `[B, M, D]`.
        target: `[B, N, D]`, or `[B, M, D]` without `ids`.
        ids: `[B, M]` int64 token number of each prediction; None means that `target` is in the order of `prediction`.
        weights: `[B, M]`, any real or bool dtype, for example a 0/1 mask; None means 1.
        normalize: whether to normalise each target token to mean 0 and variance 1, as MAE does.

    Returns:
        A scalar; 0 with zero gradients if there are no tokens or all weights are 0.

    Raises:
        ValueError: shapes or devices do not match, or an id is outside 0..N-1 (checked on the CPU and in debug mode).

    Example:
        >>> target, ids = torch.randn(2, 8, 4), torch.tensor([[1, 5], [0, 7]])
        >>> prediction = torch.zeros(2, 2, 4, requires_grad=True)
        >>> loss = masked_l2_loss(prediction, target, ids)
        >>> expected = F.mse_loss(prediction, target.gather(1, ids[:, :, None].expand(-1, -1, 4)))
        >>> torch.allclose(loss, expected)
        True
    """
    _check_prediction(prediction, weights)
    check_flag("normalize", normalize)
    check_rank("target", target, "[B, N, D]")
    check_real("target", target)
    check_device("target", target, prediction.device)
    rows = target.shape[1] if ids is None else prediction.shape[1]
    check_shape("prediction", prediction, (target.shape[0], rows, target.shape[2]))
    if ids is not None:
        check_shape("ids", ids, tuple(prediction.shape[:2]))
        check_device("ids", ids, prediction.device)
        check_ids("ids", ids, target.shape[1])
    arguments = (prediction, target, ids, weights, normalize)
    key = (*dispatch_key(prediction, target), prediction.shape[2], _needs_gradient(target), _needs_gradient(weights))
    loss: Tensor = MASKED_L2_LOSS.select(key, *arguments)(*arguments)
    return loss


def patch_l2_loss(
    prediction: Tensor,
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None = None,
    *,
    normalize: bool = False,
) -> Tensor:
    """Compute `masked_l2_loss` of `prediction` against the target `patch_embed(volume, weight, bias, ids)`.

    The target is detached, and it is never in memory as a whole.

    Args:
        prediction: `[B, M, D]`.
        volume: `[B, C, T, H, W]`.
        weight, bias: `[D, C, pt, ph, pw]` and `[D]` or None, parameters of the patch embedding.
        ids: `[B, M]` int64 token number of each prediction.
        weights, normalize: see `masked_l2_loss`.

    Returns:
        A scalar; only `prediction` gets a gradient.

    Raises:
        ValueError: shapes or devices do not match, or an id is outside 0..N-1 (checked on the CPU and in debug mode).

    Example:
        >>> volume, weight = torch.randn(2, 1, 4, 8, 8), torch.randn(16, 1, 2, 4, 4)
        >>> ids = torch.tensor([[0, 3], [7, 1]])
        >>> prediction = patch_embed(volume, weight, None, ids)
        >>> patch_l2_loss(prediction, volume, weight, None, ids).item() < 1e-6
        True
    """
    _check_prediction(prediction, weights)
    check_flag("normalize", normalize)
    check_tensor("ids", ids)
    check_embedding(volume, weight, bias, ids)
    check_shape("prediction", prediction, (*ids.shape, weight.shape[0]))
    check_device("prediction", prediction, volume.device)
    arguments = (prediction, volume, weight, bias, ids, weights, normalize)
    key = (*dispatch_key(volume, prediction, weight, bias), matmul_dtype(weight), prediction.shape[2])
    loss: Tensor = PATCH_L2_LOSS.select((*key, _needs_gradient(weights)), *arguments)(*arguments)
    return loss


def _check_prediction(prediction: Tensor, weights: Tensor | None) -> None:
    check_rank("prediction", prediction, "[B, M, D]")
    check_floating("prediction", prediction)
    if weights is not None:
        check_shape("weights", weights, tuple(prediction.shape[:2]))
        check_device("weights", weights, prediction.device)
        check_real("weights", weights)


def _masked_by_kernels(backend: str) -> Callable[..., Tensor]:
    def run(prediction: Tensor, *arguments: Any) -> Tensor:
        with_gradient = prediction.requires_grad and torch.is_grad_enabled()
        loss: Tensor = _apply(prediction, "masked_l2_loss_forward", (*arguments, with_gradient), backend)
        return loss

    return run


def _patch_by_kernels(backend: str) -> Callable[..., Tensor]:
    def run(prediction: Tensor, volume: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        dtype = matmul_dtype(weight)
        volume, weight, bias = volume.detach(), cast(weight, dtype).detach(), None if bias is None else bias.detach()
        with_gradient = prediction.requires_grad and torch.is_grad_enabled()
        arguments = (volume, weight, bias, *rest, with_gradient)
        loss: Tensor = _apply(prediction, "patch_l2_loss_forward", arguments, backend)
        return loss

    return run


class _Loss(torch.autograd.Function):
    """A loss whose gradient is computed in forward; backward multiplies it by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, kernel: str, arguments: tuple[Any, ...], backend: str) -> Tensor:
        loss: Tensor
        loss, gradient = getattr(kernels_for(prediction, backend), kernel)(prediction, *arguments)
        ctx.dtype = prediction.dtype
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # The incoming gradient is 1 in most training steps, and on the CPU it can be read at no cost. Tracers and
        # counters always see the multiplication.
        can_read = gradient.device.type == "cpu" and not needs_operators(gradient)
        if not (can_read and gradient.dtype == ctx.dtype and float(grad_loss) == 1):
            gradient = (gradient * grad_loss.to(gradient.dtype)).to(ctx.dtype)
        return gradient, None, None, None


_apply = fast_apply(_Loss)


def _loss_and_gradient(prediction: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    with_gradient = arguments[-1]
    gradient = prediction.new_empty(prediction.shape if with_gradient else (0,), dtype=gradient_dtype(prediction))
    return prediction.new_empty((), dtype=torch.float32), gradient


# Returns the loss, a float32 scalar, and its gradient with respect to the prediction in the dtype of `gradient_dtype`
# (an empty tensor unless `with_gradient`).
declare_operator(
    "masked_loss",
    "masked_l2_loss_forward(Tensor prediction, Tensor target, Tensor? ids, Tensor? weights, bool normalize, "
    "bool with_gradient) -> (Tensor, Tensor)",
    _loss_and_gradient,
    name="masked_l2_loss",
)
# Returns the same against the embedding of the patches `ids`.
declare_operator(
    "masked_loss",
    "patch_l2_loss_forward(Tensor prediction, Tensor volume, Tensor weight, Tensor? bias, Tensor ids, Tensor? weights, "
    "bool normalize, bool with_gradient) -> (Tensor, Tensor)",
    _loss_and_gradient,
    name="patch_l2_loss",
)


def _needs_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _refuses(arguments: Arguments, refuse: Callable[[Iterable[tuple[str, Tensor]]], Reason]) -> Reason:
    for name in ("target", "weights"):
        if _needs_gradient(arguments.get(name)):
            return f"{name} requires a gradient, which only the eager backend computes"
    target = [as_float(arguments["target"], "target")] if "target" in arguments else []
    return refuse([("prediction", arguments["prediction"]), *target])


def _native_refuses(arguments: Arguments) -> Reason:
    embedding = embedding_native_refuses(arguments) if "volume" in arguments else None
    return embedding or _refuses(arguments, native_refuses)


def _triton_refuses(arguments: Arguments) -> Reason:
    width = arguments["prediction"].shape[2]
    if width > LONGEST_ROW:
        return f"prediction has {width} channels, Triton kernels take at most {LONGEST_ROW}"
    embedding = embedding_triton_refuses(arguments) if "volume" in arguments else None
    return embedding or _refuses(arguments, triton_refuses)


MASKED_L2_LOSS = declare(
    "masked_l2_loss",
    masked_l2_loss_reference,
    _masked_by_kernels,
    native_refuses=_native_refuses,
    triton_refuses=_triton_refuses,
)
PATCH_L2_LOSS = declare(
    "patch_l2_loss",
    patch_l2_loss_reference,
    _patch_by_kernels,
    native_refuses=_native_refuses,
    triton_refuses=_triton_refuses,
)
