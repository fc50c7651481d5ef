"""flash-attn 4.0.0b36: `flash_attn.cute.interface`, which asserts."""

import torch

from tests.kernels.attention_stand_ins import plain

calls = []


def _flash_attn_fwd(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    softcap=None,
    window_size_left=None,
    window_size_right=None,
    learnable_sink=None,
    tile_mn=None,
    mma_pv_is_rs=None,
    intra_wg_overlap=None,
    num_threads=384,
    num_splits=1,
    pack_gqa=None,
    _arch=None,
    score_mod=None,
    mask_mod=None,
    block_sparse_tensors=None,
    return_lse=False,
    out=None,
    lse=None,
    aux_tensors=None,
    aux_scalars=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    gather_kv_indices=None,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
):
    calls.append(dict(locals()))
    options = set(calls[-1]) - {"q", "k", "v", "softmax_scale", "return_lse"}
    untouched = {"causal": False, "num_threads": 384, "num_splits": 1}
    untouched |= {"disable_scheduler_metadata": False, "gather_bwd_recompute_p": False}
    plain.refuse_options(calls[-1], {name: untouched.get(name) for name in options})
    assert plain.capability() in (8, 9, 10, 11, 12), "Unsupported compute capability"
    _refuse(q, k, v)
    plain.refuse_corruption({"q": q, "k": k, "v": v}, {})
    out, lse = plain.forward(q, k, v, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    wanted = return_lse or any(tensor.requires_grad for tensor in (q, k, v))
    return out, lse if wanted else None, None, None, None


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    window_size_left=None,
    window_size_right=None,
    m_block_size=64,
    n_block_size=128,
    num_threads=256,
    pack_gqa=False,
    num_stages_Q=2,
    num_stages_dO=2,
    SdP_swapAB=False,
    dKV_swapAB=False,
    dQ_swapAB=False,
    AtomLayoutMSdP=2,
    AtomLayoutNdKV=2,
    AtomLayoutMdQ=2,
    V_in_regs=False,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    deterministic=False,
    dq=None,
    dk=None,
    dv=None,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    dlse=None,
    learnable_sink=None,
):
    calls.append(dict(locals()))
    absent = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "score_mod")
    absent += ("score_mod_bwd", "mask_mod", "aux_tensors", "aux_scalars", "block_sparse_tensors", "dlse")
    absent += ("learnable_sink", "window_size_left", "window_size_right")
    plain.refuse_options(calls[-1], dict.fromkeys(absent) | {"causal": False, "softcap": 0.0, "pack_gqa": False})
    assert plain.capability() in (9, 10, 11, 12), "Unsupported compute capability"
    assert not (deterministic and plain.capability() == 12), "deterministic backward is not supported on SM120"
    given = {name: tensor for name, tensor in (("dq", dq), ("dk", dk), ("dv", dv)) if tensor is not None}
    _refuse(q, k, v, out=out, dout=dout, **given)
    for name, tensor in given.items():
        assert tensor.stride(-1) == 1, f"{name} must have contiguous last dimension"
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]), "lse must have shape (batch_size, num_head, seqlen_q)"
    assert lse.dtype == torch.float32, "lse must be float32"
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "out": out}
    plain.refuse_corruption(inputs, given, lse)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    gradients = plain.backward(dout, q, k, v, out, lse, scale)
    places = tuple(
        torch.empty_like(gradient) if place is None else place
        for place, gradient in zip((dq, dk, dv), gradients, strict=True)
    )
    plain.write(places, gradients)
    return places


def outdated_flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0):
    """Stand for the backward of the first betas, and of the copy that flash-attn 2 ships."""
    raise AssertionError("an outdated backward was called")


def _refuse(q, k, v, **others):
    plain.refuse_shapes(AssertionError, q, k, v, **others)
    width, major = q.shape[3], plain.capability()
    wide = major in (10, 11) and width == 256
    plain.refuse_width(AssertionError, q, 256 if major == 9 or wide else 128)
