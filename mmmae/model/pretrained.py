"""Weights and config on disk and on the Hub: safetensors and JSON, written whole or not at all, no pickle."""

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

from ..config import MMMAEConfig
from ..files import check_can_write, write_atomically
from .position import resize_positions

CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"
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
    """A model that is written to a folder or to the Hub, and read from there.

    Of the mixin we take the upload and the card. Its own `save_pretrained` deletes the old config before the new one
    is there, and its `from_pretrained` does not say which file is broken.
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
        """Write `config.json` and `model.safetensors`, each to a temporary name first and then renamed.

        Args:
            save_directory: is made if it is not there; what else is in it stays.
            config: ignored; the mixin has it, our models know their config.
            repo_id: of the Hub; None means the folder's name.
            push_to_hub: upload them too.
            model_card_kwargs: fields of the model card; given, if only `{}`, the card is written as `README.md`.
            push_to_hub_kwargs: see `push_to_hub`.

        Returns:
            The address of the uploaded commit, or None.

        Raises:
            OSError: a file can't be written; what was there before is whole.
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
            write_atomically(directory / CARD_NAME, lambda path: path.write_text(str(card)))
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or directory.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload config, weights and a model card to the Hub, in one commit.

        Args:
            repo_id: `owner/name`, which is made if it is not there.
            options: `commit_message`, `private`, `token`, `branch`, `create_pr`, `model_card_kwargs` and patterns, as
                of `huggingface_hub.ModelHubMixin.push_to_hub`.

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
        """Read what `save_pretrained` wrote. An encoder is read from the folder of a whole model as well.

        Args:
            pretrained_model_name_or_path: a folder with `config.json` and `model.safetensors`; or, as a string, the
                `owner/name` of a repository on the Hub, if there is no such folder.
            kernels, attention: see `mmmae.fast_model`.
            force_download, token, cache_dir, local_files_only, revision: of the Hub, see
                `huggingface_hub.snapshot_download`.
            overrides: config fields to change: `image_size`, `bands` and `wavelengths` resize the position embeddings.

        Raises:
            FileNotFoundError: a file is not there.
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
        saved, weights = cls._own_part(directory, saved, weights)
        config = saved.replace(**overrides)
        with torch.device("meta"):
            model = cls(config, kernels, attention)
        try:
            weights.update(resize_positions(weights, saved, config))
            model.load_state_dict(weights, strict=True, assign=True)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{directory}: the weights do not fit the config: {error}") from error
        for parameter in model.parameters():
            parameter.requires_grad_()
        return model

    @classmethod
    def _own_part(
        cls, directory: Path, config: MMMAEConfig, weights: dict[str, Tensor]
    ) -> tuple[MMMAEConfig, dict[str, Tensor]]:
        """What this class takes of a folder's config and weights."""
        raise NotImplementedError


def save_weights(directory: str | Path, config: MMMAEConfig, weights: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` into `directory`, which is made if it is not there."""
    directory = Path(directory)
    check_can_write(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
    write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_atomically(directory / CONFIG_NAME, lambda path: path.write_text(config.to_json() + "\n"))


def load_weights(directory: str | Path) -> tuple[MMMAEConfig, dict[str, Tensor]]:
    """Read what `save_weights` wrote, onto the CPU.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is broken.
    """
    directory = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory / name}: no such file; expected a folder with a model or an encoder in it"
            )
    try:
        config = MMMAEConfig.from_json((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{directory / CONFIG_NAME}: no config: it is no text in UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_NAME}: {error}") from error
    try:
        return config, load_file(directory / WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS_NAME}: no whole safetensors file: {error}") from error


def _names_a_repository(name: str | Path) -> bool:
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _download(name: str, **options: Any) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **options))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{name}: no such folder, and the Hub does not give it: {reason}") from error
