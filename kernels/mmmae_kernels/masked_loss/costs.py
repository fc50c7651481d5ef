"""Costs of the operators of the masked losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..shapes import BATCH, KEEP, PATCH, TOKENS, WIDTH, empty, parameter_dtype, precisions, token_ids, volumes


def patch_l2_loss_macs(
    prediction: Sequence[int], volume: Sequence[int], weight: Sequence[int], bias: object, *rest: object
) -> int:
    """Return the multiply-adds of embedding the predicted patches."""
    return prediction[0] * prediction[1] * math.prod(weight)


def loss_launches(*arguments: object) -> int:
    """Count the comparison, the mean, and the sum of the weights if there are weights."""
    return 2 + (arguments[3] is not None)


def patch_l2_loss_launches(*arguments: object) -> int:
    """Count the comparison, the mean, the sum of the weights if any, and the embedding of a normalised target."""
    return 2 + (arguments[5] is not None) + bool(arguments[6])


MACS: dict[str, Callable[..., int]] = {"mmmae::patch_l2_loss": patch_l2_loss_macs}
WITHOUT_MACS = ("mmmae::masked_l2_loss",)
LAUNCHES: dict[str, Callable[..., int]] = {
    "mmmae::masked_l2_loss": loss_launches,
    "mmmae::patch_l2_loss": patch_l2_loss_launches,
}


def compile_patch_cases(dtype: torch.dtype) -> None:
    """Launch the loss against embedded patches for volumes of each dtype."""
    from . import gpu  # imports triton

    weight, bias = empty(WIDTH, 1, *PATCH, dtype=dtype), empty(WIDTH, dtype=parameter_dtype(dtype))
    ids = token_ids(TOKENS - KEEP)
    weights = torch.ones(ids.shape)
    prediction = empty(*ids.shape, WIDTH, dtype=dtype)
    for precision in precisions(dtype):
        torch.set_float32_matmul_precision(precision)
        for volume in volumes(dtype):
            gpu.patch_l2_loss_forward(prediction, volume, weight, bias, ids, weights, False, True)
    if dtype == torch.bfloat16:  # the other calls of a training step
        volume = volumes(dtype)[0]
        gpu.patch_l2_loss_forward(prediction, volume, weight, bias, ids, None, False, True)
        gpu.patch_l2_loss_forward(prediction, volume, weight, bias, ids, None, True, True)
        gpu.patch_l2_loss_forward(prediction, volume, weight, bias, ids, weights, True, True)


def compile_masked_cases(dtype: torch.dtype) -> None:
    """Launch the loss against a given target, normalised or not, and with the longest rows."""
    from . import gpu  # imports triton
    from .op import LONGEST_ROW

    prediction, target = empty(BATCH, TOKENS - KEEP, WIDTH, dtype=dtype), empty(BATCH, TOKENS, WIDTH, dtype=dtype)
    ids = token_ids(TOKENS - KEEP)
    weights = torch.ones(ids.shape)
    for normalize in (False, True):
        gpu.masked_l2_loss_forward(prediction, target, ids, weights, normalize, True)
    gpu.masked_l2_loss_forward(prediction, prediction, None, None, False, False)
    if dtype == torch.bfloat16:  # pixels as the target of a training step
        pixels = empty(BATCH, TOKENS - KEEP, WIDTH, dtype=torch.float32)
        for normalize in (False, True):
            gpu.masked_l2_loss_forward(prediction, pixels, None, None, normalize, True)
            gpu.masked_l2_loss_forward(prediction, pixels, None, weights, normalize, True)
    longest = empty(1, 2, LONGEST_ROW, dtype=dtype)
    gpu.masked_l2_loss_forward(longest, longest, None, None, True, True)


COMPILED: dict[str, Callable[[torch.dtype], None]] = {
    "patch_l2_loss": compile_patch_cases,
    "masked_l2_loss": compile_masked_cases,
}
