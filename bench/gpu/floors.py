"""What a training step would run on a GPU, counted: with the speeds that are measured there, its least time."""

from __future__ import annotations

from collections import Counter

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


def step_counts(records: Records, setting: Setting, preset: str, batch: str) -> None:
    """Count the steps of fast model and reference, operator by operator, under autocast.

    The fast model is taken with a flash backend of attention, whether one is installed or not.
    """
    config = setting.config(preset)
    with torch.device("meta"):
        models: dict[str, Model] = {
            "fast": mmmae.FastModel(config, kernels="triton", attention=ATTENTION),
            BASELINE: mmmae.ReferenceModel(config, "sdpa"),
        }
    for name, model in models.items():
        what = f"counts of {name}, {preset}, batch {batch}"
        records.attempt(what, _count, records, setting, name, model, f"{preset}, batch {batch}", int(batch))


def _count(records: Records, setting: Setting, name: str, model: Model, task: str, batch: int) -> None:
    target = DRY_TARGET if setting.dry_run else target_of(setting.device, None)
    counted = count_step(model, setting.batch(batch), autocast=torch.bfloat16, target=target)
    total = counted.total
    operators = Counter((operator.cost.macs, operator.cost.bytes) for operator in counted.operators)
    records.add(
        "counts",
        task=task,
        contender=name,
        macs=total.macs,
        bytes=total.bytes,
        launches=total.launches,
        casts=counted.casts,
        operators=[(macs, moved, times) for (macs, moved), times in operators.items()],
    )
