"""Cases of `decoder_tokens`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import mmmae_kernels
from mmmae_kernels.decoder_tokens.reference import decoder_tokens_reference
from tests.cases.case import Case, Inputs, draw, draw_ids


def decoder_tokens_cases() -> Iterator[Case]:
    def case(
        name: str, batch: int, tokens: int, keep: int, width: int, *, strided: str = "as they come", small: bool = False
    ) -> Case:
        def make() -> Inputs:
            return {
                "visible": draw(batch, keep, width),
                "mask_token": draw(width, seed=1),
                "ids_restore": draw_ids(batch, tokens, tokens) if tokens else torch.empty(batch, 0, dtype=torch.int64),
                "position": draw(tokens, width, seed=2),
            }

        names = ("visible", "mask_token", "ids_restore", "position")
        return Case(
            "decoder_tokens",
            name,
            make,
            lambda i: [mmmae_kernels.decoder_tokens(*(i[name] for name in names))],
            lambda i: [decoder_tokens_reference(*(i[name] for name in names))],
            small,
            products=frozenset({"visible"}),
            strided=strided,
        )

    yield case("some visible", 2, 13, 4, 72, small=True)
    yield case("odd width", 3, 9, 5, 129, small=True)
    yield case("gradient expanded", 2, 9, 5, 33, strided="expanded", small=True)
    yield case("gradient transposed", 2, 9, 5, 33, strided="transposed", small=True)
    yield case("samples past a block", 5, 9, 5, 64, small=True)
    yield case("none visible", 2, 9, 0, 64, small=True)
    yield case("all visible", 2, 9, 9, 64, small=True)
    for tokens in (1, 7, 63, 65, 783):
        yield case(f"{tokens} tokens", 2, tokens, (tokens + 3) // 4, 64)
    for width in (1, 192, 768, 1000):
        yield case(f"width {width}", 2, 13, 4, width)
    yield case("no sample", 0, 9, 4, 64)


CASES = [*decoder_tokens_cases()]
