"""Counting of multiply-adds, bytes and launches: of a forward pass by component, of a training step, of any function.

Floating point results are not computed, so that counting takes seconds and hardly any memory. What a GPU would run is
counted with tensors on the CPU too, see `gpu.on_gpu`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from ..model.layers import hooks_only_mark
from .by_fvcore import count_by_fvcore
from .components import Encoder, Model, Traced
from .costs import Cost, Operator, StepCost
from .gpu import on_gpu
from .launches import Launches, Ledger, Uncomputed


def count(model: Model | Encoder, batch: int) -> dict[str, Cost]:
    """Count the forward pass of `batch` samples with all modalities, by component, in float32, as run on the CPU.

    Multiply-adds are counted by PyTorch's counter and, where it is installed, by fvcore's.

    Args:
        model: it can't be used afterwards, see `Traced`.
        batch: number of samples.

    Raises:
        RuntimeError: the multiply-adds of an operator are unknown, or the two counters disagree.
    """
    traced = Traced(model)
    inputs = traced.inputs(batch)
    costs = _count_by_torch(traced, inputs)
    if importlib.util.find_spec("fvcore") is None:
        return costs
    by_fvcore = count_by_fvcore(traced, inputs)
    for component in sorted({*costs, *by_fvcore}):
        by_torch = costs[component].macs if component in costs else 0
        if by_torch != by_fvcore[component]:
            raise RuntimeError(
                f"{component}: torch counts {by_torch} multiply-adds and fvcore {by_fvcore[component]}, expected the "
                "same; one of them lacks the formula of an operator, see mmmae.cost.mac_formulas"
            )
    return costs


def count_step(model: Model, batch: int, *, autocast: torch.dtype | None = None, target: str | None = None) -> StepCost:
    """Count a training step of `batch` samples, without its optimizer.

    Args:
        model: it can't be used afterwards, see `Traced`.
        batch: number of samples.
        autocast: dtype of the forward pass under autocast; None for none.
        target: architecture of a GPU, for example `sm90`, to count what it would run; None counts what this machine
            runs. A fast model for a GPU has kernels `triton` and attention `gpu.ATTENTION`, or `sdpa` in float32.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    traced = Traced(model)
    inputs = traced.inputs(batch)

    def step() -> None:
        mixed = torch.autocast("cpu", autocast, enabled=autocast is not None)
        with mixed, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, *_ = traced(*inputs)
        loss.backward()

    operators = count_operators(step, traced, target)
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved = sum(storage.nbytes() for key, storage in storages.items() if key not in parameters)
    return StepCost(saved, operators)


def count_operators(
    function: Callable[[], object], traced: Traced | None = None, target: str | None = None
) -> list[Operator]:
    """Return each operator in a function that launches something, in order.

    Args:
        function: what to count.
        traced: the model that the function runs, whose components the operators are of; None if there is none.
        target: see `count_step`.
    """
    uncomputed, launches = Uncomputed(), Launches(traced, on_gpu=target is not None)
    gpu = contextlib.nullcontext() if target is None else on_gpu(target, launches.receive)
    with gpu, hooks_only_mark(), uncomputed, launches:
        function()
    return launches.operators


def _count_by_torch(traced: Traced, inputs: tuple[Tensor, ...]) -> dict[str, Cost]:
    uncomputed = Uncomputed()
    with uncomputed, torch.no_grad(), Ledger(traced) as ledger:
        traced(*inputs)
    return dict(ledger.by_component)
