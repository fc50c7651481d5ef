"""The exponential moving average of the weights, kept without a wait for the device."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging


class Average(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging`, but with the count of updates on the host: reading it never waits."""

    def __init__(self, device: torch.device, decay: float) -> None:
        super().__init__(device, decay=decay)
        self.decay = decay

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after each step, in one pass over all weights."""
        average, step = self._average_model, trainer.global_step
        assert average is not None
        if step <= self._latest_update_step:
            return
        averages = [parameter.data for parameter in average.module.parameters()]
        weights = [parameter.data for parameter in pl_module.parameters()]
        if self._latest_update_step == 0:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        average.n_averaged += 1
        self._latest_update_step = step
