"""Land cover of held-out scenes: a pretrained encoder against random weights, the head alone, and spectra alone.

Five TerraMesh scenes are cut into crops of 64 x 64 pixels. A model is pretrained on all crops without labels (optical,
guided by radar and elevation), and its encoder is fine-tuned on labelled crops of some scenes, with optical bands only.
Each scene but the one of snow is held out once. Each result is appended to `results.jsonl` at once, so that a stopped
run can be continued with the same command:

    python experiments/land_cover.py --data DIR --out runs/land-cover
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

import mmmae
from mmmae.data import PairedFolder, Sample, Subjects, read_cube
from mmmae.training.finetuning.finetune import finetune
from mmmae.training.finetuning.labels import UNLABELLED, Labels, read_mask_labels
from mmmae.training.finetuning.settings import FinetuneSettings
from mmmae.training.pretrain import pretrain
from mmmae.training.settings import PretrainSettings

TILE = 64
AUX = {"vv": "S1RTC:0", "vh": "S1RTC:1", "dem": "DEM"}
CLASSES = {"1": "water", "2": "trees", "4": "crops", "5": "built", "9": "rangeland"}  # in two scenes or more
SNOW = "609U_541L_3_0"  # only snow, which no other scene has: never held out, and not in the statistics
HELD_OUT = ("282D_485L_3_3", "38D_378R_2_3", "433D_629L_3_1", "637U_59R_1_3")
FEW = 2  # labelled crops for each scene, with few labels
PRECISION = "32"  # not `auto`, so that the scores do not depend on what it finds on a machine
LIGHT = {"decoder_dim": 128, "decoder_depth": 1, "decoder_heads": 2, "aux_dim": 64, "aux_depth": 2}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"name": "tiny", "patch": (3, 8, 8)},
    "base-4": {"name": "base", "patch": (3, 16, 16), "depth": 4, **LIGHT},  # the width of `base`, four blocks
}
LIMIT = "all labels of drawn classes"  # a regression, for few labels: what more labels of the classes drawn would give
PIXELWISE = ("random forest", "logistic regression", LIMIT)
NETWORKS = ("head alone", *(f"{model} {start}" for model in MODELS for start in ("scratch", "pretrained")))
METHODS = (*PIXELWISE, *NETWORKS)


@dataclasses.dataclass(frozen=True)
class Course:
    """Settings of pretraining, fine-tuning and the forest.

    Attributes:
        pretraining: settings, by model.
        finetuning: settings, by share of the labels.
        trees: number of trees in the random forest.
    """

    pretraining: dict[str, dict[str, Any]]
    finetuning: dict[str, dict[str, Any]]
    trees: int


HEAD = {"learning_rate": 3e-3, "class_weights": "balanced", "head_width": 32, "augment": True}
FULL = Course(
    pretraining={
        "tiny": {"batch": 16, "flip": True, "steps": 5000, "learning_rate": 1e-3, "precision": PRECISION},
        "base-4": {"batch": 16, "flip": True, "steps": 1000, "learning_rate": 3e-4, "precision": "bf16"},
    },
    finetuning={
        "few": {"batch": 4, "epochs": 60, "head_sides": (1,), **HEAD},
        "all": {"batch": 4, "epochs": 8, **HEAD},
    },
    trees=100,
)
QUICK = Course(
    pretraining={name: {"batch": 2, "warmup": 0, "steps": 2, "precision": PRECISION} for name in MODELS},
    finetuning={share: {"batch": 16, "epochs": 1, **HEAD} for share in ("few", "all")},
    trees=2,
)


def main() -> None:
    """Run the tasks that have no results yet, and print the table."""
    options = parse()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.data / "terramesh"
    aux = {name: folder / place for name, place in AUX.items()}
    scenes, others = write_scenes(folder / "S2L2A", options.out / "scenes")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*auxiliary files have no hyperspectral file.*")  # those of SNOW
        statistics = PairedFolder(others, aux).normalization
    crops = {"image_size": TILE, "tile": TILE, "normalization": statistics}
    unlabelled = Remembered(PairedFolder(scenes, aux, overlap=TILE // 2, **crops))
    labelled = Remembered(PairedFolder(scenes, **crops))
    labels = read_mask_labels(folder / "LULC", labelled)
    experiment = Experiment(
        unlabelled, labelled, labels, options.out, QUICK if options.quick else FULL, options.threads
    )
    done = {key(result) for result in read_results(options.out)}
    for task in tasks(options.seeds, options.methods, HELD_OUT[:1] if options.quick else HELD_OUT):
        if key(task) not in done:
            start = time.perf_counter()
            confusion = experiment.run(task)
            seconds = round(time.perf_counter() - start, 1)
            with (options.out / "results.jsonl").open("a") as file:
                file.write(json.dumps({**task, "confusion": confusion, "seconds": seconds}) + "\n")
    text = table(read_results(options.out), labels)
    (options.out / "table.md").write_text(text + "\n")
    print(text)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("MMMAE_DATA", ".")), help="default: MMMAE_DATA"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/land-cover"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few steps and one scene, to see that it runs")
    options = parser.parse_args()
    if not (options.data / "terramesh" / "LULC").is_dir():
        parser.error(f"--data is {options.data}, expected a folder with terramesh/S2L2A, S1RTC, DEM and LULC")
    return options


def tasks(seeds: Sequence[int], methods: Sequence[str], scenes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the tasks: each has a method, a share of the labels, a held-out scene and a seed."""
    for seed in seeds:
        for method in methods:
            for share in ("few",) if method == LIMIT else ("few", "all"):
                for held in scenes:
                    yield {"method": method, "share": share, "held": held, "seed": seed}


