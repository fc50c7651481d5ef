"""A test case of an op, and the check that every backend has to pass: outputs and gradients against float64."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


class Types(NamedTuple):
    """The dtypes of a call's inputs: all of one dtype, or mixed as in a model under autocast.

    Args:
        dtype: dtype of the inputs. Under autocast, that of the inputs that are matrix products; the others, which are
            the residual stream and parameters, are float32.
        autocast: whether the call runs under autocast.
    """

    dtype: torch.dtype
    autocast: bool = False


TYPES = {
    "fp32": Types(torch.float32),
    "fp16": Types(torch.float16),
    "bf16": Types(torch.bfloat16),
    "mixed fp16": Types(torch.float16, autocast=True),
    "mixed bf16": Types(torch.bfloat16, autocast=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an op.

    Args:
        make: returns the inputs in float64; the check converts them to the dtype under test, integers excepted.
        call: calls the op on such inputs.
        define: calls its definition on the same inputs.
        small: whether the emulator can run the case in seconds.
        kept: dtypes of the inputs that are not converted to the dtype under test.
        products: inputs that a matrix product computes, so that they have autocast's dtype under autocast.
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
    products: frozenset[str] = frozenset()
    constant: frozenset[str] = frozenset()
    strided: str = "as they come"

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"

    def inputs(self, types: Types) -> Inputs:
        """Return the inputs in the given types."""

        def dtype_of(name: str) -> torch.dtype:
            among_products = not types.autocast or name in self.products
            return self.kept.get(name, types.dtype if among_products else torch.float32)

        return {name: converted(tensor, dtype_of(name)) for name, tensor in self.make().items()}


def with_half_stream(case: Case, stream: str = "x") -> Case:
    """Return the case with its residual stream in autocast's dtype, as of a model with `residual_stream="bfloat16"`."""
    return dataclasses.replace(case, name=f"{case.name}, stream in autocast's dtype", products=case.products | {stream})


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return normal random numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_ids(batch: int, count: int, tokens: int, seed: int = 0) -> Tensor:
    """Return token numbers `[batch, count]` in random order; none repeats within a row before all have occurred."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=generator).repeat(1 + count // tokens)[:count] for _ in range(batch)]
    return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.int64)


class Deviation(NamedTuple):
    """The error of an output or gradient, by its place among them, the most that it may be, and the norm."""

    place: int
    error: float
    allowed: float
    norm: float


def check(case: Case, types: Types | torch.dtype, tolerance: float = 1e-5, device: str = "cpu") -> None:
    """Compare outputs and every gradient with the definition in float64; a dtype means inputs of that dtype.

    The norm of the error of a float32 result is at most `tolerance` of the norm. Where dtypes below float32 are
    involved, the error may be twice that of the definition in the same types, or what rounding a right result once
    makes, if that is more.
    """
    if isinstance(types, torch.dtype):
        types = Types(types)
    for place, error, allowed, norm in deviations(case, types, tolerance, device):
        off = f"{case}: result {place} is off by {error:.2e} of {norm:.2e}, expected at most {allowed:.2e}"
        assert error <= allowed, off


def deviations(case: Case, types: Types, tolerance: float = 1e-5, device: str = "cpu") -> list[Deviation]:
    """Return the deviations of outputs and gradients from the definition in float64; see `check` for what is allowed.

    Raises:
        AssertionError: if a result has another shape or dtype than the definition's.
    """
    given = {name: None if tensor is None else tensor.to(device) for name, tensor in case.inputs(types).items()}
    # What both start from is the same: rounding the inputs is nobody's error.
    rounded = {name: None if tensor is None else tensor.clone() for name, tensor in given.items()}
    exact = {name: converted(tensor, torch.float64) for name, tensor in rounded.items()}
    expected = results(case, case.define, exact)
    ours = results(case, case.call, given, types)
    theirs = None if types.dtype == torch.float32 else results(case, case.define, rounded, types)
    found = []
    for place, (wanted, value) in enumerate(zip(expected, ours, strict=True)):
        assert value.shape == wanted.shape, f"{case}: result {place} has shape {list(value.shape)}"
        assert theirs is None or value.dtype == theirs[place].dtype, f"{case}: result {place} is {value.dtype}"
        error, norm = _distance(value, wanted), float(wanted.norm())
        rounding = tolerance if value.dtype == torch.float32 else torch.finfo(value.dtype).eps / 2
        allowed = max(rounding * norm, 0.0 if theirs is None else 2 * _distance(theirs[place], wanted))
        # Gradients that cancel to 0 are held to the rounding of the terms that cancel, which are of order 1 here.
        allowed += 1e-6 * wanted.numel() ** 0.5
        found.append(Deviation(place, error, allowed, norm))
    return found


def results(
    case: Case, function: Callable[[Inputs], Sequence[Tensor]], inputs: Inputs, types: Types | None = None
) -> list[Tensor]:
    """Return the outputs, then the gradients of a fixed random combination of them.

    Args:
        function: `case.call` or `case.define`; called under autocast if the types say so.
    """
    leaves = [
        tensor.requires_grad_()
        for name, tensor in inputs.items()
        if tensor is not None and tensor.is_floating_point() and name not in case.constant
    ]
    device = next(tensor.device.type for tensor in inputs.values() if tensor is not None)
    with torch.autocast(device, types.dtype) if types is not None and types.autocast else contextlib.nullcontext():
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


def converted(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a floating point tensor in `dtype` and without gradient, other tensors as they are."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _distance(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted).norm())
