"""Cases of the conditioning step."""

from __future__ import annotations

import torch

from mmmae_kernels.transformer_block.conditioning import (
    ConditioningCall,
    ConditioningWeights,
    conditioning_reference,
    run_conditioning,
)
from tests.cases.case import Case, Inputs, draw, with_half_stream

# name -> batch, tokens, vectors, width, heads
SHAPES = {
    "odd": (2, 5, 3, 24, 3),
    "past a block": (2, 33, 2, 72, 3),
    "one token": (2, 1, 1, 16, 1),
    "no sample": (0, 4, 2, 16, 2),
}
FORMS = ("", ", without residual", ", without residual_bias")


def conditioning_case(shape: str, form: str) -> Case:
    """Return the case of a shape and a form; each sample lacks some of the vectors, if there are several."""
    batch, tokens, guides, width, heads = SHAPES[shape]

    def make() -> Inputs:
        sizes = ((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,))
        weights = [draw(*size, seed=10 + place) / size[-1] ** 0.5 for place, size in enumerate(sizes)]
        return {
            "x": draw(batch, tokens, width),
            "residual": None if form == ", without residual" else draw(batch, tokens, width, seed=1),
            "residual_bias": None if form else draw(width, seed=2),
            "vectors": draw(batch, guides, width, seed=3),
            "present": torch.arange(batch * guides).view(batch, guides) % 3 != 1,
            **dict(zip(ConditioningWeights._fields, weights, strict=True)),
        }

    def arguments(i: Inputs) -> ConditioningCall:
        weights = ConditioningWeights(*(i[name] for name in ConditioningWeights._fields))
        streams = (i["x"], i["residual"], i["residual_bias"], i["vectors"])
        return ConditioningCall(*streams, i["present"], weights, heads, 1e-6)

    first = 1 if form == ", without residual" else 0  # the sum is then `x` itself and is left out
    return Case(
        "conditioning",
        shape + form,
        make,
        lambda i: run_conditioning(arguments(i), "auto")[first:],
        lambda i: conditioning_reference(*arguments(i))[first:],
        small=shape == "odd",
        products=frozenset({"residual", "vectors"}),
    )


CASES = [conditioning_case(shape, form) for shape in SHAPES for form in FORMS]
CASES += [with_half_stream(conditioning_case("odd", form)) for form in ("", ", without residual")]
