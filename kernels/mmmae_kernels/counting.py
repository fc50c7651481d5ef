"""What the operators cost, for those who count: multiply-adds for torch's counter and fvcore's, and launches.

The formulas take an operator's arguments, with shapes for tensors. Importing the package tells them to torch's counter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import attention, masked_loss, patch_embed  # noqa: F401  # they define the operators


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


def attention_macs(projected: Sequence[Sequence[int]], *rest: object) -> int:
    """Scores and mix of q, k and v `[B, N, h, d]`, given one by one or packed; absent keys count too."""
    first, last = projected[0], projected[-1]
    return 2 * math.prod((first[0], first[1], last[1], *first[-2:]))


def attention_backward_macs(grad: object, projected: Sequence[Sequence[int]], *rest: object) -> int:
    """The scores again, and a product for each gradient: of the shares and of q, k and v."""
    return attention_macs(projected) // 2 * 5


def linear_macs(x: Sequence[int], weight: Sequence[int], *rest: object) -> int:
    """Rows `[..., H]` with `weight [D, H]`."""
    return math.prod(x) * weight[0]


MAC_FORMULAS: dict[str, Callable[..., int]] = {
    "mkldnn::_linear_pointwise": linear_macs,
    "mmmae::attention": attention_macs,
    "mmmae::attention_backward": attention_backward_macs,
    "mmmae::patch_embed": patch_embed_macs,
    "mmmae::patch_embed_backward": patch_embed_backward_macs,
    "mmmae::patch_l2_loss": patch_l2_loss_macs,
}

# Operators that move data, draw numbers, or multiply no matrices.
WITHOUT_MACS = (
    "mmmae::add_layer_norm",
    "mmmae::add_layer_norm_backward",
    "mmmae::decoder_tokens",
    "mmmae::decoder_tokens_backward",
    "mmmae::gather_patches",
    "mmmae::gelu",
    "mmmae::gelu_backward",
    "mmmae::masked_l2_loss",
    "mmmae::philox_noise",
    "mmmae::random_masking",
    "mmmae::scatter_patches",
)


def patch_embed_backward_launches(
    grad: object, volume: object, weight: object, ids: object, needs: Sequence[bool], *rest: object
) -> int:
    """Each gradient's kernels and sums of partial sums; torch's zeros, sorts and searches where tokens may repeat."""
    by_volume = 2 if ids is None else 12
    by_weight = (3 if needs[2] else 2) if needs[1] else int(needs[2])
    return needs[0] * by_volume + by_weight + needs[3] * (1 if ids is None else 4)


def loss_launches(*arguments: object) -> int:
    """The comparison and the mean; the sum of weights where there are some."""
    return 2 + (arguments[3] is not None)


def patch_l2_loss_launches(*arguments: object) -> int:
    """As of a given target, and the embedding of a normalised one."""
    return 2 + (arguments[5] is not None) + bool(arguments[6])


# Kernels that an operator starts on a GPU, where that is not one; from its arguments.
LAUNCHES: dict[str, Callable[..., int]] = {
    "mmmae::add_layer_norm_backward": lambda *arguments: 2,
    "mmmae::decoder_tokens_backward": lambda *arguments: 2,
    "mmmae::gelu_backward": lambda *arguments: 1 + (arguments[2] is not None),
    "mmmae::masked_l2_loss": loss_launches,
    "mmmae::patch_embed_backward": patch_embed_backward_launches,
    "mmmae::patch_l2_loss": patch_l2_loss_launches,
}


def launches_of(operator: str, arguments: Sequence[object]) -> int:
    """How many kernels a call of `operator`, `aten::mm` for instance, starts on a GPU."""
    return LAUNCHES[operator](*arguments) if operator in LAUNCHES else 1


def _as_flops(formula: Callable[..., int]) -> Callable[..., int]:
    """Torch counts two operations a multiply-add."""

    def flops(*shapes: Any, out_shape: object = None, **options: object) -> int:
        return 2 * formula(*shapes)

    return flops


for _name, _formula in MAC_FORMULAS.items():
    _namespace, _operator = _name.split("::")
    if hasattr(getattr(torch.ops, _namespace), _operator):  # not every build of torch has oneDNN
        register_flop_formula(getattr(getattr(torch.ops, _namespace), _operator))(_as_flops(_formula))
