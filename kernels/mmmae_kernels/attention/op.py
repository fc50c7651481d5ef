"""Attention of queries to keys, and of tokens to themselves and a few vectors, with a choice of backends."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..autocast import is_autocast
from ..checks import check_device, check_floating, check_rank, check_shape, check_tensor, described
from ..gpu import executors
from ..operators import fast_apply
from .backends import (
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    native,
    sdpa,
    torch_cpu,
    torch_cudnn,
    torch_efficient,
    torch_flash,
    xformers,
)
from .backends.flash import FlashBackend
from .call import Call, call_of
from .guidance import MergedAttention, merging_backend
from .operators import FlashAttention, unpacked
from .reference import attention_eager

# Backends in order of preference; flash backends compute a log-sum-exp and have a backward of their own.
FLASH: dict[str, FlashBackend] = {
    "flash_attn_4": flash_attn_4,
    "flash_attn_3": flash_attn_3,
    "flash_attn_2": flash_attn_2,
    "xformers": xformers,
    "native": native,
    "torch_cudnn": torch_cudnn,
    "torch_flash": torch_flash,
    "torch_efficient": torch_efficient,
    "torch_cpu": torch_cpu,
}
PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "sdpa": sdpa.attention_sdpa,
    "eager": attention_eager,
}
BACKENDS = (*FLASH, *PLAIN)


def attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    key_present: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute `softmax(q k^T / sqrt(d)) v` for each head.

    Queries, keys and values may be packed in one tensor, as a linear layer computes them. Only the backends `sdpa` and
    `eager` copy packed tensors or their gradients.

    Args:
        q: `[B, Nq, h, d]`; or packed `[B, N, 3, h, d]` with queries, keys and values, without `k` and `v`.
        k: `[B, Nk, h, d]`; or packed `[B, Nk, 2, h, d]` with keys and values, without `v`.
        v: `[B, Nk, h, d]`.
        key_present: `[B, Nk]` bool, False for keys to ignore; None means all are present. The contents of absent keys
            and values do not matter. The result is zero for a sample without keys.
        backend: `flash_attn_4`, `flash_attn_3`, `flash_attn_2`, `xformers`, `native`, `torch_cudnn`, `torch_flash`,
            `torch_efficient`, `torch_cpu`, `sdpa`, `eager`, or `auto`: that of the environment variable
            `MMMAE_ATTENTION`, else the first one that supports the call.

    Returns:
        `[B, Nq, h, d]`, in autocast's dtype under autocast.

    Raises:
        ValueError: shapes, dtypes or devices do not match, the backend is unknown, or it does not support this call.

    Example:
        >>> q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 4, 8), torch.randn(2, 7, 4, 8)
        >>> key_present = torch.ones(2, 7, dtype=torch.bool)
        >>> key_present[1, 3:] = False  # the second sample has three keys
        >>> attention(q, k, v, key_present=key_present).shape
        torch.Size([2, 5, 4, 8])
        >>> qkv = torch.randn(2, 5, 3, 4, 8)  # packed
        >>> torch.allclose(attention(qkv), attention(*qkv.unbind(2)))
        True
    """
    projected = _cast(_check(q, k, v))
    if key_present is not None:
        _check_present("key_present", key_present, k if k is not None else q)
    requested = attention_backend(backend, "backend")
    key = (*_dispatch_key(projected[0]), key_present is None)
    mixed: Tensor = ATTENTION.select(key, *unpacked(projected), key_present, requested=requested)(
        projected, key_present
    )
    return mixed


