"""The least time of a training step on a GPU, from what it runs and from the speeds that were measured there."""

from __future__ import annotations

import torch

import mmmae
from bench.race import BASELINE
from mmmae.cost.components import Model
from mmmae.cost.counting import count_step
from mmmae.cost.gpu import ATTENTION
from mmmae_kernels.attention.call import target_of

from .records import Records
from .setting import Setting

DRY_TARGET = "sm90"


def step_floor(
    records: Records, setting: Setting, case: str, preset: str, batch: int, speeds: dict[str, float]
) -> None:
    """Record, for fast model and reference, the time of each operator's products or bytes, whichever take longer.

    The fast model is taken with a flash backend of attention, whether one is installed or not.
    """
    config = setting.config(preset)
    target = DRY_TARGET if setting.dry_run else target_of(setting.device, None)
    with torch.device("meta"):
        models: dict[str, Model] = {
            "fast": mmmae.FastModel(config, kernels="triton", attention=ATTENTION),
            BASELINE: mmmae.ReferenceModel(config, "sdpa"),
        }
    for name, model in models.items():
        counted = count_step(model, batch, autocast=torch.bfloat16, target=target)
        costs = [operator.cost for operator in counted.operators]
        seconds = sum(max(2 * cost.macs / speeds["gemm"], cost.bytes / speeds["copy"]) for cost in costs)
        total = counted.total
        counts = {"macs": total.macs, "bytes": total.bytes, "launches": total.launches, "casts": counted.casts}
        records.add("floor", case=case, contender=name, seconds=seconds, **counts)
