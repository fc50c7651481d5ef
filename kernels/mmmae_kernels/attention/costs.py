"""Costs of the operators of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..shapes import BATCH, KEEP, WIDTH, empty


def attention_macs(projected: Sequence[Sequence[int]], *rest: object) -> int:
    """Return the multiply-adds of scores and weighted values of separate or packed q, k and v, absent keys included."""
    first, last = projected[0], projected[-1]
    return 2 * math.prod((first[0], first[1], last[1], *first[-2:]))


def attention_backward_macs(grad: object, projected: Sequence[Sequence[int]], *rest: object) -> int:
    """Return the multiply-adds of five products: the scores again, and the gradients of scores, q, k and v."""
    return attention_macs(projected) // 2 * 5


def attention_backward_launches(
    grad: object, projected: Sequence[object], key_present: object, out: object, lse: object, backend: str
) -> int:
    """Return 1 for the backend, and 1 to pack gradients that it can't write into a packed tensor."""
    return 1 + (len(projected) < 3 and backend not in WRITING)


def merge_macs(q: Sequence[int], out: object, lse: object, vectors: Sequence[int], *rest: object) -> int:
    """Return the multiply-adds of scores and weighted values of the vectors, absent ones included."""
    return 2 * math.prod(q) * vectors[1]


def merge_backward_macs(grad: Sequence[int], q: object, out: object, lse: object, *rest: Sequence[int]) -> int:
    """Return the multiply-adds of five products, as in `attention_backward_macs`."""
    return 5 * math.prod(grad) * rest[0][1]


MACS: dict[str, Callable[..., int]] = {
    "mmmae::attention": attention_macs,
    "mmmae::attention_backward": attention_backward_macs,
    "mmmae::merge_vectors": merge_macs,
    "mmmae::merge_vectors_backward": merge_backward_macs,
}
WITHOUT_MACS: tuple[str, ...] = ()
WRITING = ("flash_attn_4", "flash_attn_3", "flash_attn_2", "native")  # backends that write into given gradients
LAUNCHES: dict[str, Callable[..., int]] = {"mmmae::attention_backward": attention_backward_launches}


def compile_cases(dtype: torch.dtype) -> None:
    """Launch the kernels that merge, once for each combination of arguments that compiles to different code."""
    from . import gpu  # imports triton

    for heads, width in ((WIDTH // 64, 64), (2, 256)):
        qkv, vectors = (empty(BATCH, *sizes, heads, width, dtype=dtype) for sizes in ((KEEP, 3), (3, 2)))
        q, out, lse = qkv.select(2, 0), empty(BATCH, KEEP, heads, width, dtype=dtype), torch.empty(BATCH, heads, KEEP)
        present = torch.ones(BATCH, 3, dtype=torch.bool)
        gpu.merge_vectors(q, out, lse, vectors, present)
        gpu.merge_vectors_backward(out, q, out, lse, vectors, present, torch.empty_like(qkv).select(2, 0))


COMPILED: dict[str, Callable[[torch.dtype], None]] = {"concat_attention": compile_cases}
