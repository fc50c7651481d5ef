"""The definition of `random_masking`: Philox 4x32-10 noise and a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import define, needs_operators

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: multipliers and Weyl increments of Philox 4x32.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF

MASK_STREAM, DROPOUT_STREAM = 0, 1


def random_masking_reference(
    batch: int, tokens: int, keep: int, seed: Tensor, device: torch.device, first_sample: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort each sample's tokens by noise, ties by token number; the first `keep` are visible."""
    samples = torch.arange(first_sample, first_sample + batch, device=device)
    return random_masking_of_noise(philox_noise(seed.to(device), samples, tokens, MASK_STREAM), keep)


def random_masking_of_noise(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `ids_keep`, `ids_masked` and `ids_restore` from sorting `noise [B, N]`, ties by token number."""
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    # Copies, even if one part is everything: the outputs of an operator must not share memory.
    parts = ids_shuffle.tensor_split([keep], dim=1)
    ids_keep, ids_masked = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return ids_keep, ids_masked, ids_restore


def philox_noise(seed: Tensor, samples: Tensor, tokens: int, stream: int) -> Tensor:
    """Draw uniform 32-bit noise that depends only on seed, sample number, token number and stream.

    Args:
        seed: int64 scalar, the key.
        samples: `[B]` int64 sample numbers.
        tokens: how many numbers to draw for each sample.
        stream: number that separates different uses of one seed.

    Returns:
        `[B, tokens]` int64 in 0..2^32-1. Token n is word n % 4 of counter (n // 4, stream, sample low, sample high).
    """
    noise: Tensor = (_operator if needs_operators(samples) else _noise)(seed, samples, tokens, stream)
    return noise


def _noise(seed: Tensor, samples: Tensor, tokens: int, stream: int) -> Tensor:
    calls = torch.arange((tokens + 3) // 4, device=samples.device)
    shape = (len(samples), len(calls))
    counter = (
        calls.expand(shape),
        torch.full_like(calls, stream).expand(shape),
        (samples & WORD)[:, None].expand(shape),
        (samples >> 32 & WORD)[:, None].expand(shape),
    )
    words = philox_4x32_10(counter, (seed & WORD, seed >> 32 & WORD))
    return torch.stack(words, dim=-1).flatten(1)[:, :tokens].contiguous()


# An operator, because Inductor would inline the ten rounds into an expression that doubles in size with each.
_operator = define(
    "philox_noise(Tensor seed, Tensor samples, SymInt tokens, int stream) -> Tensor",
    _noise,
    lambda seed, samples, tokens, stream: samples.new_empty(samples.shape[0], tokens),
)


def philox_4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute ten rounds of Philox 4x32 on 32-bit words in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + INCREMENTS[0] & WORD, k1 + INCREMENTS[1] & WORD
    return c0, c1, c2, c3


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low word of the 64-bit product, computed in halves because int64 would overflow."""
    upper = factor * (word >> 16)
    lower = factor * (word & 0xFFFF)
    middle = upper + (lower >> 16)
    return middle >> 16, (middle << 16 | lower & 0xFFFF) & WORD
