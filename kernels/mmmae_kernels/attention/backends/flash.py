"""Interface of the flash backends, and helpers of their adapters.

Forward returns attention and the log-sum-exp of each row of scores (natural logarithm, scale included); backward takes
both. They may belong to a softmax over more keys than those given to the backend: `exp(score - lse)` is then a key's
weight in that softmax, and `sum(grad * out)` its correction term, so that the gradients of the given keys are right.
The merging of vectors in `guidance.py` relies on this.
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

Triple = tuple[Tensor, Tensor, Tensor]  # q, k, v or their gradients


class FlashBackend(Protocol):
    """A module that computes attention by a flash kernel."""

    def refuses(self, call: Call) -> Reason:
        """Return None if the kernels support the call, wherever they are installed, else the reason."""

    def unavailable(self) -> Reason:
        """Return None if the kernels can run on this machine, else the reason."""

    def attention_forward(self, q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return out like q and lse, float32 `[B, h, Nq]`, for q `[B, Nq, h, d]`, k and v `[B, Nk, h, d]`."""

    def attention_backward(
        self, grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
    ) -> Triple | None:
        """Write the gradients of q, k and v into `gradients`, which may be views of one packed tensor.

        A backend that can't write into given tensors returns the gradients instead.
        """


@functools.cache
def flash_backend(backend: str) -> FlashBackend:
    """Import and return the module of a flash backend."""
    module: FlashBackend = importlib.import_module(f"{__package__}.{backend}")
    return module


def aligned_rows(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy unless its last axis is contiguous and all its rows are aligned to 16 bytes.

    The GPU kernels load 16 bytes at a time without checking.
    """
    unit = 16 // tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in tensor.stride()[:-1])
    return tensor if tensor.stride(-1) == 1 and aligned else tensor.clone(memory_format=torch.contiguous_format)


def scale_of(q: Tensor) -> float:
    """Return the scale of the scores, `1 / sqrt(d)`."""
    return 1 / math.sqrt(max(q.shape[-1], 1))


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which the tensor's GPU is the current device, on which libraries launch their kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
