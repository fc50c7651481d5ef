"""The function that each stand-in computes, and checks for wrong calls that the real kernels do not detect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
target = "sm90"  # the GPU that the stand-ins take themselves to be on


class Corrupts(Exception):
    """The real kernel would silently read or write wrong memory, or lose a result."""


def capability() -> int:
    """Return the major version of the NVIDIA GPU's compute capability, 0 for other targets."""
    return int(target[2:]) // 10 if target.startswith("sm") else 0


def refuse_options(given: dict[str, Any], plain: dict[str, Any]) -> None:
    """Raise NotImplementedError for options that the stand-ins do not have."""
    for name, value in plain.items():
        if given[name] != value:
            raise NotImplementedError(f"the stand-in has no {name}")


def refuse_shapes(
    error: type[Exception],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dtypes: tuple[torch.dtype, ...] = HALVES,
    **others: Tensor,
) -> None:
    """Raise `error` for wrong shapes, dtypes and devices; dk and dv must be like k, others like q."""
    for name, tensor in {"q": q, "k": k, "v": v, **others}.items():
        if tensor.dim() != 4:
            raise error(f"{name} has {tensor.dim()} dimensions")
        if tensor.dtype not in dtypes or tensor.dtype != q.dtype:
            raise error(f"{name} is {tensor.dtype}")
        if tensor.device != q.device:
            raise error(f"{name} is on {tensor.device}")
        of_keys = name in ("k", "v", "dk", "dv")
        expected = (q.shape[0], (k if of_keys else q).shape[1], *q.shape[2:])
        if tensor.shape != expected:
            raise error(f"{name} has shape {list(tensor.shape)}")


def refuse_width(error: type[Exception], q: Tensor, widest: int = 256) -> None:
    if q.shape[3] % 8 != 0 or q.shape[3] > widest:
        raise error(f"the head width is {q.shape[3]}")


def refuse_corruption(inputs: dict[str, Tensor], written: dict[str, Tensor | None], lse: Tensor | None = None) -> None:
    """Raise Corrupts for tensors with which the real kernel would access wrong memory or lose a gradient."""
    for name, tensor in {**inputs, **written}.items():
        if tensor is None:
            raise Corrupts(f"{name} is None, its gradient is lost")
        unit = 16 // tensor.element_size()
        if tensor.numel() == 0:
            raise Corrupts(f"{name} is empty")
        if tensor.data_ptr() % 16 != 0 or any(stride % unit != 0 for stride in tensor.stride()[:-1]):
            raise Corrupts(f"{name} is not aligned to 16 bytes")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise Corrupts(f"{name} requires a gradient, which the call does not give")
        if max(tensor.shape[0], tensor.shape[2]) > 65535:
            raise Corrupts(f"{name} has more samples or heads than a grid")
    taken = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    for name, tensor in written.items():
        if tensor is not None and tensor.untyped_storage().data_ptr() in taken:
            raise Corrupts(f"{name} lies in the memory of an input")
    if lse is not None:
        q = inputs["q"]
        if lse.dtype != torch.float32 or lse.shape != (q.shape[0], q.shape[2], q.shape[1]) or not lse.is_contiguous():
            raise Corrupts(f"lse is {lse.dtype} {list(lse.shape)} with strides {lse.stride()}")


@torch.autocast("cpu", enabled=False)
def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention in the dtype of q, and the log-sum-exp of each row in float32."""
    scores = _scores(q, k, scale)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(q.dtype), scores.logsumexp(-1)


@torch.autocast("cpu", enabled=False)
def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients from the given log-sum-exp and output, as the real kernels do."""
    share = (_scores(q, k, scale) - lse[..., None]).exp()
    dout, of_row = dout.float(), (dout.float() * out.float()).sum(-1).transpose(1, 2)[..., None]
    dscores = share * (torch.einsum("bqhd,bkhd->bhqk", dout, v.float()) - of_row) * scale
    dq = torch.einsum("bhqk,bkhd->bqhd", dscores, k.float())
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q.float())
    dv = torch.einsum("bhqk,bqhd->bkhd", share, dout)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def write(places: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    """Copy values into the places, which must not overlap."""
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
    if not all(torch.equal(place, value) for place, value in zip(places, values, strict=True)):
        raise Corrupts("two of the gradients share memory, or one is not a number")


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