def key(result: dict[str, Any]) -> tuple[Any, ...]:
    """Return the fields that identify a result."""
    return tuple(result[part] for part in ("method", "share", "held", "seed"))


def write_scenes(source: Path, out: Path) -> tuple[Path, Path]:
    """Write the scenes with the same scale of reflectance into two folders, the second without the scene of snow.

    Products since Sentinel-2's processing baseline 04.00 have an offset of 1000 in each band. A scene is taken to have
    it if less than 1 % of its values are below 1000.
    """
    folders = out, out.with_name("scenes-for-statistics")
    for folder in folders:
        folder.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        values = read_cube(path).values
        if (values < 1000).float().mean() < 0.01:
            values = values - 1000
        for folder in folders:
            if folder == out or path.stem != SNOW:
                np.save(folder / f"{path.stem}.npy", values.numpy())
    return folders


class Remembered(Subjects):
    """Crops that are read once and kept in memory."""

    def __init__(self, subjects: PairedFolder) -> None:
        self.names, self.bands, self.wavelengths = subjects.names, subjects.bands, subjects.wavelengths
        self.modalities, self.positions = subjects.modalities, subjects.positions
        self.normalization, self.description = subjects.normalization, repr(subjects)
        self.samples = [subjects[index] for index in range(len(subjects))]

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __repr__(self) -> str:
        return self.description


