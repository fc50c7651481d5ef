"""Masked L2 losses on the CPU, against a given target or against patches that are embedded in chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, get_num_threads

from ..cpu import library
from ..dispatch import KERNEL_DTYPES
from ..patch_embed.cpu import gather_rows
from .reference import NORMALIZE_EPSILON, gradient_dtype

_loss_of_target = library.function("masked_l2_loss")
_loss_of_difference = library.function("l2_loss_of_difference")

# Rows of a chunk: enough for a GEMM at full speed, few enough that its output is still in cache for the row kernel.
CHUNK_ROWS = 600


def masked_l2_loss_forward(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    normalize: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss of `masked_l2_loss_reference` and, from the same pass, its gradient.

    Args:
        prediction: `[B, M, D]`.
        target: `[B, N, D]`, or `[B, M, D]` without `ids`, any dtype.
        ids: `[B, M]` token number of each prediction; None means that target rows are in the order of predictions.
        weights: `[B, M]`, any real or bool dtype; None means 1.
        normalize: whether to normalise each target row to mean 0 and variance 1.
        with_gradient: whether to compute the gradient.

    Returns:
        The loss, a float32 scalar, and its gradient with respect to `prediction` (or an empty tensor).

    Raises:
        ValueError: an id is outside 0..N-1.
    """
    weights = _float_weights(weights)
    total, width = _total(weights, prediction), prediction.size(2)
    gradient = _new_gradient(prediction, with_gradient)
    error = _masked_l2_loss(prediction, target, ids, weights, normalize, _factor(total, width), gradient)
    return _loss(error, total, prediction), gradient


def patch_l2_loss_forward(
    prediction: Tensor,
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    normalize: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss against the embedding of the patches `ids` and, from the same pass, its gradient.

    The target is never stored as a whole. In float32, if it is not normalised, the GEMM writes the difference into the
    memory of the gradient.

    Args:
        prediction: `[B, M, D]`.
        volume: `[B, C, T, H, W]` of a dtype in `library.DTYPES`.
        weight, bias: `[D, C, pt, ph, pw]` and `[D]`; the product has the dtype of `weight`.
        ids: `[B, M]` token number of each prediction.
        weights, normalize, with_gradient: see `masked_l2_loss_forward`.

    Returns:
        The loss, a float32 scalar, and its gradient with respect to `prediction` (or an empty tensor).

    Raises:
        ValueError: an id is outside 0..N-1.
    """
    matrix, width = weight.detach().flatten(1), weight.size(0)
    weights = _float_weights(weights)
    bias = None if bias is None else bias.detach().to(matrix.dtype).contiguous()
    prediction = prediction.detach()
    subtracts = not normalize and matrix.dtype == prediction.dtype == torch.float32
    batch, masked = ids.shape
    total = _total(weights, prediction)
    factor = _factor(total, width)
    gradient = _new_gradient(prediction, with_gradient)
    chunks = max(math.ceil(masked / CHUNK_ROWS), 1)  # a sample
    rows = max(math.ceil(masked / chunks), 1)
    samples = max(CHUNK_ROWS // max(masked, 1), 1)
    patches = matrix.new_empty(min(samples, batch) * rows, matrix.size(1))
    buffer = matrix.new_empty(0 if subtracts and with_gradient else patches.shape[0], width)
    patch = (weight.shape[2], weight.shape[3], weight.shape[4])
    error = 0.0
    for part in (
        (slice(b, b + samples), slice(m, m + rows)) for b in range(0, batch, samples) for m in range(0, masked, rows)
    ):
        predicted, part_weights = prediction[part], None if weights is None else weights[part]
        count = predicted.shape[0] * predicted.shape[1]
        part_patches, out = patches[:count], gradient[part] if with_gradient else gradient
        gather_rows(volume[part[0]], patch, ids[part], part_patches)
        if not subtracts:
            target = _linear(part_patches, matrix, bias, buffer[:count]).view(predicted.shape)
            error += _masked_l2_loss(predicted, target, None, part_weights, normalize, factor, out)
        else:
            difference = out.view(count, width) if with_gradient else buffer[:count]
            torch.addmm(predicted.reshape(count, width), part_patches, matrix.t(), alpha=-1, out=difference)
            error += _loss_of_difference(
                difference.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                0 if part_weights is None else part_weights.data_ptr(),
                _strides(part_weights),
                factor,
                tuple(predicted.shape),
                get_num_threads(),
            )
    return _loss(error, total, prediction), gradient


def _linear(rows: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(rows, matrix.t(), out=out)
    return torch.addmm(bias, rows, matrix.t(), out=out)


def _masked_l2_loss(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    normalize: bool,
    factor: float,
    out: Tensor,
) -> float:
    """Return the weighted sum of squared errors; write `factor * weight * (prediction - target)` into `out`, if any."""
    prediction = library.contiguous_rows(prediction)
    target = target.detach()
    target = library.contiguous_rows(target if target.dtype in KERNEL_DTYPES else target.to(torch.float32))
    error: float = _loss_of_target(
        prediction.data_ptr(),
        prediction.stride()[:2],
        target.data_ptr(),
        target.stride()[:2],
        0 if ids is None else ids.data_ptr(),
        _strides(ids),
        0 if weights is None else weights.data_ptr(),
        _strides(weights),
        NORMALIZE_EPSILON if normalize else None,
        factor,
        out.data_ptr(),
        (library.DTYPES[prediction.dtype], library.DTYPES[target.dtype], library.DTYPES[out.dtype]),
        (*prediction.shape[:2], *target.shape[1:]),
        get_num_threads(),
    )
    return error


def _new_gradient(prediction: Tensor, with_gradient: bool) -> Tensor:
    return prediction.new_empty(prediction.shape if with_gradient else 0, dtype=gradient_dtype(prediction))


def _strides(table: Tensor | None) -> tuple[int, ...]:
    """Return the strides of a tensor `[B, M]`, or zeros for None."""
    return (0, 0) if table is None else table.stride()


def _float_weights(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.detach().to(torch.float32)


def _total(weights: Tensor | None, prediction: Tensor) -> float:
    if weights is None:
        return float(prediction.shape[0] * prediction.shape[1])
    return float(weights.sum(dtype=torch.float64))


def _factor(total: float, width: int) -> float:
    """Return the factor of a row's gradient, without the row's weight."""
    return 2 / (max(width, 1) * (total or 1.0))


def _loss(error: float, total: float, prediction: Tensor) -> Tensor:
    """Return the loss as a scalar tensor; as in PyTorch, the mean over zero channels is NaN if there are rows."""
    batch, masked, width = prediction.shape
    loss = error / width / (total or 1.0) if width else math.nan if batch * masked else 0.0
    return torch.tensor(loss, dtype=torch.float32, device=prediction.device)
