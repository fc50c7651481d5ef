"""The cost of operators, of a component of a model, and of a training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple


@dataclasses.dataclass
class Cost:
    """The cost of operators.

    Args:
        macs: multiply-adds of matrix products, convolutions and attention. Norms, softmax, activations, interpolation
            and reductions are not counted.
        bytes: size of the inputs and outputs of every launch. Each element of a tensor counts once, even if it is in a
            cache or a gather does not read it.
        launches: number of ATen and custom operators that write memory; views and allocations do not count.
    """

    macs: int = 0
    bytes: int = 0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.bytes + other.bytes, self.launches + other.launches)


class Operator(NamedTuple):
    """An operator of PyTorch or a kernel of ours that launched something.

    Args:
        name: `aten::mm` for instance, or the name of a Triton kernel.
        cost: what it costs.
        component: the component of the model that it belongs to, in backward too; empty if that is not known.
        is_cast: whether it only converts from one floating point type to another.
    """

    name: str
    cost: Cost
    component: str = ""
    is_cast: bool = False


@dataclasses.dataclass
class StepCost:
    """The cost of a training step.

    Args:
        saved_bytes: memory kept from the forward for the backward pass: distinct storages, without those of parameters.
        operators: each operator of both passes that launches something, in order.
    """

    saved_bytes: int
    operators: list[Operator]

    @property
    def total(self) -> Cost:
        """The cost of both passes."""
        return total(self.operators)

    @property
    def launches(self) -> int:
        """The launches of both passes."""
        return self.total.launches

    @property
    def casts(self) -> int:
        """The launches of both passes that only convert from one floating point type to another."""
        return total(operator for operator in self.operators if operator.is_cast).launches


def total(operators: Iterable[Operator]) -> Cost:
    """Return the cost of some operators together."""
    return sum((operator.cost for operator in operators), Cost())
