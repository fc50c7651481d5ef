"""Fine-tuning with several seeds: means and deviations of the scores over splits, heads and orders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...checks import check_whole
from ...data.subjects import Subjects
from ...files import check_can_write, write_json
from ...model.encoder import HSIEncoder
from .finetune import check_free, finetune
from .labels import Labels
from .page import TITLES, write_page
from .scores import write_confusion
from .settings import FinetuneSettings


def finetune_repeatedly(
    encoder: Callable[[int], HSIEncoder],
    subjects: Subjects,
    labels: Labels,
    out: str | Path,
    settings: FinetuneSettings,
    seeds: int,
    **options: Any,
) -> dict[str, Any]:
    """Fine-tune with the seeds s, s + 1, ... of `settings.seed` = s, each with a split of its own.

    The run of a seed is in `seed-S/`. The folder itself then holds `metrics.json`, `report.html`, and the confusion
    matrix of all runs together.

    Args:
        encoder: called with each seed for the encoder to train.
        subjects, labels, settings, options: as of `finetune`; a `Split` made before is that of all seeds.
        out: the folder of all runs.
        seeds: number of seeds, at least 2.

    Returns:
        The content of `metrics.json`, see `summarise`.
    """
    check_whole("seeds", seeds, 2)
    out = Path(out)
    check_can_write(out)
    numbers = [settings.seed + number for number in range(seeds)]
    for folder in (out, *(out / f"seed-{seed}" for seed in numbers)):
        check_free(folder)
    reports = []
    for seed in numbers:
        print(f"seed {seed}", flush=True)
        chosen = dataclasses.replace(settings, seed=seed)
        reports.append(finetune(encoder(seed), subjects, labels, out / f"seed-{seed}", chosen, **options)[1])
    report = summarise(reports, numbers)
    config = json.loads((out / f"seed-{numbers[0]}" / "config.json").read_text())
    write_json(out / "config.json", config)
    write_json(out / "metrics.json", report)
    write_confusion(labels.classes, report["confusion"], out)
    facts = {"task": config["task"], "data": repr(subjects), "split": report["split"]}
    kept = ", ".join(str(run["epoch"]) for run in reports)
    facts |= {"epochs": str(settings.epochs), "kept epochs": kept, "mode": settings.mode}
    facts |= {"seeds": ", ".join(map(str, numbers))}
    write_page(out, f"Fine-tuning with {seeds} seeds", facts, report)
    return report


def summarise(reports: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Return the scores of several runs together.

    Returns:
        `seeds`; each score, also those of each class, as `mean`, `deviation` and `values`; `confusion`, the sum over
        the runs, as are the numbers of labels of each class; `not_trained`, the classes that some run could not train
        with. The deviation is that of a sample: the squares are divided by n - 1. The scores of a class are of the runs
        in which it has held-out labels.
    """
    scores = {name: _spread([report[name] for report in reports]) for name in TITLES if name in reports[0]}
    classes: dict[str, Any] = {}
    for name, row in reports[0]["classes"].items():
        rows = [report["classes"][name] for report in reports]
        tested = [other for other in rows if other["labelled"]]
        classes[name] = {
            score: sum(other[score] for other in rows)
            if score in ("labelled", "training")
            else _spread([other[score] for other in tested])
            for score in row
        }
    confusion = sum(torch.tensor(report["confusion"]) for report in reports)
    assert isinstance(confusion, torch.Tensor)
    missing = dict.fromkeys(name for report in reports for name in report["not_trained"])
    first = reports[0]
    return {
        "seeds": list(seeds),
        **scores,
        "classes": classes,
        "confusion": confusion.tolist(),
        "keep": first["keep"],
        "split": first["split"],
        "neighbours": first["neighbours"],
        "not_trained": list(missing),
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (0 of fewer than two values) and the values."""
    found = torch.tensor(values, dtype=torch.float64)
    deviation = float(found.std(correction=1)) if len(values) > 1 else 0.0
    return {"mean": float(found.mean()) if len(values) else 0.0, "deviation": deviation, "values": list(values)}
