"""L2 losses on masked tokens: against a target that exists, or against the embedding of the masked patches."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, registry
from ..checks import check_device, check_floating, check_ids, check_rank, check_shape
from ..patch_embed.native import can_run
from ..patch_embed.op import check_embedding, patch_embed
from .reference import masked_l2_loss_reference


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
    function = registry.choose("masked_l2_loss", prediction, target, ids, weights, normalize)
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
    function = registry.choose("patch_l2_loss", prediction, volume, weight, bias, ids, weights, normalize)
    loss: Tensor = function(prediction, volume, weight, bias, ids, weights, normalize)
    return loss


def patch_l2_loss_composed(
    prediction: Tensor,
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    normalize: bool,
) -> Tensor:
    """Embed the masked patches alone, by the backend in force, then compare."""
    with torch.no_grad():
        target = patch_embed(volume, weight, bias, ids)
    return masked_l2_loss_reference(prediction, target, None, weights, normalize)


def _can_run_native(prediction: Tensor, volume: Tensor, *args: object, **kwargs: object) -> registry.Reason:
    return can_run(volume)


def _check_prediction(prediction: Tensor, weights: Tensor | None) -> None:
    check_rank("prediction", prediction, "[B, M, D]")
    check_floating("prediction", prediction)
    if weights is not None:
        check_shape("weights", weights, tuple(prediction.shape[:2]))
        check_device("weights", weights, prediction.device)


registry.register("masked_l2_loss", eager=registry.Implementation(masked_l2_loss_reference))
registry.register(
    "patch_l2_loss",
    native=registry.Implementation(patch_l2_loss_composed, _can_run_native, native.unavailable_reason),
    eager=registry.Implementation(patch_l2_loss_composed),
)
