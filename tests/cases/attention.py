"""Cases of attention and of the merging of vectors, and their definitions in plain PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmmae_kernels import attention, concat_attention
from mmmae_kernels.attention.guidance import merging_backend
from mmmae_kernels.operators import fast_apply, first_derivative_only, kernels_for
from tests.cases.case import Case, Inputs, draw

LAYOUTS = ("packed", "packed keys", "apart", "heads first", "expanded", "inside")


def definition(q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
    """Return `softmax(q k^T / sqrt(d)) v` over the present keys `[B, Nk]`; zeros for a sample without any."""
    if present is None:
        present = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    k, v = (torch.where(present[:, :, None, None], tensor, 0.0) for tensor in (k, v))
    served = present.any(1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    share = scores.masked_fill(~(present | ~served[:, None])[:, None, None, :], -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", share, v) * served[:, None, None, None]


def plain_case(
    queries: int, keys: int, width: int, layout: str = "apart", masked: bool = False, strided: str = "as they come"
) -> Case:
    """Return a case of `attention`; if masked, one sample has all keys, one has none, and the rest have some."""
    batch, heads = (1, 1) if queries == 784 else (3, 2)
    present = None
    if masked:
        present = torch.rand(batch, keys, generator=torch.Generator().manual_seed(5)) < 0.6
        present[0], present[1] = False, True
    name = f"{queries} x {keys} of {width}, {layout}{', masked' * masked}, gradients {strided}"
    return Case(
        "attention",
        name,
        functools.partial(_inputs, batch, queries, keys, heads, width, layout, present),
        lambda i: [attention(*_views(layout, i), key_present=i["present"])],
        lambda i: [definition(*(*_three(_views(layout, i)), i["present"]))],
        small=masked,
        strided=strided,
    )


def guided_case(tokens: int, vectors: int, width: int, first: int = 0, strided: str = "as they come") -> Case:
    """Return a case of `concat_attention`: 8 samples that have the subsets of the vectors numbered from `first` on."""
    return Case(
        "concat_attention",
        f"{tokens} and {vectors} of {width}, presence from {first}, gradients {strided}",
        functools.partial(_guided_inputs, tokens, vectors, width, first),
        lambda i: [concat_attention(i["qkv"], i["vectors"], i["present"])],
        _guided_definition,
        strided=strided,
    )


def merge_case(
    tokens: int,
    vectors: int,
    width: int,
    first: int = 0,
    batch: int = 8,
    strided: str = "as they come",
    small: bool = False,
) -> Case:
    """Return a case of the kernels that merge vectors into attention to tokens, which any flash backend may compute."""
    return Case(
        "concat_attention",
        f"merge {vectors} into {batch} x {tokens} of {width}, presence from {first}, gradients {strided}",
        functools.partial(_merge_inputs, tokens, vectors, width, first, batch),
        merge,
        merge_definition,
        small=small,
        kept={"lse": torch.float32},
        products=frozenset({"qkv", "vectors", "out"}),
        constant=frozenset({"out", "lse"}),
        strided=strided,
    )


def presence(vectors: int, first: int = 0) -> Tensor:
    """Return presence flags `[8, m]`: sample i has the vectors whose bits are set in `first + i`."""
    numbers = torch.arange(first, first + 8)[:, None]
    return numbers.bitwise_right_shift(torch.arange(vectors)).bitwise_and(1).bool()


def _inputs(batch: int, queries: int, keys: int, heads: int, width: int, layout: str, present: Tensor | None) -> Inputs:
    if layout == "packed":
        return {"qkv": draw(batch, queries, 3, heads, width), "present": present}
    if layout == "expanded":
        batch = 1
    extra = 1 if layout == "inside" else 0
    q = draw(batch, queries + extra, heads, width + extra, seed=1)
    k, v = (draw(batch, keys + extra, heads, width + extra, seed=seed) for seed in (2, 3))
    if present is not None:
        k[~present], v[~present] = math.nan, math.nan
    if layout == "packed keys":
        return {"q": q, "kv": torch.stack([k, v], dim=2), "present": present}
    if layout == "heads first":
        q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in (q, k, v))
    return {"q": q, "k": k, "v": v, "present": present}


def _views(layout: str, inputs: Inputs) -> list[Tensor]:
    """Return the tensors that attention is called with: views of the inputs in the given layout."""
    tensors = [tensor for name, tensor in inputs.items() if name != "present" and tensor is not None]
    if layout == "heads first":
        return [tensor.transpose(1, 2) for tensor in tensors]
    if layout == "expanded":
        return [tensor.expand(3, -1, -1, -1) for tensor in tensors]
    if layout == "inside":
        return [tensor[:, 1:, :, 1:] for tensor in tensors]
    return tensors


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    *alone, last = tensors
    return list(tensors) if len(tensors) == 3 else [*alone, *last.unbind(2)]


def _guided_inputs(tokens: int, vectors: int, width: int, first: int) -> Inputs:
    batch = 1 if tokens == 784 else 8
    present = presence(vectors, first)[-batch:]
    guides = draw(batch, vectors, 2, 2, width, seed=1)
    guides[~present] = math.nan
    return {"qkv": draw(batch, tokens, 3, 2, width), "vectors": guides, "present": present}


def _guided_definition(inputs: Inputs) -> list[Tensor]:
    qkv, vectors, present = inputs["qkv"], inputs["vectors"], inputs["present"]
    assert qkv is not None
    assert vectors is not None
    assert present is not None
    (q, k, v), (keys, values) = qkv.unbind(2), vectors.unbind(2)
    all_present = torch.cat([present.new_ones(qkv.shape[:2]), present], dim=1)
    return [definition(q, torch.cat([k, keys], dim=1), torch.cat([v, values], dim=1), all_present)]


def _merge_inputs(tokens: int, vectors: int, width: int, first: int, batch: int) -> Inputs:
    present = presence(vectors, first)[:batch]
    guides = draw(batch, vectors, 2, 2, width, seed=1)
    guides[~present] = math.nan
    return {
        "qkv": draw(batch, tokens, 3, 2, width),
        "out": draw(batch, tokens, 2, width, seed=2),
        "lse": draw(batch, 2, tokens, seed=3),
        "vectors": guides,
        "present": present,
    }


def merge(inputs: Inputs) -> list[Tensor]:
    """Return q plus the merged `out`, by the kernels that serve."""
    arguments = (inputs["out"], inputs["lse"].float(), inputs["vectors"], inputs["present"])
    return [fast_apply(_Merge)(inputs["qkv"].select(2, 0), *arguments)]


class _Merge(torch.autograd.Function):
    """`merge` with the gradients of q and the vectors; `out` and `lse` are constants.

    The gradient of the summand q is what the gradient of q holds before the vectors' part is added to it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, out: Tensor, lse: Tensor, vectors: Tensor, present: Tensor) -> Tensor:
        merged = out.clone()
        lse = kernels_for(q, merging_backend(q)).merge_vectors(q, merged, lse, vectors, present)
        ctx.save_for_backward(q, merged, lse, vectors, present)
        return merged + q

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, merged, lse, vectors, present = ctx.saved_tensors
        grad_q = torch.stack([grad] * 3, dim=2).select(2, 0)  # a view of packed gradients
        kernels = kernels_for(q, merging_backend(q))
        grad_vectors = kernels.merge_vectors_backward(grad, q, merged, lse, vectors, present, grad_q)
        return grad_q, None, None, grad_vectors, None


