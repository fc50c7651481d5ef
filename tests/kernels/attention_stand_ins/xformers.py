"""xformers 0.0.35: those functions of `xformers.ops` that give and take the log-sum-exp, on its cutlass kernels."""

import math

import torch

from tests.kernels.attention_stand_ins import plain

calls = []


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    calls.append(dict(locals()))
    plain.refuse_options(calls[-1], {"attn_bias": None, "op": None, "output_dtype": None})
    _refuse(query, key, value, p)
    plain.refuse_corruption({"q": query, "k": key, "v": value}, {})
    out, lse = plain.forward(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    queries = query.shape[1]
    return out, torch.nn.functional.pad(lse, (0, -queries % 32), value=math.inf)


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    calls.append(dict(locals()))
    plain.refuse_options(calls[-1], {"attn_bias": None, "op": None})
    _refuse(query, key, value, p, grad=grad, output=output)
    queries = query.shape[1]
    if lse.ndim != 3 or lse.shape[:2] != (query.shape[0], query.shape[2]) or lse.shape[2] < queries:
        raise ValueError(f"lse has shape {list(lse.shape)}")
    if not lse.is_contiguous():
        raise plain.Corrupts("lse is not contiguous")
    inputs = {"q": query, "k": key, "v": value, "grad": grad.contiguous(), "output": output}
    plain.refuse_corruption(inputs, {}, lse[..., :queries].contiguous())
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return plain.backward(grad, query, key, value, output, lse[..., :queries], scale)


def _refuse(query, key, value, p, **others):
    if p != 0:
        raise NotImplementedError("dropout is not supported on the non-autograd API")
    if plain.target not in ("gfx90a", "gfx942") and plain.capability() not in (5, 6, 7, 8, 9):
        raise NotImplementedError(f"No operator found, on {plain.target}")
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if query.dtype not in floats or (query.dtype == torch.bfloat16 and 0 < plain.capability() < 8):
        raise NotImplementedError(f"No operator found for {query.dtype}")
    if query.dtype == torch.float32:
        raise NotImplementedError("the stand-in has no float32")
    plain.refuse_shapes(ValueError, query, key, value, **others)
    plain.refuse_width(NotImplementedError, query)