def concat_attention(qkv: Tensor, vectors: Tensor, present: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute attention from tokens to themselves and to a few vectors, of which a sample may lack some.

    The result is that of attention to the concatenated keys and values, but only the backends `sdpa` and `eager`
    concatenate. For a sample without vectors it equals `attention(qkv)`.

    Args:
        qkv: queries, keys and values of the tokens, `[B, N, 3, h, d]`.
        vectors: keys and values of the vectors, `[B, m, 2, h, d]`; the contents of absent vectors do not matter.
        present: `[B, m]` bool, which vectors a sample has.
        backend: see `attention`.

    Returns:
        `[B, N, h, d]`, in autocast's dtype under autocast.

    Raises:
        ValueError: see `attention`.

    Example:
        >>> qkv, vectors = torch.randn(2, 5, 3, 4, 8), torch.randn(2, 3, 2, 4, 8)
        >>> present = torch.tensor([[True, False, True], [False, False, False]])
        >>> out = concat_attention(qkv, vectors, present)
        >>> out.shape
        torch.Size([2, 5, 4, 8])
        >>> torch.allclose(out[1], attention(qkv)[1])  # the second sample has no vectors
        True
    """
    check_rank("qkv", qkv, "[B, N, 3, h, d]")
    check_floating("qkv", qkv)
    check_shape("qkv", qkv, (*qkv.shape[:2], 3, *qkv.shape[3:]))
    check_rank("vectors", vectors, "[B, m, 2, h, d]")
    check_shape("vectors", vectors, (qkv.shape[0], vectors.shape[1], 2, *qkv.shape[3:]))
    _check_like("vectors", vectors, "qkv", qkv)
    _check_present("present", present, vectors)
    qkv, vectors = _cast([qkv, vectors])
    requested = attention_backend(backend, "backend")
    mixed: Tensor = _select_concat(requested, qkv)(qkv, vectors, present)
    return mixed


def _select_concat(requested: str, qkv: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the function that computes `concat_attention` for tensors like `qkv`; as `Op.select`, with two choices."""
    selected = {} if torch.compiler.is_compiling() else _CONCAT_ATTENTION.selected
    key = requested, *_dispatch_key(qkv), dispatch.current_backend(), executors.current() is None
    function = selected.get(key)
    if function is None:
        backend = _CONCAT_ATTENTION.choose(requested, *unpacked([qkv]), None)
        function = _CONCAT_ATTENTION.implementations[backend].function
        function = selected[key] = functools.partial(function, merging_backend(qkv))
    return function


def attention_backend(name: str, source: str = "attention") -> str:
    """Resolve the name of a backend of attention.

    `auto` becomes the value of `MMMAE_ATTENTION` if it is set. If that is `auto` too, it becomes `eager` under
    `use_backend("eager")` or `MMMAE_KERNELS=eager`.

    Args:
        name: name of a backend, or `auto`.
        source: name of the setting, for the message.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(name, str) and name == "auto":
        source, name = "MMMAE_ATTENTION", os.environ.get("MMMAE_ATTENTION", "auto")
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise ValueError(f"{source} is {described(name)}, must be one of auto, {', '.join(BACKENDS)}")
    return "eager" if name == "auto" and dispatch.current_backend() == "eager" else name


def explain_call(call: Call, *, here: bool = False) -> dict[str, dispatch.Reason]:
    """Return for each backend, in order of preference, None if it supports the call, else the reason.

    Args:
        call: properties of the call.
        here: whether the packages and devices of this machine matter; if False, all are assumed to be there.
    """
    reasons: dict[str, dispatch.Reason] = {}
    for name in BACKENDS:
        missing = FLASH[name].unavailable() if here and name in FLASH else None
        reasons[name] = missing or _REFUSES[name](call)
    return reasons


def _check(q: Tensor, k: Tensor | None, v: Tensor | None) -> list[Tensor]:
    """Return the given tensors, or raise unless their shapes, dtypes and devices match."""
    check_tensor("q", q)
    if v is not None:
        check_tensor("v", v)
    check_floating("q", q)
    if k is None:
        if v is not None:
            raise ValueError("v is given without k, expected k and v")
        check_rank("q", q, "[B, N, 3, h, d]" if q.dim() == 5 else "[B, Nq, h, d]")
        if q.dim() == 4:
            raise ValueError(f"q has shape {list(q.shape)}, expected [B, N, 3, h, d] without k and v")
        check_shape("q", q, (*q.shape[:2], 3, *q.shape[3:]))
        return [q]
    check_tensor("k", k)
    check_rank("q", q, "[B, Nq, h, d]")
    check_rank("k", k, "[B, Nk, 2, h, d]" if v is None else "[B, Nk, h, d]")
    packed = (2,) if v is None else ()
    check_shape("k", k, (q.shape[0], k.shape[1], *packed, q.shape[2], q.shape[3]))
    _check_like("k", k, "q", q)
    if v is None:
        return [q, k]
    check_shape("v", v, tuple(k.shape))
    _check_like("v", v, "q", q)
    return [q, k, v]


def _check_like(name: str, tensor: Tensor, other: str, model: Tensor) -> None:
    check_device(name, tensor, model.device)
    if tensor.dtype != model.dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {model.dtype} as in {other}")


def _check_present(name: str, present: Tensor, keys: Tensor) -> None:
    check_shape(name, present, (keys.shape[0], keys.shape[1]))
    check_device(name, present, keys.device)
    if present.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {present.dtype}, expected torch.bool")


def _cast(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors in the dtype of autocast if it is enabled and they are not float64."""
    if not is_autocast(tensors[0]) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [tensor.to(dtype) for tensor in tensors]


_REFUSES: dict[str, Callable[[Call], dispatch.Reason]] = {
    **{name: module.refuses for name, module in FLASH.items()},
    "sdpa": sdpa.refuses,
    "eager": lambda call: None,
}


def _dispatch_key(q: Tensor) -> tuple[object, ...]:
    return q.device, q.dtype, q.shape[-1], torch.are_deterministic_algorithms_enabled()


def _refuses(backend: str) -> Callable[[dispatch.Arguments], dispatch.Reason]:
    return lambda arguments: _REFUSES[backend](call_of(arguments["q"], arguments.get("key_present")))


_apply_flash, _apply_merged = fast_apply(FlashAttention), fast_apply(MergedAttention)


def _by_flash(backend: str) -> Callable[[Sequence[Tensor], Tensor | None], Tensor]:
    def run(projected: Sequence[Tensor], key_present: Tensor | None) -> Tensor:
        out: Tensor = _apply_flash(key_present, backend, *projected)
        return out

    return run


def _by_plain(backend: str) -> Callable[[Sequence[Tensor], Tensor | None], Tensor]:
    return lambda projected, key_present: PLAIN[backend](*unpacked(projected), key_present)


def _merged_by_flash(backend: str) -> Callable[[str, Tensor, Tensor, Tensor], Tensor]:
    def run(merging: str, qkv: Tensor, vectors: Tensor, present: Tensor) -> Tensor:
        out: Tensor = _apply_merged(qkv, vectors, present, backend, merging)
        return out

    return run


def _concat_by_plain(backend: str) -> Callable[[str, Tensor, Tensor, Tensor], Tensor]:
    def run(merging: str, qkv: Tensor, vectors: Tensor, present: Tensor) -> Tensor:
        (q, k, v), (keys, values) = qkv.unbind(2), vectors.unbind(2)
        key_present = torch.cat([present.new_ones(qkv.shape[:2]), present], dim=1)
        return PLAIN[backend](q, torch.cat([k, keys], dim=1), torch.cat([v, values], dim=1), key_present)

    return run


def _implementations(
    by_flash: Callable[[str], Callable[..., Tensor]], by_plain: Callable[[str], Callable[..., Tensor]]
) -> dict[str, dispatch.Implementation]:
    return {
        **{n: dispatch.Implementation(by_flash(n), _refuses(n), module.unavailable) for n, module in FLASH.items()},
        **{n: dispatch.Implementation(by_plain(n), _refuses(n)) for n in PLAIN},
    }


ATTENTION = dispatch.Op("attention", attention_eager, _implementations(_by_flash, _by_plain))
# A backend supports attention to tokens and vectors if it supports attention to the tokens.
_CONCAT_ATTENTION = dispatch.Op(
    "concat_attention", attention_eager, _implementations(_merged_by_flash, _concat_by_plain)
)
