"""Saving and loading of models, in folders and on the Hub, as safetensors and JSON: written atomically, no pickle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import MMMAEConfig, parse_json
from ..files import check_can_write, write_atomically, write_json
from .position import resize_positions

CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"
MODEL_TYPE = "mmmae"  # by which transformers finds the class of a folder, see `mmmae.interop.huggingface`
FOREIGN = ("model_type", "architectures", "dtype", "transformers_version")  # what transformers writes beside our fields
SHOWN = 6  # names in a message
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CARD = """---
{{ card_data }}
---

# {{ kind }}

Pretrained by masked autoencoding of hyperspectral images, with {{ parameters }} M parameters. Load it by

```python
import mmmae

model = mmmae.{{ kind }}.from_pretrained("{{ repo_id }}")
```

Its config:

```json
{{ config }}
```
"""
Model = TypeVar("Model", bound="Pretrained")


class Pretrained(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="mmmae",
    tags=["hyperspectral", "masked-autoencoder"],
    model_card_template=CARD,
):
    """Base class of models that are saved to and loaded from a folder or the Hub.

    The upload and the model card are the mixin's. Its `save_pretrained` would delete the old config before the new one
    is written, and its `from_pretrained` does not say which file is broken.
    """

    config: MMMAEConfig

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write `config.json` and `model.safetensors` into a folder, each of them atomically.

        Args:
            save_directory: made if it does not exist; other files in it are kept.
            config: ignored; the mixin has this argument, a model of this package has its own config.
            repo_id: name on the Hub; None means the name of the folder.
            push_to_hub: upload the files too.
            model_card_kwargs: fields of the model card. If not None, the card is written as `README.md`.
            push_to_hub_kwargs: see `push_to_hub`.

        Returns:
            The address of the uploaded commit, or None.

        Raises:
            OSError: a file can't be written; the file that was there before is intact.

        Example:
            >>> model = mmmae.fast_model("tiny")
            >>> model.save_pretrained(folder / "model")
            >>> model = mmmae.FastModel.from_pretrained(folder / "model")
            >>> encoder = mmmae.HSIEncoder.from_pretrained(folder / "model", image_size=112)
        """
        directory = Path(save_directory)
        save_weights(directory, self.config, self.state_dict())
        if model_card_kwargs is not None:
            card = self.generate_model_card(
                **{
                    "kind": type(self).__name__,
                    "parameters": f"{sum(parameter.numel() for parameter in self.parameters()) / 1e6:.2f}",
                    "config": self.config.to_json(),
                    "repo_id": repo_id or directory.name,
                    **model_card_kwargs,
                }
            )
            write_atomically(directory / CARD_NAME, lambda path: path.write_text(str(card), encoding="utf-8"))
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or directory.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload config, weights and a model card to the Hub, in one commit.

        Args:
            repo_id: `owner/name`; the repository is made if it does not exist.
            options: `commit_message`, `private`, `token`, `branch`, `create_pr`, `model_card_kwargs` and patterns, as
                for `huggingface_hub.ModelHubMixin.push_to_hub`.

        Returns:
            The address of the commit.
        """
        options["model_card_kwargs"] = {"repo_id": repo_id, **(options.get("model_card_kwargs") or {})}
        return super().push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | Path,
        *,
        kernels: str = "auto",
        attention: str = "auto",
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **overrides: Any,
    ) -> Model:
        """Load what `save_pretrained` wrote; an encoder also from the folder of a whole or of a fine-tuned model.

        Args:
            pretrained_model_name_or_path: a folder with `config.json` and `model.safetensors`; or, if there is no such
                folder, a string `owner/name`: a repository on the Hub.
            kernels, attention: see `mmmae.fast_model`.
            force_download, token, cache_dir, local_files_only, revision: for the Hub, see
                `huggingface_hub.snapshot_download`.
            overrides: config fields to change; `image_size`, `bands` and `wavelengths` resize the position embeddings.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is broken, or the weights do not fit the config.
        """
        directory = Path(pretrained_model_name_or_path)
        if not directory.is_dir() and _names_a_repository(pretrained_model_name_or_path):
            directory = _download(
                str(pretrained_model_name_or_path),
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        saved, weights = load_weights(directory)
        saved, weights = cls._select_weights(directory, saved, weights)
        config = saved.replace(**overrides)
        with torch.device("meta"):
            model = cls(config, kernels, attention)
        try:
            weights.update(resize_positions(weights, saved, config))
            check_weights(model, weights)
            model.load_state_dict(weights, strict=True, assign=True)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{directory / WEIGHTS_NAME}: the weights do not fit the config: {error}") from error
        for parameter in model.parameters():
            parameter.requires_grad_()
        return model

    @classmethod
    def _select_weights(
        cls, directory: Path, config: MMMAEConfig, weights: dict[str, Tensor]
    ) -> tuple[MMMAEConfig, dict[str, Tensor]]:
        """Return the config and the weights of this class from those of a folder, which may hold a whole model."""
        raise NotImplementedError


def check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError that names the first weight which is missing, unknown, or not of the model's shape and finite.

    Weights may be of any type of at least 16 bits.
    """
    expected = model.state_dict()
    for kind, names in (
        ("missing", [name for name in expected if name not in weights]),
        ("unknown", [name for name in weights if name not in expected]),
    ):
        if names:
            first = {tuple(name.split(".")[:2]): name for name in reversed(names)}  # of each block and encoder
            shown = sorted(first.values(), key=names.index)[:SHOWN]
            others = f" and {len(names) - len(shown)} others" if len(names) > len(shown) else ""
            raise ValueError(f"{kind}: {', '.join(shown)}{others}")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {list(weight.shape)}, expected {list(expected[name].shape)}")
        if weight.dtype not in TYPES:
            raise ValueError(f"{name} has the type {weight.dtype}, expected one of {', '.join(map(str, TYPES))}")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")