def merge_definition(inputs: Inputs) -> list[Tensor]:
    """Return q plus the weighted sum of `out`, whose score is `lse`, and of the values of the present vectors."""
    q, out, lse, present = inputs["qkv"].select(2, 0), inputs["out"].detach(), inputs["lse"].detach(), inputs["present"]
    keys, values = torch.where(present[:, :, None, None, None], inputs["vectors"], 0.0).unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, keys) / math.sqrt(q.shape[-1])
    scores = torch.cat([lse[..., None], scores.masked_fill(~present[:, None, None, :], -math.inf)], dim=-1)
    share = scores.softmax(-1).to(values.dtype)
    merged = share[..., 0].transpose(1, 2)[..., None] * out + torch.einsum("bhnm,bmhd->bnhd", share[..., 1:], values)
    return [merged.to(out.dtype) + q]


_SELF = [(tokens, width) for tokens in (196, 784, 1, 63, 65) for width in (32, 64, 80)]
CASES = [
    *(plain_case(n, n, width, LAYOUTS[place % len(LAYOUTS)]) for place, (n, width) in enumerate(_SELF)),
    *(plain_case(*sizes, "packed keys") for sizes in ((5, 65, 32), (65, 1, 64), (1, 7, 80))),
    *(plain_case(33, 33, 8, layout) for layout in LAYOUTS),
    plain_case(17, 17, 32, "packed", strided="expanded"),
    plain_case(17, 17, 32, "packed", strided="transposed"),
    *(guided_case(21, m, (32, 64, 80)[m % 3], first) for m in range(6) for first in range(0, 2**m, 8)),
    *(guided_case(tokens, 3, 64) for tokens in (196, 784, 1, 63, 65)),
    guided_case(17, 2, 32, strided="expanded"),
    guided_case(17, 2, 32, strided="transposed"),
]
# More vectors than a program of the backward kernel holds gradients of, and tokens past a tile.
MERGED = [
    merge_case(35, 3, 80, batch=5, small=True),
    merge_case(33, 17, 24, first=2**16 + 1, batch=3, strided="transposed", small=True),
    merge_case(5, 2, 256, batch=4, small=True),
    merge_case(1, 2, 7, strided="expanded"),
    merge_case(3, 0, 16, batch=2),
    merge_case(0, 2, 16, batch=2),
    merge_case(4, 2, 16, batch=0),
    merge_case(196, 3, 64),
]
MASKED = [
    *(plain_case(*sizes, "apart", masked=True) for sizes in ((65, 63, 16), (1, 7, 32), (3, 1, 64), (196, 196, 80))),
    plain_case(9, 13, 32, "packed keys", masked=True),
    plain_case(17, 17, 32, "apart", masked=True, strided="expanded"),
]
