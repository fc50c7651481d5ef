"""The work of an op that is timed: its variants, the tensors that they run on, and the bytes that have to move."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import mmmae
from mmmae_kernels import TokenMask, explain, random_masking, use_backend
from mmmae_kernels.autocast import autocast_dtype

Run = Callable[[], Sequence[Tensor]]
CONFIG = mmmae.MMMAEConfig()
BACKENDS = ("triton", "native", "eager")


class OpWork(NamedTuple):
    """The variants of an op by name, and the least bytes that each has to move: inputs and outputs once."""

    variants: Mapping[str, Run]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Place:
    """The device and the type of tensors.

    Args:
        device: `cpu` or `cuda`.
        dtype: type of the tensors.
        rounded: type that numbers are rounded to first, or None.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rounded: torch.dtype | None = None

    def data(self, *shape: int) -> Tensor:
        """Return normal numbers, the same in every type under the same seed."""
        return torch.randn(*shape, device=self.device).to(self.rounded or self.dtype).to(self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        """Return the same as a leaf that requires a gradient."""
        return self.data(*shape).requires_grad_()

    def mask(self, batch: int) -> TokenMask:
        """Return the token mask of a batch of volumes."""
        return random_masking(batch, CONFIG.tokens, CONFIG.keep, seed=0, device=self.device)


class ForwardBackward:
    """A run of a function forward and backward, from fixed gradients of its outputs, which returns all of both.

    What is made under autocast runs forward under autocast.
    """

    def __init__(self, function: Callable[[], Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
        self.function, self.inputs = function, inputs
        self.autocast = autocast_dtype(inputs[0].device.type)
        torch.manual_seed(1)
        # By shape: the same for outputs of any strides.
        self.upstream = [torch.randn(out.shape, device=out.device).to(out.dtype) for out in self.outputs()]

    def outputs(self) -> tuple[Tensor, ...]:
        """Return the outputs as a tuple, even a single one."""
        device, dtype = self.inputs[0].device.type, self.autocast
        # A cast that the cache holds would be freed with it, while a graph still reads it.
        with contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype, cache_enabled=False):
            out = self.function()
        return out if isinstance(out, tuple) else (out,)

    def __call__(self) -> Sequence[Tensor]:
        out = self.outputs()
        return [*(tensor.detach() for tensor in out), *torch.autograd.grad(out, self.inputs, self.upstream)]


def compiled(run: Run) -> Run:
    """Return the run compiled: of a run with a backward pass only the function, as a user would compile it."""
    if isinstance(run, ForwardBackward):
        return ForwardBackward(torch.compile(run.function), run.inputs)
    return torch.compile(run)


def trained(variants: Mapping[str, Run], inputs: Sequence[Tensor], data: int = 0) -> OpWork:
    """Return the work of runs with a backward pass: inputs, outputs, the gradients of both, and `data` bytes move."""
    found = next(iter(variants.values()))()
    outputs = found[: len(found) - len(inputs)]
    return OpWork(variants, data + 2 * sum(tensor.nbytes for tensor in (*inputs, *outputs)))


def each_backend(op: str, run: Run) -> dict[str, Run]:
    """Return the run on each backend that serves `op` on this machine."""

    def on(backend: str) -> Run:
        def forced() -> Sequence[Tensor]:
            with use_backend(backend):
                return run()

        return forced

    return {backend: on(backend) for backend in BACKENDS if explain(op)[backend] == "serves"}


def patch_bytes(volume: Tensor, ids: Tensor) -> int:
    """Return the bytes of the patches that `ids` names."""
    return volume.nbytes * ids.shape[1] // CONFIG.tokens
