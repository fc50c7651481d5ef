"""What the operators of masking cost."""

from __future__ import annotations

from collections.abc import Callable

MACS: dict[str, Callable[..., int]] = {}
WITHOUT_MACS = ("mmmae::philox_noise", "mmmae::random_masking")
LAUNCHES: dict[str, Callable[..., int]] = {}
