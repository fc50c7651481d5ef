"""Merging of a few vectors into attention to tokens on the GPU; `guidance.py` has the formulas.

Both kernels are bound by memory: each element of q, of attention and of the gradients is read and written once. Absent
vectors are not read, and a sample without vectors costs nothing but its log-sum-exps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.config import Launch, element_config, next_power_of_2, strides
from ..gpu.launch import launch
from .backends.flash import scale_of

ELEMENTS = 2048  # of a tile of tokens, 8 a thread
ROWS = 64  # upper limit of tokens in a tile
VECTORS = 16  # whose gradients a program holds in registers at a time

Strides = tuple[int, ...]


def merge_vectors(q: Tensor, out: Tensor, lse: Tensor, vectors: Tensor, present: Tensor) -> Tensor:
    """Merge attention to the vectors into `out`, in place, and return the merged log-sum-exps; one launch."""
    _check_contiguous("out", out)
    lse = lse.contiguous()
    merged = torch.empty_like(lse)
    numbers = (*_sizes(q, vectors), q.stride(), vectors.stride(), present.stride())
    launch(_describe_forward, (merged, out, q, lse, vectors, present), numbers)
    return merged


def merge_vectors_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, vectors: Tensor, present: Tensor, grad_q: Tensor
) -> Tensor:
    """Add the vectors' part to `grad_q`, in place, and return the vectors' gradient; one launch, deterministic."""
    _check_contiguous("out", out)
    grad_vectors = vectors.new_empty(*vectors.shape)
    tensors = grad_vectors, grad_q, grad, q, out, lse.contiguous(), vectors, present
    varying = (grad_q, grad, q, vectors, present)
    launch(_describe_backward, tensors, (*_sizes(q, vectors), *[tensor.stride() for tensor in varying]))
    return grad_vectors


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}, expected a contiguous tensor")


def _sizes(q: Tensor, vectors: Tensor) -> tuple[int, int, int, int, int, float]:
    """Return batch, tokens, vectors, heads, head width, and the scale of scores."""
    batch, tokens, heads, width = q.shape
    return batch, tokens, vectors.shape[1], heads, width, scale_of(q)


def _describe_forward(
    target: str,
    batch: int,
    tokens: int,
    count: int,
    heads: int,
    width: int,
    scale: float,
    q: Strides,
    vectors: Strides,
    present: Strides,
) -> Launch:
    """Describe a launch with one program for each head and tile of tokens; one config, as it overwrites an input."""
    arguments = _arguments(tokens, count, heads, width, scale, q=q, vectors=vectors, present=present)
    tile = _tile(width)
    config = element_config(tile, tile["BLOCK_N"] * tile["BLOCK_D"], target)
    return Launch(
        _merge_vectors, lambda c: (batch * heads * triton.cdiv(tokens, c["BLOCK_N"]),), arguments, (config,)
    )


def _describe_backward(
    target: str,
    batch: int,
    tokens: int,
    count: int,
    heads: int,
    width: int,
    scale: float,
    grad_q: Strides,
    grad: Strides,
    q: Strides,
    vectors: Strides,
    present: Strides,
) -> Launch:
    """Describe a launch with one program for each sample and head; one config, as it overwrites an input."""
    sizes = tokens, count, heads, width, scale
    arguments = _arguments(*sizes, grad_q=grad_q, grad=grad, q=q, vectors=vectors, present=present)
    tile = _tile(width)
    config = element_config({**tile, "BLOCK_M": VECTORS}, tile["BLOCK_N"] * tile["BLOCK_D"], target)
    # Two programs a multiprocessor; for some architectures ptxas would spill a few registers so that a third one fits.
    config = config._replace(registers=96 if tile["BLOCK_D"] <= 128 else None)
    return Launch(_merge_vectors_backward, lambda c: (batch * heads,), arguments, (config,))


def _arguments(
    tokens: int, count: int, heads: int, width: int, scale: float, **layouts: Strides
) -> dict[str, int | float]:
    """Return the sizes and the strides of tensors, by the names of the kernels' arguments."""
    arguments = {"N": tokens, "M": count, "H": heads, "D": width, "scale": scale}
    for name, values in layouts.items():
        arguments |= strides(name, {"vectors": "bmphd", "present": "bm"}.get(name, "bnhd"), values)
    return arguments