@dataclasses.dataclass
class Experiment:
    """Data and settings that all tasks share."""

    unlabelled: Remembered
    labelled: Remembered
    labels: Labels
    out: Path
    course: Course
    threads: int

    def run(self, task: dict[str, Any]) -> list[list[int]]:
        """Run a task; return the confusion matrix of the crops of the held-out scene."""
        evaluated = [index for index, place in enumerate(self.labelled.positions) if place.scene == task["held"]]
        training = self.training_crops(task["held"], task["share"], task["seed"])
        if task["method"] in PIXELWISE:
            more = self.training_crops(task["held"], "all", task["seed"]) if task["method"] == LIMIT else training
            return self.pixelwise(task["method"], training, more, evaluated, task["seed"])
        return self.network(task, training, evaluated)

    def training_crops(self, held: str, share: str, seed: int) -> list[int]:
        """Return the labelled crops of the scenes that are not held out: all of them, or a few from each scene."""
        scenes: dict[str, list[int]] = {}
        for index, place in enumerate(self.labelled.positions):
            if place.scene != held:
                scenes.setdefault(place.scene, []).append(index)
        draw = np.random.default_rng(seed)
        chosen = (draw.choice(crops, FEW if share == "few" else len(crops), replace=False) for crops in scenes.values())
        return sorted(int(index) for crops in chosen for index in crops)

    def network(self, task: dict[str, Any], training: list[int], evaluated: list[int]) -> list[list[int]]:
        """Fine-tune an encoder; the last epoch is used, because the held-out scenes must not select one."""
        seed, share, method = task["seed"], task["share"], task["method"]
        name, start = ("tiny", "scratch") if method == "head alone" else method.split()
        fields = {"image_size": TILE, "aux_patch": 16, "target": "pixels", "aux": self.unlabelled.modalities}
        config = mmmae.MMMAEConfig.preset(**MODELS[name], **fields)
        if start == "pretrained":
            run = self.out / "pretraining" / f"{name}-{seed}"
            if not (run / "encoder" / "config.json").exists():
                settings = PretrainSettings(**self.course.pretraining[name], seed=seed)
                pretrain(config, self.unlabelled, run, settings, resume="auto")
            encoder = mmmae.HSIEncoder.from_pretrained(run / "encoder")
        else:
            torch.manual_seed(seed)
            encoder = mmmae.HSIEncoder(config.replace(aux={}))
        course = FinetuneSettings(
            **self.course.finetuning[share],
            mode="head" if method == "head alone" else "full",
            seed=seed,
            keep="last",
            precision=PRECISION,
        )
        run = self.out / "finetuning" / f"{method.replace(' ', '-')}-{share}-{task['held']}-{seed}-{time.time_ns()}"
        chosen = self.labels.only(training + evaluated)
        _, report = finetune(encoder, self.labelled, chosen, run, course, validation=[task["held"]], maps=0)
        confusion: list[list[int]] = report["confusion"]
        return confusion

    def pixelwise(
        self, method: str, drawn: list[int], training: list[int], evaluated: list[int], seed: int
    ) -> list[list[int]]:
        """Fit a classifier of single spectra to the pixels of the classes that the crops `drawn` show.

        It is a random forest, or a logistic regression with balanced classes.
        """
        spectra, targets = self.pixels(training)
        shown = self.pixels(drawn)[1].unique()
        known = (torch.isin(targets, shown) & (targets != UNLABELLED)).nonzero()[:, 0]
        if method == "random forest":
            options = {"min_samples_leaf": 5, "random_state": seed, "n_jobs": self.threads}
            classifier = RandomForestClassifier(self.course.trees, max_samples=min(50_000, len(known)), **options)
        else:
            known = known[np.random.default_rng(seed).permutation(len(known))[:20_000]]
            regression = LogisticRegression(max_iter=500, class_weight="balanced")
            classifier = make_pipeline(StandardScaler(), regression)
        classifier.fit(spectra[known].numpy(), targets[known].numpy())
        spectra, targets = (pixels[self.once(evaluated)] for pixels in self.pixels(evaluated))
        predicted = torch.from_numpy(classifier.predict(spectra.numpy()))
        count = len(self.labels.classes)
        confusion: list[list[int]] = multiclass_confusion_matrix(
            predicted, targets, count, ignore_index=UNLABELLED
        ).tolist()
        return confusion

    def pixels(self, crops: list[int]) -> tuple[Tensor, Tensor]:
        """Return the spectra `[n, T]` and targets `[n]` of all pixels in some crops."""
        spectra = [self.labelled[index].hsi[0].flatten(1).T for index in crops]
        targets = [self.labels.target(index, (TILE, TILE)).flatten() for index in crops]
        return torch.cat(spectra), torch.cat(targets)

    def once(self, crops: list[int]) -> Tensor:
        """Return the numbers of the pixels in crops of one scene, without those that a crop before shows too."""
        windows = [self.labelled.positions[index].window for index in crops]
        sides = [(np.arange(window.row, window.row + TILE), np.arange(TILE) + window.column) for window in windows]
        places = np.stack([rows[:, None] * 2**16 + columns for rows, columns in sides])
        return torch.from_numpy(np.unique(places, return_index=True)[1])


def read_results(out: Path) -> list[dict[str, Any]]:
    """Read the results so far."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[dict[str, Any]], labels: Labels) -> str:
    """Return a Markdown table of the mIoU over all held-out scenes: mean and standard deviation over the seeds."""
    confusions: dict[tuple[str, str, int], Tensor] = {}
    for result in results:
        place = (result["method"], result["share"], result["seed"])
        confusions[place] = confusions.get(place, torch.zeros(())) + torch.tensor(result["confusion"]).double()
    places = [labels.classes.index(number) for number in CLASSES]
    lines = [f"| labels | method | mIoU | {' | '.join(CLASSES.values())} |"]
    lines.append("| --- | --- | ---: |" + " ---: |" * len(CLASSES))
    for share in ("few", "all"):
        for method in METHODS:
            found = [iou(matrix)[places] for (by, of, _), matrix in confusions.items() if (by, of) == (method, share)]
            if found:
                ious = torch.stack(found)
                spread = f" ± {ious.mean(1).std():.3f}" if len(ious) > 1 else ""
                by_class = " | ".join(f"{value:.3f}" for value in ious.mean(0).tolist())
                lines.append(f"| {share} | {method} | {ious.mean():.3f}{spread} | {by_class} |")
    return "\n".join(lines)


def iou(confusion: Tensor) -> Tensor:
    """Compute the intersection over union of each class, `[classes]`, from a confusion matrix."""
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits).clamp(min=1)


if __name__ == "__main__":
    main()
