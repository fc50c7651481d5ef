"""Costs of the operators of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def attention_macs(projected: Sequence[Sequence[int]], *rest: object) -> int:
    """Return the multiply-adds of scores and weighted values of separate or packed q, k and v, absent keys included."""
    first, last = projected[0], projected[-1]
    return 2 * math.prod((first[0], first[1], last[1], *first[-2:]))


def attention_backward_macs(grad: object, projected: Sequence[Sequence[int]], *rest: object) -> int:
    """Return the multiply-adds of five products: the scores again, and the gradients of scores, q, k and v."""
    return attention_macs(projected) // 2 * 5


MACS: dict[str, Callable[..., int]] = {
    "mmmae::attention": attention_macs,
    "mmmae::attention_backward": attention_backward_macs,
}
WITHOUT_MACS: tuple[str, ...] = ()
LAUNCHES: dict[str, Callable[..., int]] = {}
