"""flash-attn 3: the operators that `flash_attn_interface` registers."""

import contextlib

import torch

from tests.kernels.attention_stand_ins import plain

calls = []
NAMESPACE = "flash_attn_3"
FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# As registered before gradients could be given.
OUTDATED_BACKWARD = "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse) -> Tensor[]"


@contextlib.contextmanager
def registered(forward=FORWARD, backward=BACKWARD):
    """Register the operators for the duration of the context."""
    with torch.library._scoped_library(NAMESPACE, "FRAGMENT") as library:
        library.define(forward)
        library.define(backward)
        library.impl("fwd", _forward, "CPU")
        library.impl("bwd", _backward, "CPU")
        yield


def _forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    q_v=None,
    out=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    rotary_cos=None,
    rotary_sin=None,
    seqlens_rotary=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    softcap=0.0,
    is_rotary_interleaved=False,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    calls.append(dict(locals()))
    options = set(calls[-1]) - {"q", "k", "v", "softmax_scale", "num_splits"}
    untouched = {"is_causal": False, "window_size_left": -1, "window_size_right": -1, "attention_chunk": 0}
    untouched |= {"softcap": 0.0, "is_rotary_interleaved": False, "sm_margin": 0}
    plain.refuse_options(calls[-1], {name: untouched.get(name) for name in options})
    _refuse(q, k, v)
    plain.refuse_corruption({"q": q, "k": k, "v": v}, {})
    if num_splits != 1:
        raise plain.Corrupts(f"num_splits is {num_splits}: the sum's order is left to a heuristic")
    out, lse = plain.forward(q, k, v, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    return out, lse, q.new_empty(0), q.new_empty(0)


def _backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq=None,
    dk=None,
    dv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
):
    calls.append(dict(locals()))
    ragged = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k"))
    untouched = {"is_causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "sm_margin": 0}
    plain.refuse_options(calls[-1], ragged | untouched)
    given = {name: tensor for name, tensor in (("dq", dq), ("dk", dk), ("dv", dv)) if tensor is not None}
    _refuse(q, k, v, dout=dout, out=out, **given)
    if deterministic and q.shape[3] == 256:
        raise RuntimeError("Deterministic backward not supported for hdim 256.")
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "out": out}
    plain.refuse_corruption(inputs, {"dq": dq, "dk": dk, "dv": dv}, softmax_lse)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    plain.write((dq, dk, dv), plain.backward(dout, q, k, v, out, softmax_lse, scale))
    return tuple(torch.zeros(1) for _ in range(5))  # sums of rows and buffers of the kernel's own


def _refuse(q, k, v, **others):
    if plain.target != "sm90":
        raise RuntimeError("no kernel image is available for execution on the device")
    plain.refuse_shapes(RuntimeError, q, k, v, **others)
    plain.refuse_width(RuntimeError, q)
    for name, tensor in {"q": q, "k": k, "v": v, **others}.items():
        if tensor.stride(-1) != 1:
            raise RuntimeError(f"{name} must have contiguous last dimension")
