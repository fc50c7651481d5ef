"""A test case of an op, and the check that every backend has to pass: outputs and gradients against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # name -> Tensor, or None
# Of an op that ends in a linear layer: shape of the input, and width of the output.
LINEAR_SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "odd": ((2, 5, 72), 33),
    "past a block": ((2, 9, 528), 33),
    "wide": ((2, 7, 768), 1000),
    "no row": ((0, 8), 4),
}
SMALL_LINEAR = ("odd", "past a block")  # the emulator runs them in seconds


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an op.

    Args:
        make: returns the inputs in float64; the check converts them to the dtype under test, integers excepted.
        call: calls the op on such inputs.
        define: calls its definition on the same inputs.
        small: whether the emulator can run the case in seconds.
        kept: dtypes of the inputs that are not converted to the dtype under test.
        constant: inputs without a gradient.
        strided: layout of the incoming gradients: "as they come", "expanded" from one number, or "transposed".
    """

    op: str
    name: str
    make: Callable[[], Inputs]
    call: Callable[[Inputs], Sequence[Tensor]]
    define: Callable[[Inputs], Sequence[Tensor]]
    small: bool = False
    kept: dict[str, torch.dtype] = dataclasses.field(default_factory=dict)
    constant: frozenset[str] = frozenset()
    strided: str = "as they come"

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return normal random numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_ids(batch: int, count: int, tokens: int, seed: int = 0) -> Tensor:
    """Return token numbers `[batch, count]` in random order; none repeats within a row before all have occurred."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=generator).repeat(1 + count // tokens)[:count] for _ in range(batch)]
    return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.int64)


def check(case: Case, dtype: torch.dtype, tolerance: float = 1e-5, device: str = "cpu") -> None:
    """Compare outputs and every gradient with the definition in float64.

    In float32 the norm of the difference is at most `tolerance` of the norm. In half precision the error is at most
    twice that of the definition in the same type, or what rounding a right result once makes.
    """
    exact = {name: None if tensor is None else tensor.to(device) for name, tensor in case.make().items()}
    given = {name: _converted(tensor, case.kept.get(name, dtype)) for name, tensor in exact.items()}
    # What both start from is the same: rounding the inputs is nobody's error.
    rounded = {name: None if tensor is None else tensor.clone() for name, tensor in given.items()}
    expected = _results(case, case.define, {name: _converted(t, torch.float64) for name, t in rounded.items()})
    ours = _results(case, case.call, given)
    theirs = None if dtype == torch.float32 else _results(case, case.define, rounded)
    for place, (wanted, value) in enumerate(zip(expected, ours, strict=True)):
        assert value.shape == wanted.shape, f"{case}: result {place} has shape {list(value.shape)}"
        assert theirs is None or value.dtype == theirs[place].dtype, f"{case}: result {place} is {value.dtype}"
        error, norm = _distance(value, wanted), float(wanted.norm())
        # Gradients that cancel to 0 are held to the rounding of the terms that cancel, which are of order 1 here.
        cancelled = 1e-6 * wanted.numel() ** 0.5
        if theirs is None:
            allowed = tolerance * norm + cancelled
        else:
            allowed = max(2 * _distance(theirs[place], wanted), torch.finfo(dtype).eps / 2 * norm) + cancelled
        off = f"{case}: result {place} is off by {error:.2e} of {norm:.2e}, expected at most {allowed:.2e}"
        assert error <= allowed, off


def _results(case: Case, function: Callable[[Inputs], Sequence[Tensor]], inputs: Inputs) -> list[Tensor]:
    """Return the outputs, then the gradients of a fixed random combination of them."""
    leaves = [
        tensor.requires_grad_()
        for name, tensor in inputs.items()
        if tensor is not None and tensor.is_floating_point() and name not in case.constant
    ]
    outputs = list(function(inputs))
    if not leaves:
        return outputs
    incoming = [_incoming(output, case.strided, place) for place, output in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, incoming, allow_unused=True)
    return [output.detach() for output in outputs] + [grad for grad in grads if grad is not None]


def _incoming(output: Tensor, strided: str, place: int) -> Tensor:
    if strided == "expanded":
        return torch.full((), 0.75, dtype=output.dtype, device=output.device).expand(output.shape)
    grad = draw(*output.shape, seed=9 + place).to(output)
    return grad.transpose(0, -1).contiguous().transpose(0, -1) if strided == "transposed" else grad


def _converted(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None:
        return None
    tensor = tensor.detach()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _distance(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted).norm())
