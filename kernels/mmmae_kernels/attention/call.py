"""Properties of an attention call that decide which backends support it, independent of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import HALVES, Reason, constant_when_compiled
from ..gpu import architecture


class Call(NamedTuple):
    """A call of attention.

    Args:
        target: `cpu`, `sm90` (NVIDIA, compute capability 9.0), `gfx942` (AMD), or the type of another device.
        dtype: dtype of q, k and v.
        head_width: channels of a head.
        masked: whether there is a mask of present keys.
        deterministic: whether `torch.use_deterministic_algorithms` asks for bitwise repeatable results.
    """

    target: str
    dtype: torch.dtype
    head_width: int
    masked: bool = False
    deterministic: bool = False

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability of an NVIDIA GPU; None for other targets."""
        if not self.target.startswith("sm"):
            return None
        number = int(self.target[2:])
        return number // 10, number % 10


def call_of(q: Tensor, key_present: Tensor | None) -> Call:
    """Return the properties of a call with these arguments."""
    return Call(
        target=target_of(q.device.type, q.device.index),
        dtype=q.dtype,
        head_width=q.shape[3],
        masked=key_present is not None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@constant_when_compiled
def target_of(device: str, index: int | None) -> str:
    """Return the `Call.target` of a device."""
    if device != "cuda":
        return device
    return architecture.target_of(torch.device(device) if index is None else torch.device(device, index))


def flash_refuses(call: Call, *, widest: int = 256) -> Reason:
    """Return None if flash-attn's kernels support the dtype, mask and head width of a call, else the reason."""
    if call.dtype not in HALVES:
        return f"the tensors have dtype {call.dtype}, it takes float16 and bfloat16"
    if call.masked:
        return "it does not support key_present"
    if call.head_width % 8 != 0 or call.head_width > widest:
        return f"the head width is {call.head_width}, it takes multiples of 8 up to {widest}"
    return None
