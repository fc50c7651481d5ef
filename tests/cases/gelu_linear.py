"""Cases of `gelu_linear`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import mmmae_kernels
from mmmae_kernels.gelu_linear.reference import gelu_linear_reference
from tests.cases.case import Case, Inputs, draw


def gelu_linear_cases() -> Iterator[Case]:
    def draw_inputs(shape: tuple[int, ...], width: int) -> Inputs:
        hidden = shape[-1]
        return {
            "x": draw(*shape),
            "weight": draw(width, hidden, seed=4) / hidden**0.5,
            "bias": draw(width, seed=5),
            "hidden_bias": draw(hidden, seed=6),
        }

    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "odd": ((2, 5, 72), 33),
        "past a block": ((2, 9, 528), 33),
        "wide": ((2, 7, 768), 1000),
        "no row": ((0, 8), 4),
    }
    for name, (shape, width) in shapes.items():
        make = functools.partial(draw_inputs, shape, width)
        yield Case(
            "gelu_linear",
            name,
            make,
            lambda i: [mmmae_kernels.gelu_linear(3 * i["x"], i["weight"], i["bias"])],
            lambda i: [gelu_linear_reference(3 * i["x"], i["weight"], i["bias"])],
            small=name in ("odd", "past a block"),
            constant=frozenset({"hidden_bias"}),
        )
        for what, kept in (("a bias", {}), ("a float32 bias", {"hidden_bias": torch.float32})):
            yield Case(
                "gelu_linear",
                f"{name}, with {what} of hidden",
                make,
                lambda i: [mmmae_kernels.gelu_linear(3 * i["x"], i["weight"], None, i["hidden_bias"])],
                lambda i: [gelu_linear_reference(3 * i["x"], i["weight"], None, i["hidden_bias"])],
                small=name in ("odd", "past a block"),
                kept=kept,
                constant=frozenset({"bias"}),
            )


CASES = [*gelu_linear_cases()]
