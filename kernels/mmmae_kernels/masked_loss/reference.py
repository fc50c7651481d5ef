"""The definition of the masked L2 losses: squared error, its mean over channels, weighted mean over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..patch_embed.reference import patch_embed_reference

NORMALIZE_EPSILON = 1e-6  # added to the variance, as in MAE's normalised pixel target


def gradient_dtype(prediction: Tensor) -> torch.dtype:
    """Return the dtype of the gradient before it is multiplied by the incoming gradient of the loss.

    It is that of the prediction, but float32 for float16: the gradient of a mean over many elements underflows in
    float16 as long as the loss scale is not applied.
    """
    return torch.float32 if prediction.dtype == torch.float16 else prediction.dtype


def normalize_target(target: Tensor) -> Tensor:
    """Normalise each token `[..., D]` to mean 0 and (unbiased) variance 1 over its channels."""
    centred = target - target.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(target.shape[-1] - 1, 1)
    return centred / (variance + NORMALIZE_EPSILON).sqrt()


def masked_l2_loss_reference(
    prediction: Tensor, target: Tensor, ids: Tensor | None, weights: Tensor | None, normalize: bool
) -> Tensor:
    """Return the weighted mean squared error, 0 if all weights are 0; in float32 or higher precision."""
    if ids is not None:
        target = target.gather(1, ids[:, :, None].expand(-1, -1, target.shape[2]))
    precision = torch.promote_types(prediction.dtype, torch.float32)
    target = target.to(precision)
    if normalize:
        target = normalize_target(target)
    errors = (prediction.to(precision) - target).square().mean(-1)
    weights = torch.ones_like(errors) if weights is None else weights.to(precision)
    total = weights.sum()
    return (errors * weights).sum() / torch.where(total == 0, torch.ones_like(total), total)


def patch_l2_loss_reference(
    prediction: Tensor,
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    normalize: bool,
) -> Tensor:
    """Return `masked_l2_loss_reference` against the embedding of the patches `ids`, which gets no gradient."""
    with torch.no_grad():
        target = patch_embed_reference(volume, weight, bias, ids, None)
    return masked_l2_loss_reference(prediction, target, None, weights, normalize)