def save_weights(directory: str | Path, config: MMMAEConfig, weights: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` into `directory`, which is made if it does not exist."""
    directory = Path(directory)
    check_can_write(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
    write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(directory / CONFIG_NAME, {"model_type": MODEL_TYPE, **config.to_dict()})


def load_weights(directory: str | Path) -> tuple[MMMAEConfig, dict[str, Tensor]]:
    """Load what `save_weights` wrote, onto the CPU.

    Raises:
        OSError: a file is missing, or can't be read.
        ValueError: a file is broken.
    """
    config = read_config(directory)
    return config, load_tensors(Path(directory) / WEIGHTS_NAME)


def read_config(directory: str | Path) -> MMMAEConfig:
    """Read the config of a folder that holds weights too, and leave these.

    Raises:
        OSError: a file is missing, or the config can't be read.
        ValueError: the config is broken.
    """
    directory = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name}: no such file, expected a folder with a model or an encoder")
    try:
        return _parse_config((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{directory / CONFIG_NAME}: not UTF-8 text, expected a config as JSON") from error
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_NAME}: {error}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file, onto the CPU.

    Raises:
        OSError: the file can't be read.
        ValueError: it is broken.
    """
    path.open("rb").close()  # safetensors says that a file is missing where only the permission is
    try:
        return load_file(path)
    except (SafetensorError, KeyError) as error:  # the latter for a type that PyTorch does not have
        raise ValueError(f"{path}: not a complete safetensors file: {error}") from error


def _parse_config(text: str) -> MMMAEConfig:
    values = parse_json(text)
    kind = values.get("model_type", MODEL_TYPE)
    if kind != MODEL_TYPE:
        raise ValueError(f"config: model_type is {kind!r}, expected {MODEL_TYPE!r}")
    if "task" in values and isinstance(values.get("encoder"), dict):
        values = values["encoder"]  # of a fine-tuned model
    return MMMAEConfig.from_dict({name: value for name, value in values.items() if name not in FOREIGN})


def _names_a_repository(name: str | Path) -> bool:
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _download(name: str, **options: Any) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **options))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{name}: no such folder, and it can't be read from the Hub: {reason}") from error
