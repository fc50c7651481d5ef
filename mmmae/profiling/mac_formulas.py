"""Multiply-adds of operators that torch's counter or fvcore's lacks, one formula for both, and which have none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def attention_macs(query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: object) -> int:
    """Scores and mix of `[..., Nq, d]` with `[..., Nk, d]` and `[..., Nk, dv]`; absent keys count too."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def einsum_macs(equation: str, operands: Sequence[Sequence[int]], *rest: object) -> int:
    """A product of two operands: one multiply-add for each combination of indices."""
    names = equation.replace(" ", "").split("->")[0].split(",")
    if len(names) != 2:
        raise RuntimeError(f"einsum {equation!r} has {len(names)} operands, the formula is for 2")
    sizes: dict[str, int] = {}
    for letters, shape in zip(names, operands, strict=True):
        sizes |= zip(letters, shape, strict=True)
    return math.prod(sizes.values())


def patch_embed_macs(
    volume: Sequence[int], weight: Sequence[int], bias: object, ids: Sequence[int] | None, *rest: object
) -> int:
    """Each asked patch `[C, pt, ph, pw]` with `weight [D, C, pt, ph, pw]`; all patches without `ids [B, K]`."""
    sizes = zip(volume[2:], weight[2:], strict=True)
    tokens = math.prod(size // part for size, part in sizes) if ids is None else ids[1]
    return volume[0] * tokens * math.prod(weight)


def patch_embed_backward_macs(
    grad: Sequence[int],
    volume: Sequence[int],
    weight: Sequence[int],
    ids: object,
    needs: Sequence[bool],
    *rest: object,
) -> int:
    """As many again for the gradient by the volume and for that by the weight, if they are asked for."""
    return (needs[0] + needs[1]) * grad[0] * grad[1] * math.prod(weight)


def patch_l2_loss_macs(
    prediction: Sequence[int], volume: Sequence[int], weight: Sequence[int], bias: object, *rest: object
) -> int:
    """The embedding of the patches that are predicted."""
    return prediction[0] * prediction[1] * math.prod(weight)


def no_macs(*arguments: object) -> int:
    """Moves data, or draws numbers."""
    return 0


# From an operator's arguments, with shapes for tensors. An operator of mmmae_kernels has to be here.
MAC_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::scaled_dot_product_attention": attention_macs,
    "aten::_scaled_dot_product_flash_attention_for_cpu": attention_macs,
    "aten::_scaled_dot_product_flash_attention": attention_macs,
    "aten::_scaled_dot_product_efficient_attention": attention_macs,
    "aten::_scaled_dot_product_cudnn_attention": attention_macs,
    "aten::einsum": einsum_macs,
    "mmmae::add_layer_norm": no_macs,
    "mmmae::add_layer_norm_backward": no_macs,
    "mmmae::decoder_tokens": no_macs,
    "mmmae::decoder_tokens_backward": no_macs,
    "mmmae::gather_patches": no_macs,
    "mmmae::gelu_backward": no_macs,
    "mmmae::masked_l2_loss": no_macs,
    "mmmae::masked_l2_loss_backward": no_macs,
    "mmmae::patch_embed": patch_embed_macs,
    "mmmae::patch_embed_backward": patch_embed_backward_macs,
    "mmmae::patch_l2_loss": patch_l2_loss_macs,
    "mmmae::philox_noise": no_macs,
    "mmmae::random_masking": no_macs,
    "mmmae::scatter_patches": no_macs,
}


def patch_embed_backward_launches(
    grad: object, volume: object, weight: object, ids: object, needs: Sequence[bool], *rest: object
) -> int:
    """Weight and bias in one pass, and a sum of partial sums each; the position's by a sort and sums of its runs."""
    return needs[0] + 3 * (needs[1] or needs[2]) + (1 if ids is None else 4) * needs[3]


# Kernels that an operator starts on a GPU, where that is not one; from its arguments.
LAUNCHES: dict[str, Callable[..., int]] = {
    "mmmae::add_layer_norm_backward": lambda *arguments: 2,
    "mmmae::decoder_tokens_backward": lambda *arguments: 2,
    "mmmae::masked_l2_loss": lambda *arguments: 2,
    "mmmae::patch_embed_backward": patch_embed_backward_launches,
    "mmmae::patch_l2_loss": lambda *arguments: 2,
}


def launches_of(operator: str, arguments: Sequence[object]) -> int:
    """How many kernels a call of `operator`, `aten::mm` for instance, starts on a GPU."""
    return LAUNCHES[operator](*arguments) if operator in LAUNCHES else 1


# ATen operators without matrix work; those that torch tags as pointwise are not listed.
WITHOUT_MACS = {
    *("aminmax", "any", "linalg_vector_norm", "mean", "sum", "var"),
    *("avg_pool2d", "native_group_norm", "native_layer_norm", "nll_loss_forward", "nll_loss2d_forward"),
    *("_log_softmax", "_softmax", "nonzero", "sort", "upsample_bilinear2d"),
    *("_to_copy", "cat", "copy_", "embedding", "gather", "index", "index_select", "scatter", "stack"),
    *("arange", "full", "full_like", "new_full", "new_ones", "new_zeros", "ones", "ones_like", "scalar_tensor"),
    *("zeros", "zeros_like"),
}
ALLOCATIONS = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
