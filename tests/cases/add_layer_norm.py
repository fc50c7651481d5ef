"""Cases of `add_layer_norm`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import mmmae_kernels
from mmmae_kernels.add_layer_norm.reference import add_layer_norm_reference
from tests.cases.case import Case, Inputs, draw


def add_layer_norm_cases() -> Iterator[Case]:
    def case(
        name: str,
        shape: tuple[int, ...],
        *,
        residual: bool = True,
        shifted: bool = False,
        shift_dtype: torch.dtype | None = None,
        products: tuple[str, ...] = ("residual",),
        norm_alone: bool = False,
        strided: str = "as they come",
        small: bool = False,
    ) -> Case:
        def make() -> Inputs:
            return {
                "x": draw(*shape),
                "residual": draw(*shape, seed=1) if residual else None,
                "weight": draw(shape[-1], seed=2),
                "bias": draw(shape[-1], seed=3),
                "residual_bias": draw(shape[-1], seed=4) if shifted else None,
            }

        def arguments(i: Inputs) -> tuple[Any, ...]:
            return i["x"], i["residual"], i["weight"], i["bias"], 1e-6, i["residual_bias"]

        first = 0 if residual and not norm_alone else 1
        return Case(
            "add_layer_norm",
            name,
            make,
            lambda i: list(mmmae_kernels.add_layer_norm(*arguments(i)))[first:],
            lambda i: list(add_layer_norm_reference(*arguments(i)))[first:],
            small,
            {} if shift_dtype is None else {"residual_bias": shift_dtype},
            frozenset(products),
            strided=strided,
        )

    yield case("with residual", (2, 5, 72), small=True)
    yield case("without residual", (3, 64), residual=False, small=True)
    yield case("odd width", (2, 3, 129), small=True)
    yield case("several warps", (2, 1041), small=True)
    both = ("residual", "residual_bias")
    yield case("with residual and its bias", (2, 9, 521), shifted=True, products=both, small=True)
    yield case("with a float32 bias", (2, 3, 40), shifted=True, shift_dtype=torch.float32, small=True)
    yield case("the sum is not read", (2, 5, 72), shifted=True, norm_alone=True, small=True)
    every = ("x", "residual")
    yield case("all in autocast's dtype", (2, 5, 72), shifted=True, products=every, norm_alone=True, small=True)
    yield case("gradient expanded", (2, 3, 40), strided="expanded", small=True)
    yield case("gradient transposed", (2, 3, 40), strided="transposed", small=True)
    for rows in (1, 7, 63, 65, 783):
        yield case(f"{rows} rows", (rows, 64))
    for width in (3, 192, 768, 1000):
        yield case(f"width {width}", (2, 7, width), shifted=width > 192)
    yield case("one row", (64,))
    yield case("no row", (0, 5, 64), shifted=True)


CASES = [*add_layer_norm_cases()]
