"""Cases of `gelu_linear`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import mmmae_kernels
from mmmae_kernels.gelu_linear.reference import gelu_linear_reference
from tests.cases.case import LINEAR_SHAPES, SMALL_LINEAR, Case, Inputs, draw

# what a case says -> the input that it leaves out, and dtypes that are not converted
FORMS: dict[str, tuple[str, dict[str, torch.dtype]]] = {
    "": ("hidden_bias", {}),
    ", with a bias of hidden": ("bias", {}),
    ", with a float32 bias of hidden": ("bias", {"hidden_bias": torch.float32}),
}


def draw_inputs(shape: tuple[int, ...], width: int, without: str) -> Inputs:
    """Return the inputs of a case."""
    hidden = shape[-1]
    inputs: Inputs = {
        "x": draw(*shape),
        "weight": draw(width, hidden, seed=4) / hidden**0.5,
        "bias": draw(width, seed=5),
        "hidden_bias": draw(hidden, seed=6),
    }
    return {**inputs, without: None}


def run(gelu_linear: Callable[..., Tensor], i: Inputs) -> Sequence[Tensor]:
    return [gelu_linear(3 * i["x"], i["weight"], i["bias"], i["hidden_bias"])]


CASES = [
    Case(
        "gelu_linear",
        name + form,
        functools.partial(draw_inputs, shape, width, without),
        functools.partial(run, mmmae_kernels.gelu_linear),
        functools.partial(run, gelu_linear_reference),
        small=name in SMALL_LINEAR,
        kept=kept,
        products=frozenset({"x"}),
    )
    for name, (shape, width) in LINEAR_SHAPES.items()
    for form, (without, kept) in FORMS.items()
]
