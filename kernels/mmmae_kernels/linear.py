"""What the memory-lean linear layers share: checks, and the gradients of a product."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .autocast import is_autocast
from .checks import check_device, check_floating, check_rank, check_vector


def check_linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless `weight [D, H]` and `bias [D]` are a linear layer for `x [..., H]`, called `name`."""
    check_floating(name, x)
    check_rank("weight", weight, "[D, H]")
    check_floating("weight", weight)
    check_device("weight", weight, x.device)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected is [..., {weight.shape[1]}] as in weight")
    if x.dtype != weight.dtype and not is_autocast(x):
        raise ValueError(f"weight has dtype {weight.dtype}, expected is {x.dtype} as in {name}")
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], x.device)


def linear_gradients(grad: Tensor, x: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by weight and bias of a linear layer of `x [..., H]`, given that of its output `[..., D]`."""
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
    by_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs[0] else None
    return by_weight, rows.sum(0) if needs[1] else None
