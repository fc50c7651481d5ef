"""Fine-tune an encoder on labelled subjects with Lightning, and write model and scores into the run's folder."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
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
from ...data.tiles import Position
from ...files import check_can_write, hold, write_json
from ...model.encoder import HSIEncoder
from ...model.finetuned import FinetunedModel, build, load_finetuned, save_finetuned
from ...precision import resolve_precision, use_tf32
from ...tuning import tune_cpu
from ..distributed import World, cluster_environment
from ..module import learning_rate_factor, reading_waits
from ..pictures import check_rgb
from ..precision import find_device, precision_plugin
from .divided import Split
from .labelled import Item, Labelled, loader
from .labels import Labels
from .losses import classification_loss
from .maps import write_maps
from .page import write_page
from .pixels import LabelledPixels, check_window
from .scores import SceneScores, Scores, main_score, write_confusion
from .settings import FinetuneSettings
from .splits import divide

READ_EVERY = 50  # steps between checks of the losses, if these make the host wait for the device


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
    places = {subjects.names[index]: subjects.positions[index] for index in held_out} if subjects.positions else {}
    module = Finetuning(model, parts.training, training, out, settings, places, window)
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
    trained = torch.stack([parts.training.counts[index] for index in training]).sum(0)
    missing = [name for name, count in zip(labels.classes, trained.tolist(), strict=True) if count == 0]
    report = {
        "epoch": module.kept,
        "epochs": settings.epochs,
        "keep": settings.keep,
        **module.report,
        "not_trained": missing,
        "split": parts.text,
        **({"pixels": parts.pixels()} if parts.roles else {}),
        **names,
    }
    write_json(out / "metrics.json", report)
    write_confusion(labels.classes, report["confusion"], out)
    kept, _ = load_finetuned(out / "model")
    if labels.task == "segmentation" and maps > 0:
        shown = labels if parts.roles else parts.held_out
        write_maps(kept, subjects, shown, held_out, out / "maps", count=maps, rgb=rgb, roles=parts.roles, window=window)
    facts = {"data": repr(subjects), "split": parts.text, "epoch": f"{module.kept} of {settings.epochs}"}
    write_page(out, "Fine-tuning", {"task": task, **facts, "mode": settings.mode, "seed": settings.seed}, report)
    return kept, report


class Finetuning(lightning.LightningModule):
    """The Lightning module of fine-tuning: losses, optimiser and schedule, and the scores of each epoch.

    The scores of a segmentation of tiles are those of whole scenes if `positions` has the place of each tile.

    Attributes:
        report: the scores of the epoch whose model is kept.
        kept: the number of that epoch, from 1.
    """

    def __init__(
        self,
        model: FinetunedModel,
        labels: Labels,
        training: Sequence[int],
        out: Path,
        settings: FinetuneSettings,
        positions: Mapping[str, Position] | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.labels, self.out, self.settings = model, labels, out, settings
        self.scores = Scores(labels.task, labels.classes)
        self.scenes = SceneScores(self.scores, positions) if positions and labels.task == "segmentation" else None
        self.register_buffer("class_weights", class_weights(labels, training, settings), persistent=False)
        self.window = window or next((position.window.height for position in (positions or {}).values()), None)
        self.report: dict[str, Any] = {}
        self.kept = 0
        self.losses: list[Tensor] = []  # of the steps in this epoch
        self.names: list[list[str]] = []  # subjects of the steps whose losses were not checked yet

    def training_step(self, batch: Item, batch_idx: int) -> Tensor:
        """Return the loss of the labelled targets."""
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        self.names.append(batch.name)
        if not reading_waits(self.device) or len(self.names) == READ_EVERY:
            self._check_losses()
        return loss

    def loss(self, batch: Item) -> Tensor:
        """Return the loss of the labelled targets, weighted by class; 0 if none is labelled."""
        assert isinstance(self.class_weights, Tensor)
        return classification_loss(self.settings.loss, self.model(batch.hsi), batch.target, self.class_weights)

    def on_validation_start(self) -> None:
        """Check the losses before a model may be kept."""
        self._check_losses()

    def _check_losses(self) -> None:
        """Raise ValueError at the first step since the last call whose loss is not finite; waits for the device."""
        names, self.names = self.names, []
        first = len(self.losses) - len(names)
        losses = torch.stack(self.losses[first:]).tolist() if names else []
        for step, (loss, subjects) in enumerate(zip(losses, names, strict=True), start=first + 1):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} in step {step} of epoch {self.current_epoch + 1}, of {', '.join(subjects)}; "
                    "a lower learning rate may help"
                )

    def validation_step(self, batch: Item, batch_idx: int) -> None:
        """Collect predictions."""
        logits = self.model(batch.hsi)
        if self.scenes is None:
            self.scores.update(logits, batch.target)
        else:
            self.scenes.update(batch.name, logits, batch.target)

    def on_validation_epoch_end(self) -> None:
        """Score the epoch, and save its model if it is the best or the last one is kept."""
        if self.scenes is not None:
            self.scenes.finish()
        scores = self.scores.compute()
        self.scores.reset()
        loss = torch.stack(self.losses).mean()
        self.losses.clear()
        name, epoch = main_score(self.labels.task), self.current_epoch + 1
        self.log("loss", loss)
        self.log_dict({f"validation_{key}": scores[key] for key in ("accuracy", "f1_macro", name)})
        better = not self.report or scores[name] > self.report[name]
        if keep := better or self.settings.keep == "last":
            self.report, self.kept = scores, epoch
            save_finetuned(
                self.out / "model", self.model, self.labels.classes, numbers=self.labels.numbers, window=self.window
            )
        print(
            f"epoch {epoch}/{self.settings.epochs}  loss {loss:.4f}  validation {name} {scores[name]:.4f}, accuracy "
            f"{scores['accuracy']:.4f}{', kept' if keep else ''}",
            flush=True,
        )

    def on_train_epoch_end(self) -> None:
        """Log and print the loss of an epoch that is not validated."""
        if self.losses:
            self._check_losses()
            loss = torch.stack(self.losses).mean()
            self.losses.clear()
            self.log("loss", loss)
            print(f"epoch {self.current_epoch + 1}/{self.settings.epochs}  loss {loss:.4f}", flush=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW with lower learning rates in earlier blocks, a linear warm-up and half a cosine to 0."""
        optimizer = torch.optim.AdamW(parameter_groups(self.model, self.settings), lr=self.settings.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.settings.warmup * steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, warmup, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _head_arguments(task: str, settings: FinetuneSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {"freeze_encoder": settings.mode == "probe"}
    if task != "classification":
        arguments |= {"width": settings.head_width} | ({"blocks": ()} if settings.mode == "head" else {})
    return arguments


def parameter_groups(model: FinetunedModel, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """Group the parameters that are trained by learning rate and weight decay, and freeze the others.

    The head and the encoder's last norm have the whole learning rate, block i of L has `layer_decay ** (L - i)` of it,
    patch embedding and positions have `layer_decay ** (L + 1)`. The modes `probe` and `head` freeze
    the encoder.
    """
    depth = model.encoder.config.depth
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        frozen = settings.mode != "full" and name.startswith("encoder.")
        parameter.requires_grad_(not frozen)
        if frozen:
            continue
        distance = 0
        if name.startswith("encoder.blocks."):
            distance = depth - int(name.split(".")[2])
        elif name.startswith(("encoder.patch_embed.", "encoder.pos_embed_")):
            distance = depth + 1
        decays = parameter.dim() > 1 and "pos_embed" not in name
        groups.setdefault((distance, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.learning_rate * settings.layer_decay**distance,
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (distance, decays), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def class_weights(labels: Labels, training: Sequence[int], settings: FinetuneSettings) -> Tensor:
    """Return the weight of each class in the loss `[classes]`; balanced ones sum to the same over a class's labels."""
    counts = torch.stack([labels.counts[index] for index in training]).sum(0).double()
    if settings.class_weights == "none":
        return torch.ones(len(counts))
    if settings.class_weights == "balanced":
        return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()
    return torch.tensor(settings.class_weights)


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
