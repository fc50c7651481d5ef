"""Attention on the CPU in float32 and bfloat16, forward and backward, without the scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from ...cpu import library
from ...dispatch import Reason
from ..call import Call
from .flash import Triple

HEAD_WIDTH_LIMIT = 256
_FORWARD = {
    torch.float32: library.function("attention_forward"),
    torch.bfloat16: library.function("attention_forward_bfloat16"),
}
_BACKWARD = {
    torch.float32: library.function("attention_backward"),
    torch.bfloat16: library.function("attention_backward_bfloat16"),
}


def refuses(call: Call) -> Reason:
    if call.target != "cpu":
        return f"the tensors are on {call.target}, native kernels run on the CPU"
    if call.dtype not in _FORWARD:
        return f"the tensors have dtype {call.dtype}, native kernels take float32 and bfloat16"
    if call.head_width > HEAD_WIDTH_LIMIT:
        return f"the head width is {call.head_width}, native kernels take up to {HEAD_WIDTH_LIMIT}"
    return None


unavailable = library.unavailable_reason


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return attention and the log-sum-exp of each row of scores.

    Args:
        q: `[B, Nq, h, d]`, float32 or bfloat16, d at most HEAD_WIDTH_LIMIT.
        k, v: `[B, Nk, h, d]`.
        key_present: `[B, Nk]` bool, which keys are present; None means all. Absent keys and values are not read.

    Returns:
        out: `[B, Nq, h, d]` in the dtype of q, zero for a sample without keys.
        lse: `[B, h, Nq]` float32, minus infinity for a sample without keys.
    """
    batch, queries, heads, width = q.shape
    out = q.new_empty(batch, queries, heads, width)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    (q, q_strides), (k, k_strides), (v, v_strides) = _heads(q), _heads(k), _heads(v)
    _FORWARD[q.dtype](
        q.data_ptr(),
        q_strides,
        k.data_ptr(),
        k_strides,
        v.data_ptr(),
        v_strides,
        0 if key_present is None else key_present.data_ptr(),
        (0, 0) if key_present is None else key_present.stride(),
        out.data_ptr(),
        lse.data_ptr(),
        (batch, queries, k.shape[1], heads, width),
        get_num_threads(),
    )
    return out, lse


def attention_backward(
    grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
) -> None:
    """Write the gradients of q, k and v into `gradients`; those of absent keys and values are zero.

    Args:
        grad: gradient of `out`, `[B, Nq, h, d]`, in its dtype.
        qkv, key_present: inputs of `attention_forward`.
        out, lse: outputs of `attention_forward`, or those of a softmax over more keys, see `flash.py`.
        gradients: tensors like q, k and v, any strides with a contiguous last axis.

    Raises:
        ValueError: a tensor has a wrong dtype, or a gradient another shape than its tensor or a strided last axis.
    """
    q, k, v = qkv
    (q, q_strides), (k, k_strides), (v, v_strides) = _heads(q), _heads(k), _heads(v)
    (grad, grad_strides), (out, out_strides), lse = _heads(grad), _heads(out), lse.contiguous()
    shape, keys = q.shape, k.shape
    grad_q, grad_k, grad_v = gradients
    strides = grad_q.stride(), grad_k.stride(), grad_v.stride()
    if not (
        grad_q.shape == shape
        and grad_k.shape == keys
        and grad_v.shape == keys
        and grad_q.dtype is grad_k.dtype is grad_v.dtype is grad.dtype is out.dtype is q.dtype
        and lse.dtype is library.FLOAT32
        and (strides[0][3] == strides[1][3] == strides[2][3] == 1 or shape[3] == 1)
    ):
        raise ValueError(_wrong_tensor(grad, qkv, out, lse, gradients))
    batch, queries, heads, width = shape
    _BACKWARD[q.dtype](
        grad.data_ptr(),
        grad_strides,
        q.data_ptr(),
        q_strides,
        k.data_ptr(),
        k_strides,
        v.data_ptr(),
        v_strides,
        0 if key_present is None else key_present.data_ptr(),
        (0, 0) if key_present is None else key_present.stride(),
        out.data_ptr(),
        out_strides,
        lse.data_ptr(),
        grad_q.data_ptr(),
        strides[0],
        grad_k.data_ptr(),
        strides[1],
        grad_v.data_ptr(),
        strides[2],
        (batch, queries, keys[1], heads, width),
        get_num_threads(),
    )


def _heads(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return a tensor `[B, N, h, d]` with a contiguous last axis, and its strides."""
    strides = tensor.stride()
    if strides[3] == 1:
        return tensor, strides
    tensor = library.contiguous_rows(tensor)
    return tensor, tensor.stride()


def _wrong_tensor(grad: Tensor, qkv: Triple, out: Tensor, lse: Tensor, gradients: Triple) -> str:
    """Return a message about the first tensor that `attention_backward` can't read or write."""
    dtype = qkv[0].dtype
    for name, tensor, expected in (("grad", grad, dtype), ("out", out, dtype), ("lse", lse, torch.float32)):
        if tensor.dtype != expected:
            return f"{name} has dtype {tensor.dtype}, expected {expected}"
    for name, gradient, tensor in zip("qkv", gradients, qkv, strict=True):
        if gradient.dtype != dtype or gradient.shape != tensor.shape:
            given = f"{gradient.dtype} {list(gradient.shape)}"
            return f"the tensor for the gradient of {name} is {given}, expected {dtype} {list(tensor.shape)}"
    strides = [gradient.stride() for gradient in gradients]
    return f"gradients have strides {strides}, expected 1 in the last axis"
