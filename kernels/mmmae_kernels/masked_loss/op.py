"""L2 losses on masked tokens: against a target that exists, or against the embedding of the masked patches."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import dispatch
from ..autocast import matmul_dtype
from ..checks import check_device, check_floating, check_ids, check_rank, check_shape
from ..dispatch import kernels, native_refuses, native_unavailable, triton_refuses, triton_unavailable
from ..patch_embed import op as patch_embed_op
from ..patch_embed.op import as_float, check_embedding
from .reference import gradient_dtype, masked_l2_loss_reference, patch_l2_loss_reference

LONGEST_ROW = 8192  # channels that a program holds on a GPU: 16 a thread of each operand


def masked_l2_loss(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    normalize: bool = False,
) -> Tensor:
    """`(((prediction - target)**2).mean(-1) * weights).sum() / weights.sum()`, accumulated in float32 at least.

    Args:
        prediction: `[B, M, D]`.
        target: `[B, N, D]`, or `[B, M, D]` without `ids`.
        ids: `[B, M]` int64 token number of each prediction; None means row by row.
        weights: `[B, M]` of any number or bool type, a 0/1 mask for instance; None means 1 each.
        normalize: bring each target token to mean 0 and variance 1 first, as MAE does.

    Returns:
        A scalar; 0 with zero gradients where there is no row or all weights are 0.

    Raises:
        ValueError: shapes or devices do not fit, or an id is outside 0..N-1 (checked on the CPU and in debug mode).
    """
    _check_prediction(prediction, weights)
    check_rank("target", target, "[B, N, D]")
    check_device("target", target, prediction.device)
    rows = target.shape[1] if ids is None else prediction.shape[1]
    check_shape("prediction", prediction, (target.shape[0], rows, target.shape[2]))
    if ids is not None:
        check_shape("ids", ids, tuple(prediction.shape[:2]))
        check_device("ids", ids, prediction.device)
        check_ids("ids", ids, target.shape[1])
    function = dispatch.choose("masked_l2_loss", prediction, target, ids, weights, normalize)
    loss: Tensor = function(prediction, target, ids, weights, normalize)
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
    """`masked_l2_loss` of `prediction` against `patch_embed(volume, weight, bias, ids)`, which gets no gradient.

    Args:
        prediction: `[B, M, D]`.
        volume: `[B, C, T, H, W]`.
        weight, bias: `[D, C, pt, ph, pw]` and `[D]` or None, of the patch embedding.
        ids: `[B, M]` int64 token number of each prediction.
        weights, normalize: see `masked_l2_loss`.

    Returns:
        A scalar; only `prediction` gets a gradient.

    Raises:
        ValueError: shapes or devices do not fit, or an id is outside 0..N-1 (checked on the CPU and in debug mode).
    """
    _check_prediction(prediction, weights)
    check_embedding(volume, weight, bias, ids)
    check_shape("prediction", prediction, (*ids.shape, weight.shape[0]))
    check_device("prediction", prediction, volume.device)
    function = dispatch.choose("patch_l2_loss", prediction, volume, weight, bias, ids, weights, normalize)
    loss: Tensor = function(prediction, volume, weight, bias, ids, weights, normalize)
    return loss


def _check_prediction(prediction: Tensor, weights: Tensor | None) -> None:
    check_rank("prediction", prediction, "[B, M, D]")
    check_floating("prediction", prediction)
    if weights is not None:
        check_shape("weights", weights, tuple(prediction.shape[:2]))
        check_device("weights", weights, prediction.device)


def _masked_l2(
    prediction: Tensor, target: Tensor, ids: Tensor | None, weights: Tensor | None, normalize: bool, backend: str
) -> Tensor:
    with_gradient = prediction.requires_grad and torch.is_grad_enabled()
    loss: Tensor
    loss, _ = masked_l2_loss_forward(prediction, target, ids, weights, normalize, with_gradient, backend)
    return loss


def _patch_l2(
    prediction: Tensor,
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    normalize: bool,
    backend: str,
) -> Tensor:
    weight = weight.detach().to(matmul_dtype(weight))
    with_gradient = prediction.requires_grad and torch.is_grad_enabled()
    bias = None if bias is None else bias.detach()
    loss: Tensor
    loss, _ = patch_l2_loss_forward(
        prediction, volume.detach(), weight, bias, ids, weights, normalize, with_gradient, backend
    )
    return loss


@torch.library.custom_op("mmmae::masked_l2_loss", mutates_args=())
def masked_l2_loss_forward(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    normalize: bool,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss, a float32 scalar, and its gradient by the prediction (of no elements unless asked for).

    The gradient has the type of `gradient_dtype`.
    """
    forward = kernels("masked_loss", backend).masked_l2_loss_forward
    result: tuple[Tensor, Tensor] = forward(prediction, target, ids, weights, normalize, with_gradient)
    return result


