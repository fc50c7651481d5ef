"""What the operators of attention cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def attention_macs(projected: Sequence[Sequence[int]], *rest: object) -> int:
    """Scores and mix of q, k and v `[B, N, h, d]`, given one by one or packed; absent keys count too."""
    first, last = projected[0], projected[-1]
    return 2 * math.prod((first[0], first[1], last[1], *first[-2:]))


def attention_backward_macs(grad: object, projected: Sequence[Sequence[int]], *rest: object) -> int:
    """The scores again, and a product for each gradient: of the shares and of q, k and v."""
    return attention_macs(projected) // 2 * 5


MACS: dict[str, Callable[..., int]] = {
    "mmmae::attention": attention_macs,
    "mmmae::attention_backward": attention_backward_macs,
}
WITHOUT_MACS: tuple[str, ...] = ()
LAUNCHES: dict[str, Callable[..., int]] = {}
