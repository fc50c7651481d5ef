"""A pre-norm transformer block as one op: its kind of call is decided once, then it is one node of autograd."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..add_layer_norm.op import check_norm, dtypes_of, refuse_long_rows, total_dtype
from ..attention.op import ATTENTION, FLASH, attention, attention_backend
from ..autocast import autocast_dtype, matmul_dtype
from ..checks import check_epsilon, check_rank, check_shape, check_tensor, check_whole, described
from ..dispatch import Arguments, Reason, native_refuses, tensors_of, triton_refuses
from ..gelu_linear.op import gelu_linear
from ..gpu import executors
from ..linear import check_linear, linear, matmuls_for, refuse_native_product
from ..norm_linear.op import norm_linear
from ..operators import fast_apply
from ..patch_embed.op import check_token_ids
from .fused import FusedBlock, Plan
from .reference import BlockWeights, take, transformer_block_reference

Results = tuple[Tensor, Tensor]


def transformer_block(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    weights: BlockWeights,
    heads: int,
    ids: Tensor | None = None,
    *,
    epsilon: float = 1e-6,
    attention: str = "auto",
) -> Results:
    """Run a transformer block on the stream `x + residual + residual_bias`; the last addition is left to the caller.

    The block's output is the sum of both results and of the bias of its last layer. The next block, or norm, adds them
    on its way, so that the sum is written once.

    Args:
        x: `[B, N, D]`.
        residual: of the same shape, or None for no addition.
        residual_bias: `[D]`, of the linear layer that gave `residual` without it; None for zero.
        weights: the block's parameters, without the bias of its last layer.
        heads: h, which divides D.
        ids: `[B, M]` int64: queries, projection and MLP are computed for these tokens alone, in this order; they attend
            to all tokens. None means all.
        epsilon: added to the variances; 1e-6 as in ViT and MAE.
        attention: backend of attention, see `mmmae_kernels.attention`.

    Returns:
        The stream after attention, and what the MLP adds to it without its last bias: `[B, N, D]` or `[B, M, D]` each.

    Raises:
        ValueError: shapes, types or devices do not fit, a backend is unknown, or it can't serve this call.
    """
    check_rank("x", x, "[B, N, D]")
    if residual is not None:
        check_tensor("residual", residual)
    if not isinstance(weights, BlockWeights):
        raise ValueError(f"weights is {described(weights)}, expected a BlockWeights")
    if ids is not None:
        check_token_ids(ids, x, x.shape[1])
    heads, epsilon = check_whole("heads", heads, least=1), check_epsilon("epsilon", epsilon)
    return run_block(BlockCall(x, residual, residual_bias, weights, heads, ids, epsilon), attention)


class BlockCall(NamedTuple):
    """A call of `transformer_block`, but for its backend of attention, in the order of its definition."""

    x: Tensor
    residual: Tensor | None
    residual_bias: Tensor | None
    weights: BlockWeights
    heads: int
    ids: Tensor | None
    epsilon: float


def run_block(call: BlockCall, attention: str) -> Results:
    """Do what `transformer_block` does, with token numbers that are known to be right."""
    if torch.compiler.is_compiling():
        _check(call)
        return _select(call, attention)(call)
    try:
        kind = _dispatch_key(call, attention)
    except (AttributeError, TypeError):  # of what is no tensor
        _check(call)
        raise
    function = TRANSFORMER_BLOCK.selected.get(kind)
    if function is None:
        _check(call)
        function = TRANSFORMER_BLOCK.selected[kind] = _select(call, attention)
    results: Results = function(call)
    return results


def _dispatch_key(call: BlockCall, attention: str) -> Hashable:
    """Return all that checks and choices look at, but for token numbers."""
    x, residual, residual_bias, weights, heads, ids, _ = call
    return (
        *(heads, attention_backend(attention), dispatch.current_backend(), executors.current() is None),
        *(dispatch.native_unavailable() is None, torch.are_deterministic_algorithms_enabled()),
        *(autocast_dtype(x.device.type), ids is None),
        *(x.dim(), x.shape[-1], x.dtype, x.device, x.numel() == 0),
        *(() if residual is None else (residual.shape == x.shape, residual.dtype, residual.device)),
        None if residual_bias is None else _tensor_key(residual_bias),
        *map(_tensor_key, weights),
    )


_tensor_key = operator.attrgetter("shape", "dtype", "device")


def _check(call: BlockCall) -> None:
    x, w, heads = call.x, call.weights, call.heads
    check_rank("x", x, "[B, N, D]")
    width = x.shape[-1]
    names = ("norm1_weight", "norm1_bias")
    check_norm(x, call.residual, w.norm1_weight, w.norm1_bias, call.residual_bias, names)
    stream = x.new_empty(0, width, dtype=total_dtype(x, call.residual))
    check_norm(stream, None, w.norm2_weight, w.norm2_bias, None, ("norm2_weight", "norm2_bias"))
    if type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(f"heads is {described(heads)}, expected a whole number that divides the width {width}")
    check_rank("fc1_weight", w.fc1_weight, "[H, D]")
    hidden = w.fc1_weight.shape[0]
    for name, outputs, inputs in (("qkv", 3 * width, width), ("proj", width, width), ("fc1", hidden, width)):
        _check_layer(name, stream, getattr(w, f"{name}_weight"), getattr(w, f"{name}_bias"), outputs, inputs)
    check_shape("fc2_weight", w.fc2_weight, (width, hidden))
    check_linear("x", stream.new_empty(0, hidden), w.fc2_weight, None, None, ("fc2_weight", ""))


def _check_layer(name: str, x: Tensor, weight: Tensor, bias: Tensor, outputs: int, inputs: int) -> None:
    check_shape(f"{name}_weight", weight, (outputs, inputs))
    check_tensor(f"{name}_bias", bias)
    check_linear("x", x, weight, bias, None, (f"{name}_weight", f"{name}_bias"))


def _select(call: BlockCall, choice: str) -> Callable[[BlockCall], Results]:
    """Return what runs calls of this kind: one node, or one a sublayer where kernels or attention do not allow it."""
    x, weights = call.x, call.weights
    backend = TRANSFORMER_BLOCK.choose(dispatch.current_backend(), *call)
    dtype = matmul_dtype(weights.qkv_weight)
    q = x.new_empty((0, 0, call.heads, x.shape[-1] // call.heads), dtype=dtype)
    attention_name = ATTENTION.choose(attention_backend(choice), q, q, q, None)
    if backend == "eager" or attention_name not in FLASH:
        return lambda call: _by_sublayer(call, choice)
    dtypes = dtypes_of(x, call.residual, call.residual_bias, *weights)
    plan = Plan(backend, attention_name, dtype, matmuls_for(x, weights.qkv_weight), dtypes)
    apply = fast_apply(FusedBlock)

    def run(call: BlockCall) -> Results:
        x, residual, residual_bias, weights, *numbers = call
        results: Results = apply(plan, *numbers, x, residual, residual_bias, *weights)
        return results

    return run


def _by_sublayer(call: BlockCall, choice: str) -> Results:
    x, residual, residual_bias, w, heads, ids, epsilon = call
    width = x.shape[-1]

    def project(x: Tensor, residual: Tensor | None, bias: Tensor | None, first: int, last: int) -> Results:
        """Return the sum, and the parts first..last of q, k and v of its norm, packed."""
        part = slice(first * width, last * width)
        whole = last - first == 3
        weight, weight_bias = (w.qkv_weight, w.qkv_bias) if whole else (w.qkv_weight[part], w.qkv_bias[part])
        x, out = norm_linear(x, residual, w.norm1_weight, w.norm1_bias, weight, weight_bias, epsilon, bias)
        return x, out.view(*out.shape[:2], last - first, heads, width // heads)

    if ids is None:
        x, qkv = project(x, residual, residual_bias, 0, 3)
        mixed = attention(qkv, backend=choice)
    else:
        x, kv = project(x, residual, residual_bias, 1, 3)
        x, q = project(take(x, ids), None, None, 0, 1)
        mixed = attention(q.squeeze(2), kv, backend=choice)
    attended = linear(mixed.flatten(2), w.proj_weight)
    x, hidden = norm_linear(x, attended, w.norm2_weight, w.norm2_bias, w.fc1_weight, None, epsilon, w.proj_bias)
    return x, gelu_linear(hidden, w.fc2_weight, None, w.fc1_bias)


def _tensors(arguments: Arguments) -> list[tuple[str, Tensor]]:
    weights: BlockWeights = arguments["weights"]
    floats = [(name, tensor) for name, tensor in tensors_of(arguments) if name != "ids"]
    return [*floats, *weights._asdict().items()]


def _native_refuses(arguments: Arguments) -> Reason:
    return refuse_native_product(arguments["weights"].qkv_weight) or native_refuses(_tensors(arguments))


def _triton_refuses(arguments: Arguments) -> Reason:
    return refuse_long_rows(arguments) or triton_refuses(_tensors(arguments))


TRANSFORMER_BLOCK = dispatch.declare(
    "transformer_block",
    transformer_block_reference,
    lambda backend: transformer_block,
    native_refuses=_native_refuses,
    triton_refuses=_triton_refuses,
)
