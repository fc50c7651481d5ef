"""PyTorch 2.13: the operators behind its scaled_dot_product_attention on GPUs, registered for tensors on the CPU.

PyTorch itself checks the arguments against the signatures.
"""

import contextlib
import math
import types

import torch

from tests.kernels.attention_stand_ins import plain

FLASH, CUDNN, EFFICIENT = (f"_scaled_dot_product_{kernel}_attention" for kernel in ("flash", "cudnn", "efficient"))
AMD = ("gfx90a", "gfx942", "gfx950")
WITHOUT_DROPOUT = {"dropout_p": 0.0, "is_causal": False}


def _flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    flash.calls.append(dict(locals()))
    plain.refuse_options(flash.calls[-1], {**WITHOUT_DROPOUT, "return_debug_mask": False})
    out, lse = _forward(query, key, value, scale)
    return out, lse, None, None, query.shape[2], key.shape[2], *_state(), query.new_empty(0)


def _flash_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    philox_seed,
    philox_offset,
    *,
    scale=None,
):
    flash.calls.append(dict(locals()))
    plain.refuse_options(flash.calls[-1], {**WITHOUT_DROPOUT, "cum_seq_q": None, "cum_seq_k": None})
    _check_lengths(query, key, max_q, max_k)
    for given, expected in zip((philox_seed, philox_offset), _state(), strict=True):
        if (given.shape, given.dtype) != (expected.shape, expected.dtype):
            raise plain.Corrupts(f"the state of dropout is {given.dtype} {list(given.shape)}")
    return _backward(grad_out, query, key, value, out, logsumexp, scale)


def _cudnn(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    cudnn.calls.append(dict(locals()))
    none = {"attn_bias": None, "compute_log_sumexp": True, "return_debug_mask": False}
    plain.refuse_options(cudnn.calls[-1], {**WITHOUT_DROPOUT, **none})
    _check_cudnn(query, key)
    out, lse = _forward(query, key, value, scale)
    return out, lse[..., None], None, None, query.shape[2], key.shape[2], *_numbers(), None


def _cudnn_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    philox_seed,
    philox_offset,
    attn_bias,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *,
    scale=None,
):
    cudnn.calls.append(dict(locals()))
    none = {"attn_bias": None, "cum_seq_q": None, "cum_seq_k": None}
    plain.refuse_options(cudnn.calls[-1], {**WITHOUT_DROPOUT, **none})
    _check_lengths(query, key, max_q, max_k)
    _check_cudnn(query, key)
    if 0 in grad_out.stride():
        raise plain.Corrupts("the gradient is expanded")
    if logsumexp.dim() != 4 or logsumexp.shape[3] != 1:
        raise plain.Corrupts(f"logsumexp has shape {list(logsumexp.shape)}")
    return _backward(grad_out, query, key, value, out, logsumexp[..., 0], scale)


def _efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    efficient.calls.append(dict(locals()))
    none = {"attn_bias": None, "compute_log_sumexp": True}
    plain.refuse_options(efficient.calls[-1], {**WITHOUT_DROPOUT, **none})
    out, lse = _forward(query, key, value, scale, torch.float32)
    absent = 0 if plain.target in AMD else -query.shape[2] % 32
    return out, torch.nn.functional.pad(lse, (0, absent), value=math.inf), *_numbers()


def _efficient_backward(
    grad_out_,
    query,
    key,
    value,
    attn_bias,
    out,
    logsumexp,
    philox_seed,
    philox_offset,
    dropout_p,
    grad_input_mask,
    is_causal=False,
    *,
    scale=None,
):
    efficient.calls.append(dict(locals()))
    none = {"attn_bias": None, "grad_input_mask": [True, True, True, False]}
    plain.refuse_options(efficient.calls[-1], {**WITHOUT_DROPOUT, **none})
    _checked(query, key, value, torch.float32)
    queries = query.shape[2]
    absent = 0 if plain.target in AMD else -queries % 32
    if logsumexp.shape[-1] != queries + absent or not (logsumexp[..., queries:] == math.inf).all():
        raise plain.Corrupts(f"logsumexp {list(logsumexp.shape)} is not filled up with infinity to a multiple of 32")
    lse = logsumexp[..., :queries].contiguous()
    return *_backward(grad_out_, query, key, value, out, lse, scale, torch.float32), None


def _forward(query, key, value, scale, *dtypes):
    q, k, v = _checked(query, key, value, *dtypes)
    plain.refuse_corruption({"q": q, "k": k, "v": v}, {})
    out, lse = plain.forward(q, k, v, q.shape[3] ** -0.5 if scale is None else scale)
    return out.contiguous().transpose(1, 2), lse


def _backward(grad_out, query, key, value, out, lse, scale, *dtypes):
    dout, out = (tensor.transpose(1, 2) for tensor in (grad_out, out))
    q, k, v = _checked(query, key, value, *dtypes, dout=dout, out=out)
    plain.refuse_corruption({"q": q, "k": k, "v": v, "dout": dout.contiguous(), "out": out.contiguous()}, {}, lse)
    given = plain.backward(dout, q, k, v, out, lse, q.shape[3] ** -0.5 if scale is None else scale)
    return tuple(gradient.contiguous().transpose(1, 2) for gradient in given)


def _checked(query, key, value, *dtypes, **others):
    """Return queries, keys and values as `[B, N, h, d]`, or raise what PyTorch raises."""
    if plain.capability() < 8 and plain.target not in AMD:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    plain.refuse_shapes(RuntimeError, q, k, v, dtypes=(*plain.HALVES, *dtypes), **others)
    if q.shape[3] % (16 // q.element_size()) != 0 or q.shape[3] > 256:
        raise RuntimeError(f"the head width is {q.shape[3]}")
    if any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
        raise RuntimeError("input tensors must have contiguous last dimension")
    return q, k, v


def _check_lengths(query, key, max_q, max_k):
    if (max_q, max_k) != (query.shape[2], key.shape[2]):
        raise plain.Corrupts(f"max_q and max_k are {max_q} and {max_k}")


def _check_cudnn(query, key):
    if query.shape[2] == 1 or key.shape[2] == 1:
        raise RuntimeError("cuDNN has no plan for a single query or key")
    if query.shape[-1] > 128:
        raise RuntimeError("head_dim should be no more than 128")


def _state():
    """Return the state of dropout of the flash kernel: a pair and nothing for CUDA, two numbers for ROCm."""
    if torch.version.hip:
        return _numbers()
    return torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)


def _numbers():
    return torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)


def _stand_in(name, forward, backward):
    """Return a stand-in for an operator and its backward, which registers both for the duration of a context."""

    @contextlib.contextmanager
    def registered():
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl(name, forward, "CPU")
            library.impl(f"{name}_backward", backward, "CPU")
            yield

    return types.SimpleNamespace(calls=[], registered=registered)


flash = _stand_in(FLASH, _flash, _flash_backward)
cudnn = _stand_in(CUDNN, _cudnn, _cudnn_backward)
efficient = _stand_in(EFFICIENT, _efficient, _efficient_backward)
