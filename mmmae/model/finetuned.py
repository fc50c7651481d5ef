"""Saving and loading of fine-tuned models: task, classes and config as JSON, weights as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import MMMAEConfig
from ..files import write_atomically, write_json
from .encoder import HSIEncoder, LinearClassifier
from .heads import SegmentationModel
from .pretrained import CONFIG_NAME, WEIGHTS_NAME

TASKS = ("classification", "segmentation")
FinetunedModel: TypeAlias = LinearClassifier | SegmentationModel


def save_finetuned(directory: str | Path, model: FinetunedModel, classes: Sequence[str]) -> None:
    """Write `config.json` (task, classes, head, encoder) and `model.safetensors`, each of them atomically.

    Args:
        directory: made if it does not exist.
        model: the model to write.
        classes: names of the classes, in the order of the logits.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"task": "classification", "classes": list(classes), "head": {}}
    if isinstance(model, SegmentationModel):
        head = {"width": model.head.folds[0].out_channels, "blocks": list(model.blocks)}
        config.update(task="segmentation", head=head)
    config["encoder"] = model.encoder.config.to_dict()
    tensors = {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}
    write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(directory / CONFIG_NAME, config)


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
            raise FileNotFoundError(f"{directory / name}: no such file, expected a folder with a fine-tuned model")
    config = _read_config(directory / CONFIG_NAME)
    try:
        with torch.device("meta"):
            encoder = HSIEncoder(MMMAEConfig.from_dict(config["encoder"]), kernels, attention)
            model = build(config["task"], encoder, len(config["classes"]), **config["head"])
        model.load_state_dict(load_file(directory / WEIGHTS_NAME), strict=True, assign=True)
    except (RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{directory}: the files do not fit together as a fine-tuned model: {error}") from error
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model.eval(), config["classes"]


def is_finetuned(directory: str | Path) -> bool:
    """Return whether a folder holds a fine-tuned model, rather than an encoder or a whole model."""
    try:
        config = json.loads((Path(directory) / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "task" in config and "classes" in config


def build(task: str, encoder: HSIEncoder, classes: int, **head: Any) -> FinetunedModel:
    """Make a model for a task, with an untrained head."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, must be one of {', '.join(TASKS)}")
    kind = SegmentationModel if task == "segmentation" else LinearClassifier
    return kind(encoder, classes, **head)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    kinds = {"task": str, "classes": list, "head": dict, "encoder": dict}
    if not isinstance(config, dict) or any(not isinstance(config.get(part), kind) for part, kind in kinds.items()):
        raise ValueError(f"{path}: not the config of a fine-tuned model, expected {', '.join(kinds)} in it")
    return config
