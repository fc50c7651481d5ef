"""Cases of `transformer_block`."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from mmmae_kernels import BlockWeights, transformer_block
from mmmae_kernels.transformer_block.reference import transformer_block_reference
from tests.cases.case import Case, Inputs, draw, draw_ids, with_half_stream

# name -> batch, tokens, width, heads, hidden width
SHAPES = {
    "odd": (2, 5, 24, 3, 17),
    "past a block": (2, 33, 72, 2, 130),
    "one token": (3, 1, 16, 1, 16),
    "no sample": (0, 4, 16, 2, 8),
}
FORMS = ("", ", without residual", ", without residual_bias", ", of some tokens")


def block_case(shape: str, form: str) -> Case:
    """Return the case of a shape and a form."""
    batch, tokens, width, heads, hidden = SHAPES[shape]

    def make() -> Inputs:
        weights = draw_weights(width, hidden)
        return {
            "x": draw(batch, tokens, width),
            "residual": None if form == ", without residual" else draw(batch, tokens, width, seed=1),
            "residual_bias": None if "without" in form else draw(width, seed=2),
            "ids": draw_ids(batch, (tokens + 1) // 2, tokens) if form == ", of some tokens" else None,
            **{name: weights[name] for name in BlockWeights._fields},
        }

    def arguments(i: Inputs) -> tuple[Any, ...]:
        weights = BlockWeights(**{name: i[name] for name in BlockWeights._fields})
        return i["x"], i["residual"], i["residual_bias"], weights, heads, i["ids"]

    return Case(
        "transformer_block",
        shape + form,
        make,
        lambda i: transformer_block(*arguments(i)),
        lambda i: transformer_block_reference(*(*arguments(i), 1e-6)),
        small=shape == "odd",
        products=frozenset({"residual"}),
    )


def draw_weights(width: int, hidden: int) -> dict[str, Tensor]:
    """Return the weights of a block, layers scaled so that they keep the size of their input."""
    layers = {"qkv": (3 * width, width), "proj": (width, width), "fc1": (hidden, width), "fc2": (width, hidden)}
    weights = {}
    for place, (layer, (rows, columns)) in enumerate(layers.items()):
        weights[f"{layer}_weight"] = draw(rows, columns, seed=10 + place) / columns**0.5
        weights[f"{layer}_bias"] = draw(rows, seed=20 + place)
    for place, (norm, kind) in enumerate(itertools.product(("norm1", "norm2"), ("weight", "bias"))):
        weights[f"{norm}_{kind}"] = draw(width, seed=30 + place)
    return weights


CASES = [block_case(shape, form) for shape in SHAPES for form in FORMS]
CASES += [with_half_stream(block_case("odd", form)) for form in FORMS]
