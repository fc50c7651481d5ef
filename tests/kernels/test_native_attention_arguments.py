"""What the compiled attention refuses, before anything is written."""

from __future__ import annotations

import math

import pytest
import torch

from mmmae_kernels.attention.backends.native import attention_backward, attention_forward

pytestmark = pytest.mark.usefixtures("library", "poisoned")
SHAPES = {"grad": (2, 3, 2, 8), "q": (2, 3, 2, 8), "k": (2, 4, 2, 8), "v": (2, 4, 2, 8), "out": (2, 3, 2, 8)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(2, 3, 2, 9)}, r"^k: shape is \[2, 4, 2, 8\], expected is \[2, 4, 2, 9\]"),
        ({"q": torch.zeros(3, 2, 8)}, r"^q: shape is \[3, 2, 8\], expected is \[B, Nq, h, d\]"),
        ({"q": torch.zeros(2, 3, 2, 257)}, r"^q: heads are 257 wide, expected is 1 to 256"),
        ({"q": torch.zeros(2, 3, 2, 0)}, r"^q: heads are 0 wide"),
        ({"q": torch.zeros(2, 3, 2, 8, dtype=torch.float64)}, r"^q: dtype is float64, expected is float32"),
        ({"q": torch.zeros(2, 3, 8, 2).transpose(2, 3)}, r"^q: strides are"),
        ({"k": torch.zeros(1, 4, 2, 8)}, r"^k: shape is"),
        ({"v": torch.zeros(2, 5, 2, 8)}, r"^v: shape is \[2, 5, 2, 8\], expected is \[2, 4, 2, 8\]"),
        ({"v": torch.zeros(2, 4, 8, 2).transpose(2, 3)}, r"^v: strides are"),
        (
            {"key_present": torch.zeros(2, 3, dtype=torch.bool)},
            r"^key_present: shape is \[2, 3\], expected is \[2, 4\]",
        ),
        ({"key_present": torch.full((2, 4), math.nan)}, r"^key_present: dtype is float32, expected is bool"),
        ({"lse": torch.zeros(2, 3, 2)}, r"^lse: shape is"),
        ({"lse": torch.zeros(2, 3, 2).transpose(1, 2)}, r"^lse: strides are"),
        ({"threads": 0}, r"^threads: 0 given"),
        ({"level": "fast"}, r"^level: fast is none"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(library, guarded, wrong, message):
    inputs = {name: torch.zeros(SHAPES[name]) for name in ("q", "k", "v")} | {"key_present": None, "threads": 2}
    outs = {"out": guarded(*SHAPES["out"]), "lse": guarded(2, 2, 3)}
    with pytest.raises(ValueError, match=message):
        library.attention_forward(**{**inputs, **outs, **wrong})
    assert all(bool(out.isnan().all()) for out in outs.values())
    inputs |= {"grad": torch.zeros(SHAPES["grad"]), "out": torch.zeros(SHAPES["out"]), "lse": torch.zeros(2, 2, 3)}
    grads = {f"grad_{name}": guarded(*SHAPES[name]) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=message):
        library.attention_backward(**{**inputs, **grads, **wrong})
    assert all(bool(grad.isnan().all()) for grad in grads.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grad": torch.zeros(2, 3, 2, 9)}, r"^grad: shape is"),
        ({"out": torch.zeros(2, 3, 8, 2).transpose(2, 3)}, r"^out: strides are"),
        ({"grad_q": torch.zeros(2, 4, 2, 8)}, r"^grad_q: shape is"),
        ({"grad_k": torch.zeros(2, 3, 2, 8)}, r"^grad_k: shape is"),
        ({"grad_v": torch.zeros(2, 4, 8, 2).transpose(2, 3)}, r"^grad_v: strides are"),
    ],
)
def test_wrong_arguments_of_the_gradients_are_refused(library, wrong, message):
    arguments = {name: torch.zeros(shape) for name, shape in SHAPES.items()} | {"lse": torch.zeros(2, 2, 3)}
    arguments |= {f"grad_{name}": torch.zeros(SHAPES[name]) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=message):
        library.attention_backward(**{**arguments, "key_present": None, "threads": 1, **wrong})


def test_the_functions_refuse_what_does_not_fit():
    q, k, v = (torch.randn(SHAPES[name]) for name in ("q", "k", "v"))
    with pytest.raises(ValueError, match=r"^q has shape \[3, 2, 8\]"):
        attention_forward(q[0], k, v)
    with pytest.raises(ValueError, match=r"^v: dtype is float16"):
        attention_forward(q, k, v.half())
    with pytest.raises(ValueError, match=r"^a tensor lies on meta"):
        attention_forward(q, k.to("meta"), v)
    out, lse = attention_forward(q, k, v)
    with pytest.raises(ValueError, match=r"^grad_q: strides are"):
        attention_backward(
            q, (q, k, v), None, out, lse, (torch.empty(2, 3, 8, 2).transpose(2, 3), k.clone(), v.clone())
        )
