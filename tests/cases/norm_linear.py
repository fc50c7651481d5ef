"""Cases of `norm_linear`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import mmmae_kernels
from mmmae_kernels.norm_linear.reference import norm_linear_reference
from tests.cases.case import Case, Inputs, draw


def norm_linear_cases() -> Iterator[Case]:
    def draw_inputs(shape: tuple[int, ...], width: int) -> Inputs:
        hidden = shape[-1]
        return {
            "x": draw(*shape),
            "residual": draw(*shape, seed=1),
            "norm_weight": draw(hidden, seed=2),
            "norm_bias": draw(hidden, seed=3),
            "weight": draw(width, hidden, seed=4) / hidden**0.5,
            "bias": draw(width, seed=5),
            "hidden_bias": draw(hidden, seed=6),
        }

    def with_residual(i: Inputs) -> tuple[Any, ...]:
        return i["x"], i["residual"], i["norm_weight"], i["norm_bias"], i["weight"], i["bias"], 1e-6

    def alone(i: Inputs) -> tuple[Any, ...]:
        return with_residual({**i, "residual": None})

    def shifted(i: Inputs) -> tuple[Any, ...]:
        return *with_residual({**i, "bias": None}), i["hidden_bias"]

    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "odd": ((2, 5, 72), 33),
        "past a block": ((2, 9, 528), 33),
        "wide": ((2, 7, 768), 1000),
        "no row": ((0, 8), 4),
    }
    for name, (shape, width) in shapes.items():
        make = functools.partial(draw_inputs, shape, width)
        yield Case(
            "norm_linear",
            name,
            make,
            lambda i: mmmae_kernels.norm_linear(*with_residual(i)),
            lambda i: norm_linear_reference(*with_residual(i)),
            small=name in ("odd", "past a block"),
            constant=frozenset({"hidden_bias"}),
        )
        yield Case(
            "norm_linear",
            f"{name}, with a bias of residual",
            make,
            lambda i: mmmae_kernels.norm_linear(*shifted(i)),
            lambda i: norm_linear_reference(*shifted(i)),
            small=name in ("odd", "past a block"),
            constant=frozenset({"bias"}),
        )
        yield Case(
            "norm_linear",
            f"{name}, without residual",
            make,
            lambda i: [mmmae_kernels.norm_linear(*alone(i))[1]],
            lambda i: [norm_linear_reference(*alone(i))[1]],
            small=name in ("odd", "past a block"),
            constant=frozenset({"residual", "hidden_bias"}),
        )


CASES = [*norm_linear_cases()]