@masked_l2_loss_forward.register_fake
def _(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    normalize: bool,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _loss_and_gradient(prediction, with_gradient)


@torch.library.custom_op("mmmae::patch_l2_loss", mutates_args=())
def patch_l2_loss_forward(
    prediction: Tensor,
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    normalize: bool,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `masked_l2_loss_forward`, against the embedding of the patches `ids`."""
    forward = kernels("masked_loss", backend).patch_l2_loss_forward
    result: tuple[Tensor, Tensor] = forward(prediction, volume, weight, bias, ids, weights, normalize, with_gradient)
    return result


@patch_l2_loss_forward.register_fake
def _(
    prediction: Tensor,
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    normalize: bool,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _loss_and_gradient(prediction, with_gradient)


def _loss_and_gradient(prediction: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    gradient = prediction.new_empty(prediction.shape if with_gradient else (0,), dtype=gradient_dtype(prediction))
    return prediction.new_empty((), dtype=torch.float32), gradient


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.others = len(inputs) - 1


def _backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # what is kept would pass for a constant
        raise RuntimeError("the loss's gradient can't be differentiated again; use_backend('eager') gives one that can")
    (gradient,) = ctx.saved_tensors
    others = (None,) * ctx.others
    if grad_loss is None:
        return None, *others
    # On the CPU a look at the factor is free, and it is 1 in most training steps. Who traces or counts sees a product.
    seen = gradient.device.type == "cpu" and not is_in_torch_dispatch_mode()
    if not (seen and float(grad_loss) == 1):
        gradient = (gradient * grad_loss.to(gradient.dtype)).to(ctx.dtype)
    return gradient, *others


masked_l2_loss_forward.register_autograd(_backward, setup_context=_keep)
patch_l2_loss_forward.register_autograd(_backward, setup_context=_keep)


def _constant(name: str, tensor: Tensor | None) -> dispatch.Reason:
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        return f"{name} requires a gradient, which only eager gives"
    return None


def _masked_native_runs(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = False,
) -> dispatch.Reason:
    constant = _constant("target", target) or _constant("weights", weights)
    return constant or native_refuses((("prediction", prediction), as_float(target, "target")))


def _masked_triton_runs(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = False,
) -> dispatch.Reason:
    if prediction.shape[2] > LONGEST_ROW:
        return f"prediction has {prediction.shape[2]} channels, a program holds at most {LONGEST_ROW}"
    constant = _constant("target", target) or _constant("weights", weights)
    return constant or triton_refuses((("prediction", prediction), as_float(target, "target")))


def _patch_native_runs(
    prediction: Tensor,
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    *_: object,
) -> dispatch.Reason:
    embedding = patch_embed_op.native_runs(volume, weight, bias, ids, None)
    return embedding or _constant("weights", weights) or native_refuses((("prediction", prediction),))


def _patch_triton_runs(
    prediction: Tensor,
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    *_: object,
) -> dispatch.Reason:
    if prediction.shape[2] > LONGEST_ROW:
        return f"prediction has {prediction.shape[2]} channels, a program holds at most {LONGEST_ROW}"
    embedding = patch_embed_op.triton_runs(volume, weight, bias, ids, None)
    return embedding or _constant("weights", weights) or triton_refuses((("prediction", prediction),))


dispatch.register(
    "masked_l2_loss",
    triton=dispatch.Implementation(
        functools.partial(_masked_l2, backend="triton"), _masked_triton_runs, triton_unavailable
    ),
    native=dispatch.Implementation(
        functools.partial(_masked_l2, backend="native"), _masked_native_runs, native_unavailable
    ),
    eager=dispatch.Implementation(masked_l2_loss_reference),
)
dispatch.register(
    "patch_l2_loss",
    triton=dispatch.Implementation(
        functools.partial(_patch_l2, backend="triton"), _patch_triton_runs, triton_unavailable
    ),
    native=dispatch.Implementation(
        functools.partial(_patch_l2, backend="native"), _patch_native_runs, native_unavailable
    ),
    eager=dispatch.Implementation(patch_l2_loss_reference),
)
