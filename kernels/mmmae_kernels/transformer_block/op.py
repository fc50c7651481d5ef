"""A pre-norm transformer block as one op, which is a single node of the autograd graph where possible."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..add_layer_norm.op import check_norm, total_dtype
from ..attention.op import attention, attention_backend
from ..autocast import autocast_dtype
from ..checks import check_epsilon, check_rank, check_shape, check_tensor, check_whole, described
from ..gelu_linear.op import gelu_linear
from ..gpu import executors
from ..linear import check_linear, linear
from ..norm_linear.op import norm_linear
from ..operators import fast_apply
from ..patch_embed.op import check_token_ids
from .fused import FusedBlock
from .plan import Plan, make_plan, native_refuses, triton_refuses
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
    """Apply a pre-norm transformer block to `x + residual + residual_bias`, without its last residual addition.

    The output of the block is the sum of the two results and of the bias of the last linear layer. It is left to the
    next block or norm, which adds while it normalises, so that each sum is written to memory once.

    Args:
        x: `[B, N, D]`.
        residual: `[B, N, D]`, or None for no addition.
        residual_bias: `[D]`, the bias of the linear layer that computed `residual` without it; None for zero.
        weights: the parameters of the block, without the bias of its last layer.
        heads: number of heads, which divides D.
        ids: `[B, M]` int64 token numbers. Queries, projection and MLP are computed for these tokens only, in this
            order; they attend to all tokens. None means all tokens.
        epsilon: added to the variances; 1e-6 as in ViT and MAE.
        attention: backend of attention, see `mmmae_kernels.attention`.

    Returns:
        The stream after attention, and the output of the MLP without its last bias, both `[B, N, D]` or `[B, M, D]`.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a backend is unknown, or it does not support this call.

    Example:
        >>> D, H = 8, 16
        >>> shapes = [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (H, D), (H,), (D, H)]
        >>> weights = BlockWeights(*(torch.randn(shape) for shape in shapes))
        >>> last_bias = torch.zeros(D)
        >>> x, mlp_out = transformer_block(torch.randn(2, 5, D), None, None, weights, heads=2)
        >>> x, mlp_out = transformer_block(x, mlp_out, last_bias, weights, heads=2)  # the next block
        >>> (x + mlp_out + last_bias).shape
        torch.Size([2, 5, 8])
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
    """The arguments of `transformer_block_reference`."""

    x: Tensor
    residual: Tensor | None
    residual_bias: Tensor | None
    weights: BlockWeights
    heads: int
    ids: Tensor | None
    epsilon: float


def run_block(call: BlockCall, attention: str) -> Results:
    """Compute `transformer_block` without a check of the token numbers."""
    if torch.compiler.is_compiling():
        _check(call)
        return _select(call, attention)(call)
    try:
        key = _dispatch_key(call, attention)
    except (AttributeError, TypeError):  # an argument is not a tensor: the check says which
        _check(call)
        raise
    function = TRANSFORMER_BLOCK.selected.get(key)
    if function is None:
        _check(call)
        function = TRANSFORMER_BLOCK.selected[key] = _select(call, attention)
    results: Results = function(call)
    return results


def plan_call(call: BlockCall, attention: str) -> Plan | None:
    """Return the plan of a call, the same object for all calls that are alike, or None if it runs by sublayer."""
    key = (plan_call, _dispatch_key(call, attention))
    answer = TRANSFORMER_BLOCK.selected.get(key)
    if answer is None:
        _check(call)
        plan = _make_plan(call, attention)
        answer = TRANSFORMER_BLOCK.selected[key] = lambda: plan
    found: Plan | None = answer()
    return found


def _dispatch_key(call: BlockCall, attention: str) -> Hashable:
    """Return everything that checks and the choice of an implementation depend on, except token numbers."""
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
        raise ValueError(f"heads is {described(heads)}, expected a divisor of the width {width}")
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


def _select(call: BlockCall, attention: str) -> Callable[[BlockCall], Results]:
    """Return the function for calls with this dispatch key: fused, or sublayer by sublayer where there is no plan."""
    plan = _make_plan(call, attention)
    if plan is None:
        return lambda call: _by_sublayer(call, attention)
    apply = fast_apply(FusedBlock)

    def run(call: BlockCall) -> Results:
        x, residual, residual_bias, weights, *numbers = call
        results: Results = apply(plan, *numbers, x, residual, residual_bias, *weights)
        return results

    return run


def _make_plan(call: BlockCall, attention: str) -> Plan | None:
    tensors = (call.x, call.residual, call.residual_bias, *call.weights)
    return make_plan(TRANSFORMER_BLOCK, call, attention, tensors)


def _by_sublayer(call: BlockCall, backend: str) -> Results:
    x, residual, residual_bias, w, heads, ids, epsilon = call
    width = x.shape[-1]

    def project(x: Tensor, residual: Tensor | None, bias: Tensor | None, first: int, last: int) -> Results:
        """Return the sum, and the parts first..last-1 of q, k and v, projected from its norm and packed."""
        part = slice(first * width, last * width)
        whole = last - first == 3
        weight, weight_bias = (w.qkv_weight, w.qkv_bias) if whole else (w.qkv_weight[part], w.qkv_bias[part])
        x, out = norm_linear(x, residual, w.norm1_weight, w.norm1_bias, weight, weight_bias, epsilon, bias)
        return x, out.view(*out.shape[:2], last - first, heads, width // heads)

    if ids is None:
        x, qkv = project(x, residual, residual_bias, 0, 3)
        mixed = attention(qkv, backend=backend)
    else:
        x, kv = project(x, residual, residual_bias, 1, 3)
        x, q = project(take(x, ids), None, None, 0, 1)
        mixed = attention(q.squeeze(2), kv, backend=backend)
    attended = linear(mixed.flatten(2), w.proj_weight)
    x, hidden = norm_linear(x, attended, w.norm2_weight, w.norm2_bias, w.fc1_weight, None, epsilon, w.proj_bias)
    return x, gelu_linear(hidden, w.fc2_weight, None, w.fc1_bias)


TRANSFORMER_BLOCK = dispatch.declare(
    "transformer_block",
    transformer_block_reference,
    lambda backend: transformer_block,
    native_refuses=native_refuses,
    triton_refuses=triton_refuses,
)
