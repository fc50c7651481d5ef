"""Saving and loading of fine-tuned models: task, classes and config as JSON, weights as safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file

from ..config import MMMAEConfig
from ..files import json_value, write_atomically, write_json
from .encoder import HSIEncoder, LinearClassifier
from .heads import HEAD_FORMAT, SegmentationModel
from .pixels import PixelClassifier
from .pretrained import CONFIG_NAME, WEIGHTS_NAME, check_weights, load_tensors

TASKS = ("classification", "segmentation", "pixels")
MOST_PIXELS = 65_536  # along the side of a window
MOST_VALUE = 65_534  # of a class in a map, whose type has one value more, for pixels without data
FinetunedModel: TypeAlias = LinearClassifier | SegmentationModel  # a PixelClassifier is one of the latter


@dataclasses.dataclass(frozen=True)
class FinetunedConfig:
    """The content of `config.json` beside a fine-tuned model.

    Attributes:
        task: one of `TASKS`.
        classes: names of the classes, in the order of the logits.
        head: arguments of the head.
        encoder: fields of the encoder's config.
        numbers: values of the classes in rasters of labels; None if they are not known.
        window: side in pixels of the squares that the model was trained on, tiles or whole cubes, before they are
            resized to the encoder's image_size; None if they are not known or `whole`. For the task "pixels", of those
            around each pixel.
        whole: whether the model was trained on whole cubes of several sizes or other shapes, each of them resized.
    """

    task: str
    classes: list[str]
    head: dict[str, Any]
    encoder: dict[str, Any]
    numbers: list[int] | None = None
    window: int | None = None
    whole: bool = False

    @property
    def values(self) -> list[int]:
        """Values of the classes in a map: those in labels, or counted from 1 if these are too large for a map.

        Where they are not known: the classes' names if these are numbers, else their places.
        """
        if self.numbers is not None:
            return self.numbers if max(self.numbers) <= MOST_VALUE else list(range(1, len(self.numbers) + 1))
        if all(name.isdecimal() and len(name) < 6 for name in self.classes):
            return [int(name) for name in self.classes]
        return list(range(len(self.classes)))


def save_finetuned(
    directory: str | Path,
    model: FinetunedModel,
    classes: Sequence[str],
    *,
    numbers: Sequence[int] | None = None,
    window: int | None = None,
    whole: bool = False,
) -> None:
    """Write `config.json` (task, classes, head, encoder) and `model.safetensors`, each of them atomically.

    Args:
        directory: made if it does not exist.
        model: the model to write.
        classes: names of the classes, in the order of the logits.
        numbers, window, whole: as in `FinetunedConfig`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    head: dict[str, Any] = {}
    if isinstance(model, SegmentationModel):
        head = {"format": HEAD_FORMAT, "width": model.width, "blocks": list(model.blocks), "sides": list(model.sides)}
    listed = None if numbers is None else [int(number) for number in numbers]
    encoder = model.encoder.config.to_dict()
    config = FinetunedConfig(task_of(model), list(classes), head, encoder, listed, window, whole)
    tensors = {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}
    write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(directory / CONFIG_NAME, dataclasses.asdict(config))


def load_finetuned(
    directory: str | Path, *, kernels: str = "auto", attention: str = "auto"
) -> tuple[FinetunedModel, list[str]]:
    """Load a fine-tuned model, as `mmmae finetune` writes it into `RUN/model`.

    Args:
        directory: a folder with `config.json` and `model.safetensors`.
        kernels, attention: see `mmmae.fast_model`.

    Returns:
        The model in evaluation mode, and the names of its classes in the order of its logits.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken or does not belong to a fine-tuned model.
    """
    directory = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name}: no such file, {_expected(directory)}")
    config = read_finetuned(directory)
    arguments = dict(config.head)
    if config.task in ("segmentation", "pixels") and (found := arguments.pop("format", 1)) != HEAD_FORMAT:
        raise ValueError(
            f"{directory}: its head has format {found}, expected {HEAD_FORMAT}: fine-tune anew, or load it with the "
            "version of mmmae that wrote it"
        )
    try:
        with torch.device("meta"):
            encoder = HSIEncoder(MMMAEConfig.from_dict(config.encoder), kernels, attention)
            model = build(config.task, encoder, len(config.classes), **arguments)
        weights = load_tensors(directory / WEIGHTS_NAME)
        check_weights(model, weights)
        model.load_state_dict(weights, strict=True, assign=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"{directory}: the files do not fit together as a fine-tuned model: {error}") from error
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model.eval(), config.classes


def build(task: str, encoder: HSIEncoder, classes: int, **head: Any) -> FinetunedModel:
    """Make a model for a task, with an untrained head."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, must be one of {', '.join(TASKS)}")
    if task == "classification":
        return LinearClassifier(encoder, classes, **head)
    return (PixelClassifier if task == "pixels" else SegmentationModel)(encoder, classes, **head)


def task_of(model: FinetunedModel) -> str:
    """Return the task of a model, one of `TASKS`."""
    if isinstance(model, PixelClassifier):
        return "pixels"
    return "segmentation" if isinstance(model, SegmentationModel) else "classification"


def is_finetuned(directory: str | Path) -> bool:
    """Return whether a folder holds a fine-tuned model, rather than an encoder or a whole model."""
    try:
        config = json_value((Path(directory) / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "task" in config and "classes" in config


def read_finetuned(directory: str | Path) -> FinetunedConfig:
    """Read what a folder says about its fine-tuned model.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: it is not that of a fine-tuned model.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, {_expected(path.parent)}")
    try:
        found = json_value(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    kinds = {"task": str, "classes": list, "head": dict, "encoder": dict}
    if not isinstance(found, dict) or any(not isinstance(found.get(part), kind) for part, kind in kinds.items()):
        expected = (
            _expected(path.parent) if is_finetuned(path.parent / "model") else f"expected {', '.join(kinds)} in it"
        )
        raise ValueError(f"{path}: not the config of a fine-tuned model, {expected}")
    numbers, window, classes = found.get("numbers"), found.get("window"), [str(name) for name in found["classes"]]
    if numbers is not None and not (
        isinstance(numbers, list)
        and len(numbers) == len(classes)
        and all(isinstance(number, int) and number >= 0 for number in numbers)
    ):
        raise ValueError(f"{path}: numbers is {str(numbers)[:60]}, expected a whole number >= 0 for each class")
    if window is not None and not (isinstance(window, int) and 0 < window < MOST_PIXELS):
        raise ValueError(f"{path}: window is {str(window)[:60]}, expected a whole number of pixels, or null")
    if not isinstance(whole := found.get("whole", False), bool):
        raise ValueError(f"{path}: whole is {str(whole)[:60]}, expected true or false")
    return FinetunedConfig(found["task"], classes, found["head"], found["encoder"], numbers, window, whole)


def _expected(directory: Path) -> str:
    """Return what is expected where a folder holds no fine-tuned model, for a message."""
    if is_finetuned(directory / "model"):
        return f"expected the folder of the model itself, {directory / 'model'}"
    return "expected a folder with a fine-tuned model"
