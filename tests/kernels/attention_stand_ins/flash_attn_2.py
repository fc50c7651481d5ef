"""flash-attn 2.8: the operators behind `flash_attn.flash_attn_interface`, which have no defaults."""

import contextlib

import torch

from tests.kernels.attention_stand_ins import plain

calls = []
NAMESPACE = "flash_attn"
AMD = ("gfx90a", "gfx942", "gfx950")
FORWARD = (
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "_flash_attn_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a6!)? dq, "
    "Tensor(a7!)? dk, Tensor(a8!)? dv, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None) "
    "-> Tensor"
)
PLAIN = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def _wrapped_flash_attn_forward(*args, **kwargs):
    return torch.ops.flash_attn._flash_attn_forward(*args, **kwargs)


def _wrapped_flash_attn_backward(*args, **kwargs):
    return torch.ops.flash_attn._flash_attn_backward(*args, **kwargs)


@contextlib.contextmanager
def registered():
    """Register the operators for the duration of the context."""
    with torch.library._scoped_library(NAMESPACE, "FRAGMENT") as library:
        library.define(FORWARD)
        library.define(BACKWARD)
        library.impl("_flash_attn_forward", _forward, "CPU")
        library.impl("_flash_attn_backward", _backward, "CPU")
        yield


def _forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    calls.append(dict(locals()))
    _refuse_machine()
    plain.refuse_options(calls[-1], PLAIN | {"return_softmax": False})
    q, k, v = (_dense(tensor) for tensor in (q, k, v))
    plain.refuse_shapes(RuntimeError, q, k, v)
    plain.refuse_width(RuntimeError, q)
    plain.refuse_corruption({"q": q, "k": k, "v": v}, {})
    out, lse = plain.forward(q, k, v, softmax_scale)
    return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


def _backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    calls.append(dict(locals()))
    _refuse_machine()
    plain.refuse_options(calls[-1], PLAIN)
    dout, q, k, v, out = (_dense(tensor) for tensor in (dout, q, k, v, out))
    given = {name: tensor for name, tensor in (("dq", dq), ("dk", dk), ("dv", dv)) if tensor is not None}
    plain.refuse_shapes(RuntimeError, q, k, v, dout=dout, out=out, **given)
    plain.refuse_width(RuntimeError, q)
    for name, tensor in given.items():
        if tensor.stride(-1) != 1:
            raise RuntimeError(f"{name} must have contiguous last dimension")
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "out": out}
    plain.refuse_corruption(inputs, {"dq": dq, "dk": dk, "dv": dv}, softmax_lse)
    if plain.target in AMD and rng_state is None:
        raise plain.Corrupts("rng_state is None, and is read")
    plain.write((dq, dk, dv), plain.backward(dout, q, k, v, out, softmax_lse, softmax_scale))
    batch, queries, heads, _ = q.shape
    return torch.zeros(batch, heads, queries if plain.target in AMD else -(-queries // 128) * 128)


def _refuse_machine():
    if plain.capability() < 8 and plain.target not in AMD:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def _dense(tensor):
    """Make the last axis contiguous, as the library's wrapper does with inputs, but not with gradients."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
