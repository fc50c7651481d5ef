"""Attention of queries to the keys that are present."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import registry
from ..checks import check_device, check_floating, check_rank, check_shape
from .eager import attention_eager
from .sdpa import attention_sdpa

BACKENDS = ("sdpa", "eager")  # in order of preference


def attention(q: Tensor, k: Tensor, v: Tensor, *, key_present: Tensor | None = None, backend: str = "auto") -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` for each head.

    Args:
        q: `[B, Nq, h, d]`.
        k, v: `[B, Nk, h, d]`.
        key_present: `[B, Nk]` bool, which keys a sample has; None means all. A sample without any gets zeros.
        backend: `sdpa`, `eager`, or `auto`: the environment variable `MMMAE_ATTENTION`, else the best that can.

    Returns:
        `[B, Nq, h, d]`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the backend is unknown, or it can't serve this call.
    """
    check_rank("q", q, "[B, Nq, h, d]")
    check_rank("k", k, "[B, Nk, h, d]")
    check_floating("q", q)
    check_shape("k", k, (q.shape[0], k.shape[1], q.shape[2], q.shape[3]))
    check_shape("v", v, tuple(k.shape))
    for name, tensor in (("k", k), ("v", v)):
        check_device(name, tensor, q.device)
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected is {q.dtype} as in q")
    if key_present is not None:
        check_shape("key_present", key_present, (k.shape[0], k.shape[1]))
        check_device("key_present", key_present, q.device)
        if key_present.dtype != torch.bool:
            raise ValueError(f"key_present has dtype {key_present.dtype}, expected is torch.bool")
    forced = attention_backend(backend)
    mixed: Tensor = registry.choose("attention", q, k, v, key_present, forced=forced)(q, k, v, key_present)
    return mixed


def attention_backend(name: str) -> str:
    """The backend that `name` stands for: itself, or for `auto` that of `MMMAE_ATTENTION`, if it is set.

    Raises:
        ValueError: the name, or the variable's, is unknown; lists the known ones.
    """
    source = "attention"
    if name == "auto":
        source, name = "MMMAE_ATTENTION", os.environ.get("MMMAE_ATTENTION", "auto")
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source} is {name!r}, allowed is one of auto, {', '.join(BACKENDS)}")
    return name


registry.register(
    "attention",
    backends=BACKENDS,
    sdpa=registry.Implementation(attention_sdpa),
    eager=registry.Implementation(attention_eager),
)
