"""Multiply-adds of a forward pass by component, counted by fvcore: a second opinion on PyTorch's counter."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmmae_kernels import use_backend
from mmmae_kernels.attention.op import PLAIN

from ..model.encoder import Backbone
from ..model.layers import Attention, hooks_only_mark
from .components import Step, Traced
from .launches import Uncomputed
from .mac_formulas import MAC_FORMULAS


def count_by_fvcore(traced: Traced, inputs: tuple[Tensor, ...]) -> Counter[str]:
    """Count multiply-adds by component, without those that fvcore counts for norms and interpolation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it compiles losses at import, which are not used here
        from fvcore.nn import FlopCountAnalysis, jit_handles

    current = traced.start

    def booked(macs_of: Callable[[list[Any], list[Any]], Any]) -> Callable[[list[Any], list[Any]], Counter[str]]:
        def macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
            nonlocal current
            # The graph is in the order of execution, and each node has the names of the modules that it ran in.
            scopes = [scope for scope in outputs[0].node().scopeName().split("/") if scope.startswith("steps.")]
            if scopes:
                step = traced.get_submodule(scopes[-1])
                assert isinstance(step, Step)
                current = step.component
            counted = macs_of(inputs, outputs)
            return Counter({current: sum(counted.values()) if isinstance(counted, Counter) else counted})

        return macs

    handles = {
        "aten::_convolution": jit_handles.conv_flop_jit,
        "aten::addmm": jit_handles.addmm_flop_jit,
        "aten::bmm": jit_handles.bmm_flop_jit,
        "aten::linear": jit_handles.linear_flop_jit,
        "aten::matmul": jit_handles.matmul_flop_jit,
        "aten::mm": jit_handles.matmul_flop_jit,
    } | {name: _as_handle(formula) for name, formula in MAC_FORMULAS.items()}
    if isinstance(traced.model, Backbone):
        traced.model.kernels = "auto"
    for name, module in traced.named_modules():
        is_read = isinstance(traced.model, Backbone) and "patch_embed" in name.split(".")
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and not is_read:
            setattr(module, "forward", functools.partial(_convolve, module))  # noqa: B010
        if isinstance(module, Attention) and module.backend not in PLAIN:
            module.backend = "sdpa"
    # The reference implementations: the tracer can't record operators with lists, whose formulas these check.
    uncomputed = Uncomputed()
    with uncomputed, torch.no_grad(), use_backend("eager"), hooks_only_mark():
        analysis = FlopCountAnalysis(traced, inputs).clear_op_handles()
        analysis.set_op_handle(**{name: booked(handle) for name, handle in handles.items()})
        # An operator that fvcore does not know shows as a disagreement, and not every model calls every step.
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts: Counter[str] = analysis.by_operator()
    return counts


def _convolve(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Apply a convolution by the only operator for it that the tracer records under a dispatch mode."""
    assert not isinstance(layer.padding, str)
    sizes = (layer.stride, layer.padding, layer.dilation, False, layer.output_padding, layer.groups)
    return torch._convolution(x, layer.weight, layer.bias, *sizes, False, False, False, False)


def _as_handle(formula: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        return formula(*map(_shape_or_constant, inputs))

    return handle


def _shape_or_constant(value: Any) -> Any:
    if value.isCompleteTensor():
        return value.type().sizes()
    if value.node().kind() == "prim::ListConstruct":
        return [_shape_or_constant(item) for item in value.node().inputs()]
    return value.toIValue()
