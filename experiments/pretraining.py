"""What matters in pretraining: pigments of generated eyes, predicted by encoders that were pretrained without labels.

Each setting changes one thing of the default, and pretrains `tiny` on generated eyes without labels for the same CPU
time. The amounts of pigment in other eyes are then predicted from a few eyes with known amounts: by fine-tuning the
encoder with a linear layer, and by a ridge regression on the features of the frozen encoder. The baselines are the same
for an encoder of random weights, and regressions on spectra.
Each result is appended to `results.jsonl` at once, so that a stopped run can be continued with the same command:

    python experiments/pretraining.py --out runs/pretraining
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pigments import PATCH, PIGMENTS, SIZE, SPECTRA, Eyes, by_place, encode, fine_tune, regress, spectra
from torch import Tensor

import mmmae
from mmmae.data import Subjects, collate
from mmmae.training.module import Pretraining
from mmmae.training.reports import measure_features
from mmmae.training.sampling import StepSampler, Visits
from mmmae.training.settings import PretrainSettings

MODEL: dict[str, Any] = {"image_size": SIZE, "patch": PATCH, "aux_patch": 16}
SETTINGS: dict[str, dict[str, Any]] = {  # fields of the model's config
    "default": {},
    "target pixels": {"target": "pixels"},
    "target pixels, normalised": {"target": "pixels", "normalize_target": True},
    "no conditioning": {"conditioning_depth": 0},
    "no images": {"aux": {}},
    "contrastive weight 0": {"contrastive_weight": 0.0},
    "contrastive weight 1": {"contrastive_weight": 1.0},
    "mask ratio 0.5": {"mask_ratio": 0.5},
    "mask ratio 0.9": {"mask_ratio": 0.9},
    "whole spectra masked": {"masking": "spectra"},
    "whole bands masked": {"masking": "bands"},
}
RANDOM = "random weights"
METHODS = (*SPECTRA, RANDOM, *SETTINGS)
MEASURED = (0, 1 / 8, 1 / 4, 1 / 2, 1)  # shares of the steps after which features are measured


@dataclasses.dataclass(frozen=True)
class Course:
    """Sizes of a run.

    Attributes:
        steps: of the default; the others get as many as take the same time.
        eyes: to pretrain on.
        labelled: eyes with known pigments, some of those that are pretrained on.
        held_out: eyes to evaluate.
        tuning: steps of fine-tuning, each on all labelled eyes.
        tuning_rate: peak learning rate of fine-tuning.
        rounds: of measuring the time of a step, with `round_steps` steps of each setting.
    """

    steps: int = 3000
    eyes: int = 256
    labelled: int = 8
    held_out: int = 64
    batch: int = 16
    learning_rate: float = 1e-3
    tuning: int = 300
    tuning_rate: float = 3e-3
    rounds: int = 15
    round_steps: int = 2


FULL = Course()
QUICK = Course(steps=2, eyes=4, labelled=3, held_out=2, batch=2, tuning=2, rounds=1, round_steps=1)


def main() -> None:
    """Run the tasks that have no results yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretraining"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--steps", type=int, help="of the default, which set the time of all; a folder for each number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    course = QUICK if options.quick else FULL
    course = dataclasses.replace(course, steps=options.steps or course.steps)
    costs: dict[str, float] = {}
    for seed in options.seeds:
        done = {(result["method"], result["seed"]) for result in read_results(options.out)}
        tasks = [method for method in options.methods if (method, seed) not in done]
        eyes = Eyes(seed, course.eyes, course.labelled, course.held_out) if tasks else None
        for method in tasks:
            assert eyes is not None
            costs = costs or measure_costs(options.out / "costs.json", eyes, course, options.methods)
            start = time.process_time()
            result = {"method": method, "seed": seed, **run(method, eyes, course, costs)}
            result["seconds"] = round(time.process_time() - start, 1)
            with (options.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
    text = tables(read_results(options.out))
    (options.out / "tables.md").write_text(text + "\n")
    print(text)


class Run:
    """A model in pretraining.

    It is not trained by `pretrain`, which writes files, but by the step that `pretrain` does.
    """

    def __init__(self, method: str, eyes: Eyes, course: Course, steps: int, seed: int) -> None:
        fields = {"aux": eyes.unlabelled.modalities, **SETTINGS[method]}
        settings = PretrainSettings(
            steps=steps, batch=course.batch, learning_rate=course.learning_rate, flip=True, seed=seed, precision="32"
        )
        torch.manual_seed(seed)
        self.model = mmmae.fast_model(mmmae.MMMAEConfig.preset("tiny", **MODEL, **fields))
        optimization = Pretraining(self.model, settings, {}).configure_optimizers()
        self.schedule = optimization["lr_scheduler"]["scheduler"]
        self.step = mmmae.TrainingStep(self.model, optimization["optimizer"], clip=settings.clip, seed=seed * 2**32)
        self.batches = self._batches(eyes.unlabelled, settings)

    def _batches(self, eyes: Subjects, settings: PretrainSettings) -> Iterator[tuple[Any, ...]]:
        visits = Visits(eyes, range(len(eyes)), settings, augmented=True)
        for chosen in StepSampler(len(eyes), settings.batch, settings.steps, settings.seed):
            batch = collate([visits[number] for number in chosen], self.model.config.aux)
            yield batch.hsi, batch.aux, batch.present, batch.valid

    def train(self, steps: int) -> None:
        """Do some steps; raise ValueError if a loss is not finite."""
        for _ in range(steps):
            self.step(*next(self.batches))
            self.schedule.step()
        if steps and not self.step.read()[-1].finite:
            raise ValueError("a loss is not finite")


def measure_costs(path: Path, eyes: Eyes, course: Course, methods: Sequence[str]) -> dict[str, float]:
    """Return the CPU time of a step with each setting, over that of the default; what was measured before is read.

    The settings take turns, so that whatever else the machine does slows all of them down alike.
    """
    costs: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    missing = [method for method in methods if method in SETTINGS and method not in costs]
    if not missing:
        return costs
    steps = (course.rounds + 1) * course.round_steps
    runs = {method: Run(method, eyes, course, steps, seed=0) for method in ["default", *missing]}
    times: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(course.rounds + 1):
        for method, each in runs.items():
            start = time.process_time()
            each.train(course.round_steps)
            times[method].append(time.process_time() - start)
    for method in missing:  # the first round is a warm-up
        costs[method] = statistics.median(
            own / default for own, default in zip(times[method][1:], times["default"][1:], strict=True)
        )
    path.write_text(json.dumps(costs, indent=1))
    return costs


def run(method: str, eyes: Eyes, course: Course, costs: dict[str, float]) -> dict[str, Any]:
    """Run a task; return the number of steps, R2 by pigment, and figures of the features after some of the steps."""
    if method in SPECTRA:
        return {"steps": 0, "r2": regress(spectra(method, eyes), eyes)}
    steps = 0 if method == RANDOM else max(1, round(course.steps / costs[method]))
    each = Run("default" if method == RANDOM else method, eyes, course, max(1, steps), eyes.seed)
    figures: list[dict[str, float]] = []
    for step in sorted({round(share * steps) for share in MEASURED}):
        each.train(step - (figures[-1]["step"] if figures else 0))
        tokens = encode(each.model, eyes)
        groups = tokens.unflatten(1, (each.model.config.grid[0], -1))
        pooled, joined = (regress(features, eyes) for features in (groups.mean(1), by_place(tokens, each.model.config)))
        figures.append({"step": step, **spread(tokens[eyes.labelled :]), "r2": mean(pooled), "r2_joined": mean(joined)})
    tuned = fine_tune(each.model.hsi_encoder(), eyes, course.tuning, course.tuning_rate)
    return {"steps": steps, "r2": pooled, "r2_joined": joined, "r2_tuned": tuned, "figures": figures}


def spread(tokens: Tensor) -> dict[str, float]:
    """Return how much features `[n, N, D]` differ.

    Returns:
        `rank` and `std` as `feature_rank` and `feature_std` in a run's metrics, and `between`: the share of the
        variance of tokens that is between eyes, at equal places; 0 if features depend on places alone.
    """
    measured = measure_features(tokens)
    between = tokens.var(0, correction=0).mean() / (tokens - tokens.mean((0, 1))).square().mean().clamp(min=1e-12)
    return {"rank": measured["feature_rank"], "std": measured["feature_std"], "between": between.item()}


def mean(r2: dict[str, float]) -> float:
    """Return the mean over the pigments."""
    return statistics.fmean(r2.values())


def read_results(out: Path) -> list[dict[str, Any]]:
    """Read the results so far."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Return Markdown tables of R2, and of the features over training: means and standard deviations over the seeds."""
    by_method = {method: [result for result in results if result["method"] == method] for method in METHODS}
    lines = [f"| | seeds | steps | R2, fine-tuned | R2 | R2, tokens pooled | {' | '.join(PIGMENTS)} |"]
    lines.append("| --- |" + " ---: |" * (5 + len(PIGMENTS)))
    for method, found in by_method.items():
        if found:
            by_kind = {
                kind: [result[kind] for result in found] for kind in ("r2_tuned", "r2_joined", "r2") if kind in found[0]
            }
            best = next(iter(by_kind.values()))  # of a fine-tuned encoder, or of spectra
            r2 = [spelled([mean(each) for each in values]) for values in by_kind.values()]
            means = [f"{statistics.fmean(result[name] for result in best):.3f}" for name in PIGMENTS]
            steps = round(statistics.fmean(result["steps"] for result in found))
            kinds = r2 if len(r2) == 3 else ["", *r2, ""]
            lines.append(f"| {method} | {len(found)} | {steps} | {' | '.join([*kinds, *means])} |")
    lines += ["", "| | | " + " | ".join(f"{share:.3g}" for share in MEASURED) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(MEASURED))
    for method, found in by_method.items():
        trained = [result["figures"] for result in found if len(result.get("figures", ())) == len(MEASURED)]
        for name, digits in (("rank", 1), ("between", 2), ("std", 2), ("r2_joined", 3)):
            if trained:
                columns = zip(*([figures[name] for figures in each] for each in trained), strict=True)
                values = " | ".join(f"{statistics.fmean(column):.{digits}f}" for column in columns)
                lines.append(f"| {method} | {name} | {values} |")
    return "\n".join(lines)


def spelled(values: Sequence[float]) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
