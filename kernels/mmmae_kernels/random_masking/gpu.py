"""Random masking on the GPU: one program draws and sorts the noise of a sample and writes its three tables."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.config import Launch, element_config, next_power_of_2
from ..gpu.launch import launch
from .reference import MASK_STREAM, random_masking_of_noise

LONGEST_ROW = 4096  # tokens: 16 warps hold 8 keys of 8 bytes a thread, and the sort uses 32 KiB of shared memory


def random_masking_forward(
    batch: int, tokens: int, keep: int, seed: Tensor, device: torch.device, first_sample: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same tables as `random_masking_reference`, bit for bit.

    One launch up to 4096 tokens a sample; for more, one launch draws the noise and torch sorts it.
    """
    if seed.device.type == "cpu" and device.type != "cpu":  # torch.full, because the host would wait for a copy
        seed = torch.full((), int(seed), dtype=torch.int64, device=device)
    seed = seed.to(device)
    if tokens > LONGEST_ROW:
        noise = seed.new_empty(batch, tokens)
        launch(_describe_noise, (noise, seed), (batch, tokens, first_sample))
        return random_masking_of_noise(noise, keep)
    ids_keep, ids_masked = seed.new_empty(batch, keep), seed.new_empty(batch, tokens - keep)
    ids_restore = seed.new_empty(batch, tokens)
    launch(_describe_masking, (ids_keep, ids_masked, ids_restore, seed), (batch, tokens, keep, first_sample))
    return ids_keep, ids_masked, ids_restore


def _describe_noise(target: str, batch: int, tokens: int, first_sample: int) -> Launch:
    blocks = triton.cdiv(tokens, 4)
    arguments = {"first_sample": first_sample, "N": tokens, "STREAM": MASK_STREAM}
    config = element_config({"BLOCK": 256}, 1024, target)
    return Launch(_noise, lambda c: (batch * triton.cdiv(blocks, c["BLOCK"]),), arguments, (config,))


def _describe_masking(target: str, batch: int, tokens: int, keep: int, first_sample: int) -> Launch:
    block = max(4, next_power_of_2(tokens))
    arguments = {"first_sample": first_sample, "N": tokens, "K": keep, "STREAM": MASK_STREAM}
    # 8 keys a thread: these are exchanged in registers, others within and between warps.
    config = element_config({"BLOCK": block}, block, target)
    return Launch(_random_masking, lambda c: (batch if tokens else 0,), arguments, (config,))


@triton.jit
def philox_words(seed_ptr, sample, call, stream):
    """Return the four words of Philox 4x32-10 for each call number, with the counter and key of `philox_noise`."""
    low, high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    zero = call * 0
    return tl.philox(tl.load(seed_ptr), call, zero + stream, zero.to(tl.uint32) + low, zero.to(tl.uint32) + high)


@triton.jit
def _random_masking(
    keep_ptr,          # [B, K] int64
    masked_ptr,        # [B, N-K] int64
    restore_ptr,       # [B, N] int64
    seed_ptr,          # scalar int64
    first_sample,
    N, K,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least N and 4
):
    row = tl.program_id(0).to(tl.int64)
    call = tl.arange(0, BLOCK // 4)
    word0, word1, word2, word3 = philox_words(seed_ptr, first_sample + row, call.to(tl.uint32), STREAM)
    # Token 4*call + w takes word w: in the joined tensor the last axis is the lower bit of w, the one before the upper.
    noise = tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape(BLOCK)
    token = tl.arange(0, BLOCK)
    # The token number below the noise makes keys unique, so that any sort is stable. Padding sorts to the end.
    key = tl.sort(tl.where(token < N, noise.to(tl.int64) * BLOCK + token, 0x7FFFFFFFFFFFFFFF))
    shuffled = key % BLOCK
    place = token
    exists = place < N
    tl.store(keep_ptr + row * K + place, shuffled, mask=place < K)
    tl.store(masked_ptr + row * (N - K) + place - K, shuffled, mask=exists & (place >= K))
    tl.store(restore_ptr + row * N + shuffled, place.to(tl.int64), mask=exists)


@triton.jit
def _noise(
    noise_ptr,         # [B, N] int64
    seed_ptr,          # scalar int64
    first_sample,
    N,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(tl.cdiv(N, 4), BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    call = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    word0, word1, word2, word3 = philox_words(seed_ptr, first_sample + row, call.to(tl.uint32), STREAM)
    noise_at = noise_ptr + row * N + 4 * call
    tl.store(noise_at, word0.to(tl.int64), mask=4 * call < N)
    tl.store(noise_at + 1, word1.to(tl.int64), mask=4 * call + 1 < N)
    tl.store(noise_at + 2, word2.to(tl.int64), mask=4 * call + 2 < N)
    tl.store(noise_at + 3, word3.to(tl.int64), mask=4 * call + 3 < N)
