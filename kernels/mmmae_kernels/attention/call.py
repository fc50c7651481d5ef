"""What a backend of attention needs to know of a call, with or without the tensors themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import Reason, constant_when_compiled

HALVES = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """A call of attention.

    Args:
        target: where it runs: `cpu`, `sm90` (NVIDIA, compute capability 9.0), `gfx942` (AMD), or another device's type.
        dtype: of q, k and v.
        head_width: channels a head.
        masked: whether samples may lack keys.
        deterministic: whether the result has to be bitwise repeatable, see `torch.use_deterministic_algorithms`.
    """

    target: str
    dtype: torch.dtype
    head_width: int
    masked: bool = False
    deterministic: bool = False

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability of an NVIDIA GPU; None elsewhere."""
        if not self.target.startswith("sm"):
            return None
        number = int(self.target[2:])
        return number // 10, number % 10


def call_of(q: Tensor, key_present: Tensor | None) -> Call:
    """The call with these arguments."""
    return Call(
        target=target_of(q.device.type, q.device.index),
        dtype=q.dtype,
        head_width=q.shape[3],
        masked=key_present is not None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@constant_when_compiled
def target_of(device: str, index: int | None) -> str:
    """A device as `Call.target` names it."""
    if device != "cuda":
        return device
    from ..gpu.launch import target_of  # it imports triton

    name: str = target_of(torch.device(device) if index is None else torch.device(device, index))
    return name


def flash_refuses(call: Call, *, widest: int = 256) -> Reason:
    """None if kernels of the flash-attn kind take the call as far as its type and shape go, else the reason why not."""
    if call.dtype not in HALVES:
        return f"the tensors have dtype {call.dtype}, it takes float16 and bfloat16"
    if call.masked:
        return "it takes no key_present"
    if call.head_width % 8 != 0 or call.head_width > widest:
        return f"the head width is {call.head_width}, it takes multiples of 8 up to {widest}"
    return None
