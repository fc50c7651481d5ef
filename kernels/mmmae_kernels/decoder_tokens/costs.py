"""Costs of the operators of the decoder's input; backward is two kernels, the second of which adds up partial sums."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..shapes import BATCH, DECODER_WIDTH, KEEP, TOKENS, empty, parameter_dtype, token_ids

MACS: dict[str, Callable[..., int]] = {}
WITHOUT_MACS = ("mmmae::decoder_tokens", "mmmae::decoder_tokens_backward")
LAUNCHES: dict[str, Callable[..., int]] = {"mmmae::decoder_tokens_backward": lambda *arguments: 2}


def compile_cases(dtype: torch.dtype) -> None:
    """Launch each kernel once for each combination of arguments that compiles to different code."""
    from . import gpu  # imports triton

    visible, restore = empty(BATCH, KEEP, DECODER_WIDTH, dtype=dtype), token_ids(TOKENS)
    dtype = parameter_dtype(dtype)
    mask_token, position = empty(DECODER_WIDTH, dtype=dtype), empty(TOKENS, DECODER_WIDTH, dtype=dtype)
    gpu.decoder_tokens_forward(visible, mask_token, restore, position)
    grad = empty(BATCH, TOKENS, DECODER_WIDTH, dtype=dtype)
    gpu.decoder_tokens_backward(grad, restore, KEEP)


COMPILED: dict[str, Callable[[torch.dtype], None]] = {"decoder_tokens": compile_cases}