def _tile(width: int) -> dict[str, int]:
    """Return the sizes of a tile of tokens."""
    block = next_power_of_2(width)
    return {"BLOCK_N": max(1, min(ROWS, ELEMENTS // block)), "BLOCK_D": block}


@triton.jit
def _load_rows(pointer, mask, BLOCK_N: tl.constexpr):
    """Load a row `[1, d]` for every token of a tile, in the tile's layout.

    A row of its own would be loaded in another layout and passed through shared memory, behind two barriers.
    """
    at = tl.broadcast_to(pointer, (BLOCK_N, pointer.shape[1]))
    return tl.load(at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _merge_vectors(
    merged_ptr,        # [B, h, N] float32, log-sum-exps of tokens and vectors
    out_ptr,           # [B, N, h, d] attention to the tokens, overwritten by that to tokens and vectors
    q_ptr,             # [B, N, h, d]
    lse_ptr,           # [B, h, N] float32, log-sum-exps of the tokens
    vectors_ptr,       # [B, m, 2, h, d] keys and values
    present_ptr,       # [B, m] bool
    N, M, H, D, scale,
    stride_q_b, stride_q_n, stride_q_h, stride_q_d,
    stride_vectors_b, stride_vectors_m, stride_vectors_p, stride_vectors_h, stride_vectors_d,
    stride_present_b, stride_present_m,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # Programs of all heads of a tile follow one another: their rows are neighbours in memory.
    blocks = tl.cdiv(N, BLOCK_N)
    head = (tl.program_id(0) % H).to(tl.int64)
    b = (tl.program_id(0) // H // blocks).to(tl.int64)
    n = (tl.program_id(0) // H % blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    has_token, has_channel = n < N, (d < D)[None, :]
    inside = has_token[:, None] & has_channel
    lse_at = (b * H + head) * N + n
    lse = tl.load(lse_ptr + lse_at, mask=has_token, other=0)
    present_ptr += b * stride_present_b
    flag_ptr, count = present_ptr, 0
    for _ in range(M):
        count += tl.load(flag_ptr).to(tl.int32)
        flag_ptr += stride_present_m
    if count > 0:
        q_at = q_ptr + b * stride_q_b + n[:, None] * stride_q_n + head * stride_q_h + d[None, :] * stride_q_d
        q = tl.load(q_at, mask=inside, other=0).to(tl.float32)
        out_at = out_ptr + ((b * N + n[:, None]) * H + head) * D + d[None, :]
        out = tl.load(out_at, mask=inside, other=0).to(tl.float32)
        # A softmax over what attention to the tokens found, with the score lse, and the vectors, one after another.
        largest, total = lse, tl.full((BLOCK_N,), 1.0, tl.float32)
        key_ptr = vectors_ptr + b * stride_vectors_b + head * stride_vectors_h
        for _ in range(M):
            if tl.load(present_ptr):
                key_at = key_ptr + d[None, :] * stride_vectors_d
                key = _load_rows(key_at, has_channel, BLOCK_N)
                value = _load_rows(key_at + stride_vectors_p, has_channel, BLOCK_N)
                # As a bare product it could be fused with the sum, and the copies of a score in the threads of a row
                # would differ in their last bit: by which thread holds the product, and which ones its rounded value.
                score = tl.sum(tl.where(has_channel, q * key, 0.0), 1) * scale
                larger = tl.maximum(largest, score)
                shrink, weight = tl.exp(largest - larger), tl.exp(score - larger)
                out = out * shrink[:, None] + weight[:, None] * value
                total = total * shrink + weight
                largest = larger
            key_ptr += stride_vectors_m
            present_ptr += stride_present_m
        lse = largest + tl.log(total)
        tl.store(out_at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(merged_ptr + lse_at, lse, mask=has_token)


@triton.jit
def _merge_vectors_backward(
    grad_vectors_ptr,  # [B, m, 2, h, d]
    grad_q_ptr,        # [B, N, h, d] the tokens' part, to which that of the vectors is added
    grad_ptr,          # [B, N, h, d] gradient of the merged attention
    q_ptr,             # [B, N, h, d]
    out_ptr,           # [B, N, h, d] merged attention
    lse_ptr,           # [B, h, N] float32, merged log-sum-exps
    vectors_ptr,       # [B, m, 2, h, d] keys and values
    present_ptr,       # [B, m] bool
    N, M, H, D, scale,
    stride_grad_q_b, stride_grad_q_n, stride_grad_q_h, stride_grad_q_d,
    stride_grad_b, stride_grad_n, stride_grad_h, stride_grad_d,
    stride_q_b, stride_q_n, stride_q_h, stride_q_d,
    stride_vectors_b, stride_vectors_m, stride_vectors_p, stride_vectors_h, stride_vectors_d,
    stride_present_b, stride_present_m,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):
    head = (tl.program_id(0) % H).to(tl.int64)
    b = (tl.program_id(0) // H).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    has_channel = (d < D)[None, :]
    place = tl.arange(0, BLOCK_M)
    grad_q_ptr += b * stride_grad_q_b + head * stride_grad_q_h
    grad_ptr += b * stride_grad_b + head * stride_grad_h
    q_ptr += b * stride_q_b + head * stride_q_h
    out_ptr += (b * N * H + head) * D
    lse_ptr += (b * H + head) * N
    vectors_ptr += b * stride_vectors_b + head * stride_vectors_h
    present_ptr += b * stride_present_b
    for first in range(0, M, BLOCK_M):  # once, unless there are very many vectors
        vectors = tl.minimum(M - first, BLOCK_M)
        first_key_ptr = vectors_ptr + tl.cast(first, tl.int64) * stride_vectors_m
        first_flag_ptr = present_ptr + tl.cast(first, tl.int64) * stride_present_m
        grad_keys = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        grad_values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        flag_ptr, count = first_flag_ptr, 0
        for _ in range(vectors):
            count += tl.load(flag_ptr).to(tl.int32)
            flag_ptr += stride_present_m
        if count > 0:
            for start in range(0, N, BLOCK_N):
                n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
                has_token = n < N
                inside = has_token[:, None] & has_channel
                q_at = q_ptr + n[:, None] * stride_q_n + d[None, :] * stride_q_d
                q = tl.load(q_at, mask=inside, other=0).to(tl.float32)
                grad_at = grad_ptr + n[:, None] * stride_grad_n + d[None, :] * stride_grad_d
                grad = tl.load(grad_at, mask=inside, other=0).to(tl.float32)
                out = tl.load(out_ptr + n[:, None] * H * D + d[None, :], mask=inside, other=0).to(tl.float32)
                grad_q_at = grad_q_ptr + n[:, None] * stride_grad_q_n + d[None, :] * stride_grad_q_d
                grad_q = tl.load(grad_q_at, mask=inside, other=0).to(tl.float32)
                lse = tl.load(lse_ptr + n, mask=has_token, other=0)
                delta = tl.sum(grad * out, 1)
                key_ptr, flag_ptr = first_key_ptr, first_flag_ptr
                for vector in range(vectors):
                    if tl.load(flag_ptr):
                        key_at = key_ptr + d[None, :] * stride_vectors_d
                        key = _load_rows(key_at, has_channel, BLOCK_N)
                        value = _load_rows(key_at + stride_vectors_p, has_channel, BLOCK_N)
                        weight = tl.exp(tl.sum(q * key, 1) * scale - lse)
                        weight = tl.where(has_token, weight, 0.0)
                        grad_score = weight * (tl.sum(grad * value, 1) - delta) * scale
                        grad_q += grad_score[:, None] * key
                        grad_key = tl.sum(grad_score[:, None] * q, 0)
                        grad_value = tl.sum(weight[:, None] * grad, 0)
                        own = (place == vector)[:, None]
                        grad_keys += tl.where(own, grad_key[None, :], 0.0)
                        grad_values += tl.where(own, grad_value[None, :], 0.0)
                    key_ptr += stride_vectors_m
                    flag_ptr += stride_present_m
                tl.store(grad_q_at, grad_q.to(grad_q_ptr.dtype.element_ty), mask=inside)
        at = grad_vectors_ptr + ((b * M + first + place[:, None]) * 2 * H + head) * D + d[None, :]
        mask = (place < vectors)[:, None] & has_channel
        tl.store(at, grad_keys.to(grad_vectors_ptr.dtype.element_ty), mask=mask)
        tl.store(at + H * D, grad_values.to(grad_vectors_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # other threads may read what these have added to the gradient of q
