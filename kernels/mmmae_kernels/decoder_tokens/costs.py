"""What the operators of the decoder's input cost: two kernels backward, the second of which sums up."""

from __future__ import annotations

from collections.abc import Callable

MACS: dict[str, Callable[..., int]] = {}
WITHOUT_MACS = ("mmmae::decoder_tokens", "mmmae::decoder_tokens_backward")
LAUNCHES: dict[str, Callable[..., int]] = {"mmmae::decoder_tokens_backward": lambda *arguments: 2}
