"""What attention by the native kernels refuses, before anything is written."""

from __future__ import annotations

import math

import pytest
import torch

from mmmae_kernels import attention
from mmmae_kernels.attention.backends.native import attention_backward, attention_forward

pytestmark = pytest.mark.usefixtures("library", "poisoned")
SHAPES = {"q": (2, 3, 2, 8), "k": (2, 4, 2, 8), "v": (2, 4, 2, 8)}


def right_inputs() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(2, 3, 2, 9)}, r"k has shape \[2, 4, 2, 8\]"),
        ({"q": torch.zeros(3, 2, 8)}, r"q has shape \[3, 2, 8\]"),
        ({name: torch.zeros(*shape[:3], 257) for name, shape in SHAPES.items()}, "head width is 257"),
        ({name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}, "float64"),
        ({"k": torch.zeros(1, 4, 2, 8)}, r"k has shape \[1, 4, 2, 8\]"),
        ({"k": torch.zeros(2, 4, 2, 8, device="meta")}, "k .*meta"),
        ({"v": torch.zeros(2, 5, 2, 8)}, r"v has shape \[2, 5, 2, 8\]"),
        ({"v": torch.zeros(2, 4, 2, 8).half()}, "v .*float16"),
        ({"key_present": torch.zeros(2, 3, dtype=torch.bool)}, r"key_present has shape \[2, 3\]"),
        ({"key_present": torch.full((2, 4), math.nan)}, "key_present .*float32"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        attention(**{**right_inputs(), **wrong}, backend="native")


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(2, 4, 2, 8), r"of q is torch.float32 \[2, 4, 2, 8\], expected torch.float32 \[2, 3, 2, 8\]"),
        (0, torch.ones(2, 3, 8, 2).transpose(2, 3), r"strides .*\(48, 16, 1, 2\).*, expected 1 in the last axis"),
        (1, torch.ones(2, 3, 2, 8), r"of k is torch.float32 \[2, 3, 2, 8\], expected torch.float32 \[2, 4, 2, 8\]"),
        (1, torch.ones(2, 4, 2, 8).half(), "of k is torch.float16 .*, expected torch.float32"),
        (2, torch.ones(2, 4, 8, 2).transpose(2, 3), "expected 1 in the last axis"),
        (2, torch.ones(2, 4, 2, 8).double(), "of v is torch.float64 .*, expected torch.float32"),
    ],
)
def test_gradients_that_can_not_be_written_to_are_refused(place, wrong, message):
    q, k, v = right_inputs().values()
    out, lse = attention_forward(q, k, v)
    gradients = [torch.ones_like(tensor) for tensor in (q, k, v)]
    gradients[place] = wrong
    with pytest.raises(ValueError, match=message):
        attention_backward(q, (q, k, v), None, out, lse, gradients)
    assert all(bool((gradient == 1).all()) for gradient in gradients)


@pytest.mark.parametrize("wrong", ["grad", "out", "lse"])
def test_backward_refuses_a_wrong_dtype(wrong):
    q, k, v = right_inputs().values()
    out, lse = attention_forward(q, k, v)
    tensors = {"grad": q, "out": out, "lse": lse}
    tensors[wrong] = tensors[wrong].bfloat16()
    gradients = [torch.ones_like(tensor) for tensor in (q, k, v)]
    with pytest.raises(ValueError, match=f"{wrong} has dtype torch.bfloat16, expected torch.float32"):
        attention_backward(tensors["grad"], (q, k, v), None, tensors["out"], tensors["lse"], gradients)
    assert all(bool((gradient == 1).all()) for gradient in gradients)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threads": 0}, "^threads is 0, expected"),
        ({"level": 9}, "^level is 9, expected"),
        ({"level": -1}, "^level is -1, expected"),
    ],
)
def test_wrong_numbers_are_refused(library, wrong, message):
    """By the compiled functions, of nothing at all: they look at these first."""
    numbers = {"sizes": (0, 0, 0, 0, 0), "threads": 1, **wrong}
    inputs = (0, (0,) * 4) * 3 + (0, (0, 0))
    with pytest.raises(ValueError, match=message):
        library.attention_forward(*inputs, 0, 0, **numbers)
    with pytest.raises(ValueError, match=message):
        library.attention_backward(0, (0,) * 4, *inputs, 0, (0,) * 4, 0, *(0, (0,) * 4) * 3, **numbers)
