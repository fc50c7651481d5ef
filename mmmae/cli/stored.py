"""Settings that a checkpoint or a file holds, put before the options of the command line, which override them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from mmmae_kernels.checks import described

from ..files import json_value
from ..training.finetuning.settings import FinetuneSettings
from ..training.settings import PretrainSettings

if TYPE_CHECKING:
    from ..training.checkpoints import Checkpoint

# By command: its settings, the key under which a file holds the config, and what else a run writes into its file.
FILES = {
    "pretrain": (PretrainSettings, "model", {"ranks", "names", "finished", "subjects"}),
    "finetune": (FinetuneSettings, "encoder", {"task", "classes", "subjects", "training", "validation"}),
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Settings, config and checkpoint that the files of a command hold.

    Args:
        options: settings, as words of the command line.
        model: fields of the model's config.
        checkpoint: the checkpoint to resume from, or None.
    """

    options: Sequence[str] = ()
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: Checkpoint | None = None


@dataclasses.dataclass(frozen=True)
class Sources:
    """The options that say where settings are stored."""

    config: Path | None = None
    resume: str | None = None
    out: Path | None = None


def read_stored(command: str, arguments: Sequence[str]) -> Stored:
    """Read the checkpoint and the file that the arguments of a command name, once.

    Raises:
        ValueError: one of them is broken, or is not what the command takes.
        FileNotFoundError: one of them does not exist.
    """
    if command not in FILES or not any(word.startswith(("--config", "--resume")) for word in arguments):
        return Stored()
    settings, model, others = FILES[command]
    sources, _ = tyro.cli(Sources, prog=f"mmmae {command}", args=arguments, return_unknown_args=True, add_help=False)
    checkpoint, options, fields = None, [], {}
    if command == "pretrain" and sources.resume is not None:
        from ..training.checkpoints import find_checkpoint
        from ..training.folders import default_folder

        out = sources.out or default_folder(Path("runs/pretrain"), sources.resume)
        checkpoint = find_checkpoint(out, sources.resume)
        if checkpoint is not None:
            options += as_options(checkpoint.settings)
    if sources.config is not None:
        content = read_file(sources.config, {"settings", model, *others})
        options += as_options(_mapping(content, "settings", sources.config, settings))
        fields = _mapping(content, model, sources.config)
    return Stored(options, fields, checkpoint)


def read_file(path: Path, keys: set[str]) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a mapping with some of `keys`."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text, expected JSON or YAML") from error
    try:
        content = json_value(text)
    except ValueError:
        try:
            content = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise ValueError(f"{path}: neither JSON nor YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping with some of {', '.join(sorted(keys))}")
    unknown = [str(key) for key in content if key not in keys]
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}, must be one of {', '.join(sorted(keys))}")
    return content


def as_options(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as words of the command line."""
    words = []
    for field, value in settings.items():
        option = field.replace("_", "-")
        if any(not isinstance(part, (str, int, float, type(None))) for part in _parts(value)):
            raise ValueError(f"{field} is {described(value)}, expected a number, a word, or a list of them")
        if field == "compile" and value is False:
            value = "off"  # a later --compile overrides it, but not --no-compile
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, (list, tuple)):
            words.append(f"--{option}={','.join(map(str, value))}")
        elif value is not None:
            words.append(f"--{option}={value}")
    return words


def _parts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _mapping(content: Mapping[str, Any], key: str, path: Path, fields_of: type | None = None) -> dict[str, Any]:
    part = content.get(key, {})
    if not isinstance(part, dict):
        raise ValueError(f"{path}: {key} is {described(part)}, expected a mapping of fields")
    if fields_of is not None:
        known = [field.name for field in dataclasses.fields(fields_of)]
        unknown = [str(field) for field in part if field not in known]
        if unknown:
            raise ValueError(f"{path}: {key} has the unknown field {unknown[0]!r}, must be one of {', '.join(known)}")
    return part
