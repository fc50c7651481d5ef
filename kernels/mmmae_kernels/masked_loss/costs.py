"""What the operators of the masked losses cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def patch_l2_loss_macs(
    prediction: Sequence[int], volume: Sequence[int], weight: Sequence[int], bias: object, *rest: object
) -> int:
    """The embedding of the patches that are predicted."""
    return prediction[0] * prediction[1] * math.prod(weight)


def loss_launches(*arguments: object) -> int:
    """The comparison and the mean; the sum of weights where there are some."""
    return 2 + (arguments[3] is not None)


def patch_l2_loss_launches(*arguments: object) -> int:
    """As of a given target, and the embedding of a normalised one."""
    return 2 + (arguments[5] is not None) + bool(arguments[6])


MACS: dict[str, Callable[..., int]] = {"mmmae::patch_l2_loss": patch_l2_loss_macs}
WITHOUT_MACS = ("mmmae::masked_l2_loss",)
LAUNCHES: dict[str, Callable[..., int]] = {
    "mmmae::masked_l2_loss": loss_launches,
    "mmmae::patch_l2_loss": patch_l2_loss_launches,
}
