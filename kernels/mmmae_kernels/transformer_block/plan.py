"""Choices that the block and the conditioning step make alike: backends, dtypes, and what the kernels refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..add_layer_norm.op import dtypes_of, refuse_long_rows
from ..attention.op import ATTENTION, FLASH, attention_backend
from ..autocast import matmul_dtype
from ..dispatch import Arguments, Op, Reason, tensors_of
from ..linear import Matmuls, matmuls_for


class Plan(NamedTuple):
    """The choices that are the same for all calls with one dispatch key.

    Args:
        backend: backend of the kernels, `native` or `triton`.
        attention: backend of attention, one of the flash backends.
        dtype: dtype of the matrix products.
        matmuls: functions that compute the matrix products.
        dtypes: dtypes of the streams (`x`, `residual`, ...) and of the weights; None for a missing tensor.
    """

    backend: str
    attention: str
    dtype: torch.dtype
    matmuls: Matmuls
    dtypes: tuple[Any, ...]


def make_plan(op: Op, call: Any, attention: str, tensors: Sequence[Tensor | None]) -> Plan | None:
    """Return the plan of a fused call, or None if its kernels or its attention have to run one by one.

    Args:
        call: the arguments of the op, with fields `x`, `weights` and `heads`.
        attention: backend of attention, or `auto`.
        tensors: the streams and the weights.
    """
    x, qkv_weight = call.x, call.weights.qkv_weight
    backend = op.choose(dispatch.current_backend(), *call)
    dtype = matmul_dtype(qkv_weight)
    q = x.new_empty((0, 0, call.heads, x.shape[-1] // call.heads), dtype=dtype)
    attention = ATTENTION.choose(attention_backend(attention), q, q, q, None)
    if backend == "eager" or attention not in FLASH:
        return None
    return Plan(backend, attention, dtype, matmuls_for(x, dtype, qkv_weight.dtype), dtypes_of(*tensors))


def native_refuses(arguments: Arguments) -> Reason:
    """Return None if the native kernels support the call, else the reason."""
    return dispatch.native_refuses(_floats(arguments))


def triton_refuses(arguments: Arguments) -> Reason:
    """Return None if the Triton kernels support the call, else the reason."""
    return refuse_long_rows(arguments) or dispatch.triton_refuses(_floats(arguments))


def _floats(arguments: Arguments) -> list[tuple[str, Tensor]]:
    streams = [(name, tensor) for name, tensor in tensors_of(arguments) if name not in ("ids", "present")]
    return [*streams, *arguments["weights"]._asdict().items()]
