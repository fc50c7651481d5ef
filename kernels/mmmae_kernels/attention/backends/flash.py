"""What backends of the flash kind are to the operator, and what their adapters share.

They give attention and the log-sum-exp of each row of scores (natural logarithm, scale included), and take both again
for the gradients. Those may be of more keys than the backend has seen: `exp(score - lse)` is then each key's share of
all, and `sum(grad * out)` what a softmax over all subtracts, so that the gradients are right for the keys it has seen.
Conditioning rests on this, see `guidance.py`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from typing import Protocol

import torch
from torch import Tensor

from ...dispatch import Reason
from ..call import Call

Triple = tuple[Tensor, Tensor, Tensor]  # of queries, keys and values


class FlashBackend(Protocol):
    """A module that computes attention by a flash kernel."""

    def refuses(self, call: Call) -> Reason:
        """None if its kernels take the call, on a machine that has them, else the reason why not."""

    def unavailable(self) -> Reason:
        """None if this machine has its kernels, else the reason why not."""

    def attention_forward(self, q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> tuple[Tensor, Tensor]:
        """q `[B, Nq, h, d]`, k and v `[B, Nk, h, d]` -> out like q, lse float32 `[B, h, Nq]`."""

    def attention_backward(
        self, grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
    ) -> None:
        """Write the gradients of q, k and v into `gradients`, which may be views of one packed tensor."""


@functools.cache
def flash_backend(backend: str) -> FlashBackend:
    """Return the module of a backend."""
    module: FlashBackend = importlib.import_module(f"{__package__}.{backend}")
    return module


def aligned_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its last axis has gaps or a head's row is not at a multiple of 16 bytes.

    GPU kernels load 16 bytes at a time and do not look.
    """
    unit = 16 // tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in tensor.stride()[:-1])
    return tensor if tensor.stride(-1) == 1 and aligned else tensor.clone(memory_format=torch.contiguous_format)


def scale_of(q: Tensor) -> float:
    """What scores are multiplied with."""
    return 1 / math.sqrt(max(q.shape[-1], 1))


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, which libraries launch on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
