"""Costs of the operators: multiply-adds for the FLOP counters of torch and fvcore, and kernel launches.

The formulas are in each op's `costs.py`. They take the operator's arguments, with shapes in place of tensors.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from .add_layer_norm import costs as add_layer_norm
from .attention import costs as attention
from .decoder_tokens import costs as decoder_tokens
from .gelu_linear import costs as gelu_linear
from .masked_loss import costs as masked_loss
from .patch_embed import costs as patch_embed
from .random_masking import costs as random_masking

_COSTS: Any = (add_layer_norm, attention, decoder_tokens, gelu_linear, masked_loss, patch_embed, random_masking)
_COUNTER = "torch.utils.flop_counter"


def linear_macs(x: Sequence[int], weight: Sequence[int], *rest: object) -> int:
    """Return the multiply-adds of a linear layer of `x [..., H]` with `weight [D, H]`."""
    return math.prod(x) * weight[0]


def batched_macs(a: Sequence[int], b: Sequence[int], *rest: object) -> int:
    """Return the multiply-adds of a batched product of `a [W, R, H]` and `b [W, H, D]`, with a dtype or without."""
    return math.prod(a) * b[2]


MAC_FORMULAS: dict[str, Callable[..., int]] = {"mkldnn::_linear_pointwise": linear_macs, "aten::bmm": batched_macs}
WITHOUT_MACS: tuple[str, ...] = ()  # operators without matrix products
# Kernels that an operator launches on a GPU, 1 for those not listed. Before a batched product with a bias, the bias is
# copied into the result (ATen/native/cuda/Blas.cpp).
LAUNCHES: dict[str, Callable[..., int]] = {"aten::baddbmm": lambda *arguments: 2}
for _costs in _COSTS:
    MAC_FORMULAS |= _costs.MACS
    WITHOUT_MACS += _costs.WITHOUT_MACS
    LAUNCHES |= _costs.LAUNCHES


def launches_of(operator: str, arguments: Sequence[object]) -> int:
    """Return how many kernels a call of `operator`, for example `aten::mm`, launches on a GPU."""
    return LAUNCHES[operator](*arguments) if operator in LAUNCHES else 1


def _register_formulas(counter: ModuleType) -> None:
    """Register the formulas with `torch.utils.flop_counter`."""
    for name, formula in MAC_FORMULAS.items():
        namespace, operator = name.split("::")
        if hasattr(getattr(torch.ops, namespace), operator):  # not every build of torch has oneDNN
            packet = getattr(getattr(torch.ops, namespace), operator)
            counter.flop_registry.pop(packet, None)  # torch's own formula of bmm takes no dtype of the result
            counter.register_flop_formula(packet)(_as_flops(formula))


def _as_flops(formula: Callable[..., int]) -> Callable[..., int]:
    """Convert a formula for multiply-adds to torch's convention of two FLOPs each."""

    def flops(*shapes: Any, out_shape: object = None, **options: object) -> int:
        return 2 * formula(*shapes)

    return flops


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Registers the formulas when torch's counter is imported; to import it here would be slow and load Triton."""

    searching = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _register_formulas(module)

            setattr(spec.loader, "exec_module", execute_and_register)  # noqa: B010
        return spec


if _COUNTER in sys.modules:
    _register_formulas(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _RegisterOnImport())
