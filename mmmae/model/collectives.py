"""What ranks compute together, outside of compiled graphs: Inductor's code for collectives does not build.

Keeping a function out of graphs loads Dynamo, which takes longer than all else that `import mmmae` loads: hence a
module of its own, imported where a model first runs on several ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def share_of_rank(weights: Tensor) -> Tensor:
    """Return the factor for a rank's loss with which the mean over ranks is the mean over the tokens of all ranks.

    Args:
        weights: `[B, M']` of the rank's tokens; if they are integers, each token has weight 1.
    """
    if weights.is_floating_point():
        total = weights.sum()
    else:  # created on the device: copying it there would wait for the device
        total = torch.full((), weights.numel(), dtype=torch.float32, device=weights.device)
    of_all = total.clone()
    torch.distributed.all_reduce(of_all)
    return total * torch.distributed.get_world_size() / of_all.clamp(min=1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gather(local: Tensor) -> Tensor:
    """Concatenate `[B, ...]` of all ranks in rank order, differentiably; B must be the same on all ranks."""
    return _AllGather.apply(local)  # type: ignore[no-any-return, no-untyped-call]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        summed = grad.contiguous()
        torch.distributed.all_reduce(summed)
        return summed.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
