"""Fine-tune an encoder on labelled subjects with Lightning, and write model and scores into the run's folder."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor

from ...data.loading import lost_workers_told
from ...data.subjects import Subjects
from ...files import check_can_write, hold, write_json
from ...model.encoder import HSIEncoder
from ...model.finetuned import MOST_PIXELS, FinetunedModel, build, load_finetuned
from ...model.heads import SegmentationModel
from ...precision import resolve_precision, use_tf32
from ...tuning import tune_cpu
from ..distributed import World, cluster_environment
from ..pictures import check_rgb
from ..precision import find_device, precision_plugin
from .divided import Split
from .labelled import Labelled, loader, trained_labels
from .labels import Labels, count_labels
from .maps import write_maps
from .module import Finetuning
from .page import write_page
from .pixels import LabelledPixels, check_window
from .scores import write_confusion
from .settings import FinetuneSettings
from .splits import divide


def finetune(
    encoder: HSIEncoder,
    subjects: Subjects,
    labels: Labels,
    out: str | Path,
    settings: FinetuneSettings | None = None,
    *,
    split: str | Split | None = None,
    validation: Sequence[str] | float = 0.2,
    fold: str | None = None,
    window: int | None = None,
    rgb: tuple[int, int, int] | None = None,
    maps: int = 8,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
) -> tuple[FinetunedModel, dict[str, Any]]:
    """Train a head and, unless the mode is `probe`, the encoder under it, and write the run's folder.

    The folder then holds `config.json`, `normalization.json`, `model/` for `mmmae.load_finetuned` together with the
    statistics of its input, `metrics.json`, `confusion.csv` and `.png`, `logs/` (CSV), for a segmentation `maps/`
    with pictures of held-out subjects, and `report.html`, a page with all of it.

    Args:
        encoder: pretrained or with random weights; trained in place.
        subjects: must have the encoder's number of bands.
        labels: from `read_class_labels` or `read_mask_labels`; subjects without a label are not used.
        out: the run's folder.
        settings: None means the defaults.
        split, validation, fold: which labels train and which are held out, see `divide`; or a `Split` made before.
        window: classify each pixel by the square of so many pixels around it, an odd number; the subjects must be
            whole scenes, which stay in memory. None: classify whole subjects, or all pixels of them at once.
        rgb: bands that maps show as red, green and blue; None spreads three over the spectrum.
        maps: largest number of maps to draw.
        callbacks: Lightning callbacks of your own.
        loggers: Lightning loggers that get the figures too, besides the file in `logs/`.

    Returns:
        The kept model in evaluation mode, and the content of `metrics.json`.

    Raises:
        ValueError: encoder, subjects and labels do not fit, the folder holds a run, or a loss is not finite.
        OSError: a file can't be read or written.

    Example:
        >>> import mmmae
        >>> from pathlib import Path
        >>> from mmmae.phantom import Phantom
        >>> from mmmae.training.finetuning.finetune import finetune
        >>> from mmmae.training.finetuning.labels import read_class_labels
        >>> from mmmae.training.finetuning.settings import FinetuneSettings
        >>> subjects = Phantom(6, image_size=32)
        >>> rows = [f"{name},{index % 2}" for index, name in enumerate(subjects.names)]
        >>> _ = Path("labels.csv").write_text("\\n".join(["name,label", *rows]))
        >>> labels = read_class_labels("labels.csv", subjects)
        >>> encoder = mmmae.fast_model("tiny", image_size=32).hsi_encoder()
        >>> model, report = finetune(encoder, subjects, labels, "run", FinetuneSettings(epochs=1), validation=0.5)
        epoch 1/1  loss ...  validation f1_macro ..., accuracy ..., kept
        >>> len(report["training"]), len(report["validation"])
        (3, 3)
    """
    tune_cpu()
    settings = settings or FinetuneSettings()
    out = Path(out)
    _check(encoder, subjects, labels, settings, rgb)
    if window is not None:
        check_window(window, subjects, labels)
    parts = _divided(subjects, labels, split, validation=validation, fold=fold, seed=settings.seed, window=window)
    training, held_out = list(parts.training.counts), list(parts.held_out.counts)
    check_can_write(out)
    check_free(out)
    normalization = subjects.normalization  # computed before workers start, and before the folder is made
    device = find_device(settings.device)
    settings = dataclasses.replace(
        settings, precision=resolve_precision(settings.precision, device, encoder.config.dim)
    )
    trainer = _trainer(out, settings, device, callbacks, loggers)
    in_tf32 = settings.precision == "32" and use_tf32(trainer.strategy.root_device)
    if in_tf32 or settings.precision != "32":
        print(f"precision {settings.precision}" + (", matrix products in TF32" if in_tf32 else ""))
    trained = parts.training if window is not None else trained_labels(subjects, parts.training, training)
    drawn, left = (sum(int(side.counts[index].sum()) for index in training) for side in (parts.training, trained))
    if parts.roles and left < drawn:
        size = encoder.config.image_size
        print(
            f"resized to {size} x {size}, {left:,} of {drawn:,} training pixels are left; tiles of that size keep all"
        )
    torch.manual_seed(settings.seed)
    task = labels.task if window is None else "pixels"
    model = build(task, encoder, len(labels.classes), **_head_arguments(task, settings))
    sides = {"training": training, "validation": held_out}
    names = {side: [subjects.names[index] for index in chosen] for side, chosen in sides.items()}
    described = {"task": task, "classes": labels.classes, "encoder": encoder.config.to_dict()}
    described |= {"settings": dataclasses.asdict(settings), "subjects": repr(subjects), **names}
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        check_free(out)  # another run may have begun since
        write_json(out / "config.json", described)
    for folder in (out, out / "model"):
        folder.mkdir(exist_ok=True)
        normalization.save(folder / "normalization.json")

    train: Labelled | LabelledPixels
    validate: Labelled | LabelledPixels
    if window is None:
        train = Labelled(subjects, parts.training, training, settings, augmented=settings.augment)
        validate = Labelled(subjects, parts.held_out, held_out, settings, augmented=False, whole=True)
    else:
        scenes = {index: subjects[index] for index in sorted({*training, *held_out})}
        train = LabelledPixels(scenes, parts.training, window, settings, augmented=settings.augment)
        validate = LabelledPixels(scenes, parts.held_out, window, settings, augmented=False)
    if isinstance(model, SegmentationModel):
        model.fit_spectra(spread_volumes(train, encoder.config.image_size))
    places = {subjects.names[index]: subjects.positions[index] for index in held_out} if subjects.positions else {}
    module = Finetuning(model, trained, training, out, settings, places, window)
    if window is None:
        module.window, module.whole = find_training_size(subjects, training)
    loaders = (
        loader(train, len(train.chosen), settings, shuffled=True),
        loader(validate, len(validate.chosen), settings, shuffled=False),
    )
    with warnings.catch_warnings():
        for message in ("does not have many workers", "LeafSpec", "smaller than the logging interval", "exists and is"):
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        try:
            with lost_workers_told():
                trainer.fit(module, *loaders)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
    counts = torch.stack([trained.counts[index] for index in training]).sum(0)
    missing = [name for name, count in zip(labels.classes, counts.tolist(), strict=True) if count == 0]
    scores = module.report
    for row, count in zip(scores["classes"].values(), count_labels(subjects, parts.training), strict=True):
        row["training"] = count
    report = {
        "epoch": module.kept,
        "epochs": settings.epochs,
        "keep": settings.keep,
        **scores,
        "not_trained": missing,
        "split": parts.text,
        "neighbours": parts.neighbours,
        **({"pixels": parts.pixels()} if parts.roles else {}),
        **names,
    }
    write_json(out / "metrics.json", report)
    write_confusion(labels.classes, report["confusion"], out)
    kept, _ = load_finetuned(out / "model")
    if labels.task == "segmentation" and maps > 0:
        shown = labels if parts.roles else parts.held_out
        write_maps(
            kept.to(device),
            subjects,
            shown,
            held_out,
            out / "maps",
            count=maps,
            rgb=rgb,
            roles=parts.roles,
            window=window,
            precision=settings.precision,
        )
        kept.cpu()
    facts = {"data": repr(subjects), "split": parts.text, "epoch": f"{module.kept} of {settings.epochs}"}
    write_page(out, "Fine-tuning", {"task": task, **facts, "mode": settings.mode, "seed": settings.seed}, report)
    return kept, report


def spread_volumes(train: Labelled | LabelledPixels, image_size: int) -> Iterator[Tensor]:
    """Yield cubes `[1, C, T, H, W]` that are spread evenly over those to train with, of some 2**18 pixels in all."""
    items = len(train.chosen)
    count = min(items, max(16, 2**18 // image_size**2))
    return (train[number * items // count].hsi[None] for number in range(count))


def find_training_size(subjects: Subjects, training: Sequence[int]) -> tuple[int | None, bool]:
    """Return the side of the squares that a model sees, and whether it sees whole cubes of several sizes or shapes.

    These are sizes before all are resized to the model's; None if they are not known, or not of one square.
    """
    if subjects.positions:
        return subjects.positions[training[0]].window.height, False
    sizes = {subjects.cube_size(index) for index in training}
    if None in sizes:
        return None, False
    (height, width), *others = (size for size in sizes if size is not None)
    return (height, False) if height == width < MOST_PIXELS and not others else (None, True)


def _head_arguments(task: str, settings: FinetuneSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {"freeze_encoder": settings.mode == "probe"}
    if task != "classification":
        arguments |= {"width": settings.head_width, "sides": settings.head_sides}
        arguments |= {"blocks": ()} if settings.mode == "head" else {}
    return arguments


def _divided(subjects: Subjects, labels: Labels, split: str | Split | None, **options: Any) -> Split:
    return split if isinstance(split, Split) else divide(subjects, labels, split, **options)


def _check(
    encoder: HSIEncoder,
    subjects: Subjects,
    labels: Labels,
    settings: FinetuneSettings,
    rgb: tuple[int, int, int] | None,
) -> None:
    if subjects.bands != encoder.config.bands:
        raise ValueError(f"the subjects have {subjects.bands} bands, the encoder takes {encoder.config.bands}")
    if settings.mode == "head" and labels.task == "classification":
        raise ValueError("mode is 'head', which classifies pixels by their bands; subjects need full or probe")
    if len(labels.classes) < 2:
        raise ValueError(f"the labels have only the class {labels.classes[0]!r}, expected at least two classes")
    if not isinstance(settings.class_weights, str) and len(settings.class_weights) != len(labels.classes):
        raise ValueError(
            f"class_weights has {len(settings.class_weights)} numbers, expected {len(labels.classes)}, for the classes "
            f"{', '.join(labels.classes)}"
        )
    check_rgb(rgb, subjects.bands)


def check_free(out: Path) -> None:
    """Raise ValueError if a folder holds a run."""
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a run already; name another folder (--out)")


def _trainer(
    out: Path,
    settings: FinetuneSettings,
    device: torch.device,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
) -> lightning.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        return lightning.Trainer(
            accelerator=settings.device,
            devices=1,
            max_epochs=settings.epochs,
            check_val_every_n_epoch=settings.epochs if settings.keep == "last" else 1,
            gradient_clip_val=settings.clip,
            logger=[CSVLogger(out, name="logs"), *loggers],
            callbacks=list(callbacks),
            plugins=[precision_plugin(settings.precision, device), *cluster_environment(World(0, 1, 1))],
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(f"device is {settings.device!r}, which can't be used: {error}") from error
