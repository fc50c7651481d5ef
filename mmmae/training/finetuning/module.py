"""The Lightning module of fine-tuning, with its learning rates and weights of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from ...data.tiles import Position
from ...model.finetuned import FinetunedModel, save_finetuned
from ..module import learning_rate_factor, reading_waits
from .labelled import Item
from .labels import Labels
from .losses import classification_loss
from .scores import SceneScores, Scores, main_score
from .settings import FinetuneSettings

READ_EVERY = 50  # steps between checks of the losses, if these make the host wait for the device


class Finetuning(lightning.LightningModule):
    """The Lightning module of fine-tuning: losses, optimiser and schedule, and the scores of each epoch.

    The scores of a segmentation are those of all labels of whole scenes; of tiles, if `positions` has their places.

    Attributes:
        report: the scores of the epoch whose model is kept.
        kept: the number of that epoch, from 1.
        window, whole: what cubes the model is trained on, as in `FinetunedConfig`.
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
        of_scenes = labels.task == "segmentation" and window is None
        self.scenes = SceneScores(self.scores, positions or {}) if of_scenes else None
        self.register_buffer("class_weights", class_weights(labels, training, settings), persistent=False)
        self.window, self.whole = window, False
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
                self.out / "model",
                self.model,
                self.labels.classes,
                numbers=self.labels.numbers,
                window=self.window,
                whole=self.whole,
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
