"""Random masking of tokens: which of each sample's tokens are visible, which masked, and the way back."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import kernels, native_unavailable, triton_refuses, triton_unavailable
from .reference import random_masking_reference


class TokenMask(NamedTuple):
    """Token numbers of a batch, int64. K visible and M masked tokens make N."""

    ids_keep: Tensor  # [B, K] visible tokens, in random order
    ids_masked: Tensor  # [B, M] masked tokens, in random order
    ids_restore: Tensor  # [B, N] place of each token in the two above put together


def random_masking(
    batch: int,
    tokens: int,
    keep: int,
    seed: int | Tensor,
    *,
    device: torch.device | str | None = None,
    first_sample: int = 0,
) -> TokenMask:
    """Draw which tokens of each sample stay visible, as a function of (seed, sample number, token) alone.

    Args:
        batch: samples B.
        tokens: tokens N of a sample, below 2^32.
        keep: visible tokens K, 0..N.
        seed: a 64-bit integer or an int64 scalar tensor, the key of Philox 4x32-10.
        device: where the mask is wanted; None is the seed's device, or the CPU.
        first_sample: number of the batch's first sample, so that ranks draw what one process would.

    Raises:
        ValueError: a count is negative, `keep` is over `tokens`, or the seed is no 64-bit integer.
    """
    for name, value in (("batch", batch), ("tokens", tokens), ("first_sample", first_sample)):
        if value < 0:
            raise ValueError(f"{name} is {value}, allowed is a whole number >= 0")
    if not 0 <= keep <= tokens:
        raise ValueError(f"keep is {keep}, allowed is 0..{tokens}")
    seed = seed_tensor(seed)
    device = seed.device if device is None else torch.device(device)
    function = dispatch.choose("random_masking", batch, tokens, keep, seed, device, first_sample)
    return TokenMask(*function(batch, tokens, keep, seed, device, first_sample))


@torch.library.custom_op("mmmae::random_masking", mutates_args=())
def _fused(
    batch: int, tokens: int, keep: int, seed: Tensor, device: torch.device, first_sample: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    forward = kernels("random_masking", backend).random_masking_forward
    tables: tuple[Tensor, Tensor, Tensor] = forward(batch, tokens, keep, seed, device, first_sample)
    return tables


@_fused.register_fake
def _(
    batch: int, tokens: int, keep: int, seed: Tensor, device: torch.device, first_sample: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        torch.empty(batch, count, dtype=torch.int64, device=device) for count in (keep, tokens - keep, tokens)
    )
    return first, second, third


def _native_runs(
    batch: int, tokens: int, keep: int, seed: Tensor, device: torch.device, first_sample: int
) -> dispatch.Reason:
    if device.type != "cpu":
        return f"the mask is wanted on {device}, native kernels run on the CPU"
    return native_unavailable()


def _triton_runs(
    batch: int, tokens: int, keep: int, seed: Tensor, device: torch.device, first_sample: int
) -> dispatch.Reason:
    return triton_refuses((("the mask", torch.empty(0, device=device)),))


def seed_tensor(seed: int | Tensor) -> Tensor:
    """The seed as an int64 scalar; ValueError if it is no 64-bit integer."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise ValueError(f"seed is a {seed.dtype} tensor of shape {list(seed.shape)}, expected is an int64 scalar")
        return seed
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}, allowed is a 64-bit integer")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64)


dispatch.register(
    "random_masking",
    triton=dispatch.Implementation(functools.partial(_fused, backend="triton"), _triton_runs, triton_unavailable),
    native=dispatch.Implementation(functools.partial(_fused, backend="native"), _native_runs, native_unavailable),
    eager=dispatch.Implementation(random_masking_reference),
)
