"""Keep losses and gradient norms on the device until they are read, because each reading waits for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..model.inputs import Output, is_distributed


class StepFigures(NamedTuple):
    """The figures of one training step."""

    step: int  # number of the step, from 0
    loss: float  # this and the next two are means over the step's forward passes and over the ranks
    loss_reconstruction: float
    loss_contrastive: float
    gradient_norm: float  # before clipping
    finite: bool  # False from the first step on whose loss or gradient norm is NaN or infinite


class Figures:
    """A ring buffer of the last steps' figures.

    `add_pass` and `close` work on the device only, so that a CUDA graph can record them; `count` is the part of `close`
    on the host.

    Args:
        device: where the figures are kept.
        steps: number of steps that are kept.
        accumulate: forward passes of a step.

    Attributes:
        broken: float32 scalar, 1 from the first step on that is not finite, else 0: the `found_inf` of an optimizer.
    """

    def __init__(self, device: torch.device, steps: int, accumulate: int = 1) -> None:
        self.steps, self.accumulate = steps, accumulate
        self.made = self.unread = 0
        self.broken = torch.zeros((), device=device)
        self._sums = torch.zeros(3, device=device)
        self._rows = torch.zeros(steps, 5, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)

    def add_pass(self, output: Output, *, first: bool) -> None:
        """Add the losses of a forward pass; `first` says that it is the first of its step."""
        losses = torch.stack([output.loss, output.loss_reconstruction, output.loss_contrastive])
        losses = losses.detach().to(torch.float32)
        if is_distributed():
            torch.distributed.all_reduce(losses)
            losses = losses / torch.distributed.get_world_size()
        if first:
            self._sums.copy_(losses)
        else:
            self._sums.add_(losses)

    def close(self, gradient_norm: Tensor, *, norm_counts: bool = True) -> None:
        """End a step.

        Args:
            gradient_norm: scalar.
            norm_counts: whether a norm that is not finite sets `broken`, as such a loss does.
        """
        means = self._sums if self.accumulate == 1 else self._sums / self.accumulate
        norm = gradient_norm.detach().to(torch.float32)
        finite = torch.isfinite(means[0])
        if norm_counts:
            finite = finite & torch.isfinite(norm)
        self.broken.masked_fill_(~finite, 1.0)
        row = torch.cat([means, torch.stack([norm, 1 - self.broken])])
        self._rows.index_copy_(0, self._row, row[None])
        self._row.add_(1).remainder_(self.steps)

    def count(self) -> None:
        """Count a step after `close`."""
        self.made += 1
        self.unread = min(self.unread + 1, self.steps)

    def read(self) -> list[StepFigures]:
        """Return the figures of the steps since the last reading, oldest first; the host waits for the device."""
        first, self.unread = self.made - self.unread, 0
        if first == self.made:
            return []
        rows = self._rows.tolist()
        read = []
        for step in range(first, self.made):
            loss, reconstruction, contrastive, norm, finite = rows[step % self.steps]
            read.append(StepFigures(step, loss, reconstruction, contrastive, norm, finite == 1))
        return read

    def clear(self) -> None:
        """Forget that a step was not finite."""
        self.broken.zero_()
