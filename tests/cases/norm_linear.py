"""Cases of `norm_linear`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from torch import Tensor

import mmmae_kernels
from mmmae_kernels.norm_linear.reference import norm_linear_reference
from tests.cases.case import LINEAR_SHAPES, SMALL_LINEAR, Case, Inputs, draw, with_half_stream

# what a case says -> inputs that it leaves out
FORMS = {"": ["hidden_bias"], ", with a bias of residual": ["bias"], ", without residual": ["residual", "hidden_bias"]}


def draw_inputs(shape: tuple[int, ...], width: int, without: Sequence[str]) -> Inputs:
    """Return the inputs of a case."""
    hidden = shape[-1]
    inputs: Inputs = {
        "x": draw(*shape),
        "residual": draw(*shape, seed=1),
        "norm_weight": draw(hidden, seed=2),
        "norm_bias": draw(hidden, seed=3),
        "weight": draw(width, hidden, seed=4) / hidden**0.5,
        "bias": draw(width, seed=5),
        "hidden_bias": draw(hidden, seed=6),
    }
    return {**inputs, **dict.fromkeys(without)}


def run(norm_linear: Callable[..., tuple[Tensor, Tensor]], i: Inputs) -> Sequence[Tensor]:
    """Return the sum and the layer's output; without residual the sum is `x` itself and is left out."""
    weights = i["norm_weight"], i["norm_bias"], i["weight"], i["bias"]
    results = norm_linear(i["x"], i["residual"], *weights, 1e-6, i["hidden_bias"])
    return results if i["residual"] is not None else results[1:]


def run_without_sum(norm_linear: Callable[..., tuple[Tensor, Tensor]], i: Inputs) -> Sequence[Tensor]:
    """Return the layer's output alone, so that the sum gets no gradient."""
    return run(norm_linear, i)[-1:]


CASES = [
    Case(
        "norm_linear",
        name + form,
        functools.partial(draw_inputs, shape, width, without),
        functools.partial(run, mmmae_kernels.norm_linear),
        functools.partial(run, norm_linear_reference),
        small=name in SMALL_LINEAR,
        products=frozenset({"residual"}),
    )
    for name, (shape, width) in LINEAR_SHAPES.items()
    for form, without in FORMS.items()
]
CASES += [
    dataclasses.replace(
        case,
        name=f"{case.name}, the sum is not read",
        call=functools.partial(run_without_sum, mmmae_kernels.norm_linear),
        define=functools.partial(run_without_sum, norm_linear_reference),
    )
    for case in CASES
    if case.name == "odd, with a bias of residual"
]
CASES += [with_half_stream(case) for case in CASES if case.name.startswith("odd, with a bias of residual")]
