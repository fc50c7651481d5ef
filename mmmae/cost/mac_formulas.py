"""Multiply-adds of operators that torch's counter or fvcore's does not know, and the operators that have none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mmmae_kernels import counting as kernels


def attention_macs(query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: object) -> int:
    """Count attention from `[..., Nq, d]` to `[..., Nk, d]` and `[..., Nk, dv]`; absent keys count too."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def attention_backward_macs(grad: object, *projected: Sequence[int]) -> int:
    """Count the backward pass of attention: five products where forward has two, for scores are computed again."""
    return attention_macs(*projected) // 2 * 5


def einsum_macs(equation: str, operands: Sequence[Sequence[int]], *rest: object) -> int:
    """Count a product of two operands: one multiply-add for each combination of indices."""
    names = equation.replace(" ", "").split("->")[0].split(",")
    if len(names) != 2:
        raise RuntimeError(f"einsum {equation!r} has {len(names)} operands, expected 2")
    sizes: dict[str, int] = {}
    for letters, shape in zip(names, operands, strict=True):
        sizes |= zip(letters, shape, strict=True)
    return math.prod(sizes.values())


def no_macs(*arguments: object) -> int:
    """Return 0, for operators that move data or draw numbers."""
    return 0


# Formulas take an operator's arguments, with shapes in place of tensors. All operators of mmmae_kernels are here.
MAC_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::scaled_dot_product_attention": attention_macs,
    "aten::_scaled_dot_product_flash_attention_for_cpu": attention_macs,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": attention_backward_macs,
    "aten::_scaled_dot_product_flash_attention": attention_macs,
    "aten::_scaled_dot_product_efficient_attention": attention_macs,
    "aten::_scaled_dot_product_cudnn_attention": attention_macs,
    "aten::einsum": einsum_macs,
    **kernels.MAC_FORMULAS,
    **dict.fromkeys(kernels.WITHOUT_MACS, no_macs),
}


# ATen operators without matrix products; those that torch tags as pointwise need not be listed.
WITHOUT_MACS = {
    *("aminmax", "any", "linalg_vector_norm", "logsumexp", "mean", "sum", "var"),
    *("avg_pool2d", "native_group_norm", "native_layer_norm", "nll_loss_forward", "nll_loss2d_forward"),
    *("_log_softmax", "_softmax", "nonzero", "sort", "upsample_bilinear2d"),
    *("_to_copy", "cat", "copy_", "embedding", "gather", "index", "index_select", "scatter", "stack"),
    *("arange", "full", "full_like", "new_full", "new_ones", "new_zeros", "ones", "ones_like", "scalar_tensor"),
    *("zeros", "zeros_like"),
}
ALLOCATIONS = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
