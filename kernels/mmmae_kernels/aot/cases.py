"""The calls whose launches are compiled: the model's shapes, in each type, and each input that changes a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..add_layer_norm import gpu as add_layer_norm
from ..add_layer_norm import op as add_layer_norm_op
from ..decoder_tokens import gpu as decoder_tokens
from ..gelu_linear import gpu as gelu_linear
from ..masked_loss import gpu as masked_loss
from ..masked_loss import op as masked_loss_op
from ..patch_embed import gpu as patch_embed
from ..random_masking import gpu as random_masking

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Of the preset `base`; nothing is computed with, so the batch is small.
BATCH, TOKENS, KEEP, WIDTH, DECODER_WIDTH, HIDDEN = 2, 784, 196, 768, 512, 768
BANDS, SIZE, PATCH = 12, 224, (3, 16, 16)
ALL = (True, True, True, True)


def _random_masking(dtype: torch.dtype) -> None:
    if dtype == torch.float32:  # tables of integers: one type is enough
        for tokens in (TOKENS, random_masking.LONGEST_ROW, random_masking.LONGEST_ROW + 1):
            random_masking.random_masking_forward(BATCH, tokens, KEEP, torch.tensor(0), torch.device("cpu"), 0)


def _patch_embed(dtype: torch.dtype) -> None:
    weight, bias = _empty(WIDTH, 1, *PATCH, dtype=dtype), _empty(WIDTH, dtype=dtype)
    position, ids = _empty(TOKENS, WIDTH, dtype=dtype), _ids(KEEP)
    for precision in _precisions(dtype):
        torch.set_float32_matmul_precision(precision)
        for volume in _volumes(dtype):
            patch_embed.patch_embed_forward(volume, weight, bias, ids, position)
            grad = _empty(BATCH, KEEP, WIDTH, dtype=dtype)
            patch_embed.patch_embed_backward(grad, volume, weight, ids, (volume.is_floating_point(), True, True, False))
    _auxiliary_patches(dtype)


def _auxiliary_patches(dtype: torch.dtype) -> None:
    """An auxiliary encoder's: one flat image, all its patches."""
    volume, weight = _empty(BATCH, 1, 1, SIZE, SIZE, dtype=dtype), _empty(256, 1, 1, 32, 32, dtype=dtype)
    patch_embed.patch_embed_forward(volume, weight, _empty(256, dtype=dtype), None, _empty(49, 256, dtype=dtype))
    grad = _empty(BATCH, 49, 256, dtype=dtype)
    patch_embed.patch_embed_backward(grad, volume, weight, None, (False, True, True, True))


def _patchify(dtype: torch.dtype) -> None:
    for volume in _volumes(dtype):
        patch_embed.gather_patches(volume, _ids(TOKENS - KEEP), PATCH)


def _patch_l2_loss(dtype: torch.dtype) -> None:
    weight, bias = _empty(WIDTH, 1, *PATCH, dtype=dtype), _empty(WIDTH, dtype=dtype)
    ids = _ids(TOKENS - KEEP)
    weights = torch.ones(ids.shape)
    prediction = _empty(*ids.shape, WIDTH, dtype=dtype)
    for precision in _precisions(dtype):
        torch.set_float32_matmul_precision(precision)
        for volume in _volumes(dtype):
            masked_loss.patch_l2_loss_forward(prediction, volume, weight, bias, ids, weights, False, True)


def _masked_l2_loss(dtype: torch.dtype) -> None:
    prediction, target = _empty(BATCH, TOKENS - KEEP, WIDTH, dtype=dtype), _empty(BATCH, TOKENS, WIDTH, dtype=dtype)
    ids = _ids(TOKENS - KEEP)
    weights = torch.ones(ids.shape)
    for normalize in (False, True):
        masked_loss.masked_l2_loss_forward(prediction, target, ids, weights, normalize, True)
    masked_loss.masked_l2_loss_forward(prediction, prediction, None, None, False, False)
    longest = _empty(1, 2, masked_loss_op.LONGEST_ROW, dtype=dtype)
    masked_loss.masked_l2_loss_forward(longest, longest, None, None, True, True)


def _decoder_tokens(dtype: torch.dtype) -> None:
    visible, mask_token = _empty(BATCH, KEEP, DECODER_WIDTH, dtype=dtype), _empty(DECODER_WIDTH, dtype=dtype)
    restore = _ids(TOKENS)
    decoder_tokens.decoder_tokens_forward(visible, mask_token, restore, _empty(TOKENS, DECODER_WIDTH, dtype=dtype))
    grad = _empty(BATCH, TOKENS, DECODER_WIDTH, dtype=dtype)
    decoder_tokens.decoder_tokens_backward(grad, restore, KEEP)


def _add_layer_norm(dtype: torch.dtype) -> None:
    weight, bias = _empty(WIDTH, dtype=dtype), _empty(WIDTH, dtype=dtype)
    rows, statistics = _empty(BATCH * KEEP, WIDTH, dtype=dtype), torch.empty(BATCH * KEEP)
    for residual, residual_bias in ((None, None), (rows, None), (rows, bias)):
        add_layer_norm.add_layer_norm_forward(rows, residual, residual_bias, weight, bias, 1e-6, dtype)
    for total, again, sums in ((None, None, None), (rows, None, None), (rows, bias, None), (rows, bias, dtype)):
        add_layer_norm.add_layer_norm_backward(total, rows, rows, weight, again, statistics, statistics, sums)
    width = add_layer_norm_op.LONGEST_ROW
    longest, weight, statistics = _empty(2, width, dtype=dtype), _empty(width, dtype=dtype), torch.empty(2)
    add_layer_norm.add_layer_norm_forward(longest, longest, weight, weight, weight, 1e-6, dtype)
    arguments = (longest, longest, longest, weight, weight, statistics, statistics, dtype)
    add_layer_norm.add_layer_norm_backward(*arguments)


def _gelu_linear(dtype: torch.dtype) -> None:
    hidden = _empty(BATCH * KEEP, HIDDEN, dtype=dtype)
    for bias in (_empty(HIDDEN, dtype=dtype), None):
        gelu_linear.gelu_forward(hidden, bias)
        gelu_linear.gelu_backward(hidden.clone(), hidden, bias)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "random_masking": _random_masking,
    "patch_embed": _patch_embed,
    "patchify": _patchify,
    "patch_l2_loss": _patch_l2_loss,
    "masked_l2_loss": _masked_l2_loss,
    "decoder_tokens": _decoder_tokens,
    "add_layer_norm": _add_layer_norm,
    "gelu_linear": _gelu_linear,
}


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _ids(count: int) -> Tensor:
    return torch.arange(count).expand(BATCH, count).contiguous()


def _volumes(dtype: torch.dtype) -> list[Tensor]:
    """In the weight's type; a half weight's also in those that are converted on the way, integers of one size each."""
    converted = {torch.float16: [torch.float32, torch.int16], torch.bfloat16: [torch.float32, torch.uint8]}
    types = [dtype, *converted.get(dtype, [])]
    return [torch.empty(BATCH, 1, BANDS, SIZE, SIZE, dtype=volume_dtype) for volume_dtype in types]


def _precisions(dtype: torch.dtype) -> tuple[str, ...]:
    return ("highest", "high") if dtype == torch.float32 else ("highest",)
