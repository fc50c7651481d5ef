"""Run code as on a GPU under autocast, on a machine without one, to count what it launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils

from mmmae_kernels.attention import call
from mmmae_kernels.attention.op import FLASH
from mmmae_kernels.dispatch import assume_available
from mmmae_kernels.gpu.executors import execute_by
from mmmae_kernels.operators import watch_launches

if TYPE_CHECKING:
    from mmmae_kernels.gpu.config import Config, Launch

ATTENTION = "flash_attn_2"  # a flash library: all of them take the same tensors

# Functions of the models that autocast computes in float32 on CUDA and not on the CPU.
FLOAT32_ON_CUDA = (Tensor.softmax, Tensor.square, F.layer_norm, F.cross_entropy)


@contextlib.contextmanager
def on_gpu(target: str, receive: Callable[[Launch], None] = lambda launch: None) -> Iterator[None]:
    """Run the code inside the `with` block as on a GPU, as far as it shows in what is launched.

    Tensors are on the CPU but claim to be on a GPU. Triton's kernels are not run; attention by `ATTENTION` can be
    traced, as if its package were here. Under autocast of the CPU the rules are those of CUDA.

    Args:
        target: the architecture, for example `sm90`.
        receive: called with each launch of a Triton kernel; the default does nothing.
    """
    mode = _AsOnCuda()

    def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:  # torch leaves it for the whole of `Tensor.backward` and of `torch.autograd.grad`
            return _engine_run_backward(*args, **kwargs)

    devices = [*_foreach_utils._get_foreach_kernels_supported_devices(), "cpu"]
    with (
        assume_available(ATTENTION),
        mock.patch.object(FLASH[ATTENTION], "unavailable", return_value=None),
        mock.patch.object(call, "target_of", return_value=target),
        execute_by(_Receiver(target, receive)),
        watch_launches(),
        mock.patch.object(_foreach_utils, "_get_foreach_kernels_supported_devices", return_value=devices),
        mock.patch.object(torch.autograd, "_engine_run_backward", run_backward_in_mode),
        mode,
    ):
        yield


class _Receiver:
    """An executor that passes on each launch and runs none."""

    def __init__(self, target: str, receive: Callable[[Launch], None]) -> None:
        self.target, self.receive = target, receive

    def __call__(self, launch: Launch) -> Config:
        self.receive(launch)
        for argument in launch.arguments.values():
            if isinstance(argument, Tensor) and argument.dtype == torch.int64:
                argument.numpy().fill(0)  # token numbers, which nothing has written, have to be valid
        return launch.configs[0]


class _AsOnCuda(TorchFunctionMode):
    """A mode in which tensors claim to be on a GPU, with the rules of autocast for CUDA."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):  # type: ignore[attr-defined]
            return func == Tensor.is_cuda.__get__  # type: ignore[attr-defined]
        if func in FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = [argument.float() if _is_half(argument) else argument for argument in args]
        return func(*args, **(kwargs or {}))


def _is_half(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16)
