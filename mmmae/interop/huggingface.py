"""Models of this package in transformers: its Auto classes, once this module is imported, and a collator for `Trainer`.

`Trainer` takes a `FastModel` as it is. The classes here are for programs that go through `AutoConfig`, `AutoModel` and
`AutoModelForPreTraining`, with the folders that `save_pretrained` of either library writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from ..config import MMMAEConfig
from ..data.sample import Sample, collate
from ..model.encoder import Backbone, HSIEncoder
from ..model.fast import FastModel
from ..model.pretrained import MODEL_TYPE, save_weights


def trainer_collator(modalities: Iterable[str] = ()) -> Callable[[Sequence[Sample]], dict[str, Any]]:
    """Return a `data_collator` for `transformers.Trainer`: samples to the arguments of a model's `forward`.

    A `Trainer` computes the loss in evaluations too if its arguments have `label_names=["hsi"]`.

    Args:
        modalities: names of the auxiliary images to use, as in `subjects.modalities`.
    """
    names = tuple(modalities)

    def collator(samples: Sequence[Sample]) -> dict[str, Any]:
        batch = collate(samples, names)
        return {"hsi": batch.hsi, "aux": batch.aux, "present": batch.present, "valid": batch.valid}

    return collator


class MMMAEPretrainedConfig(PreTrainedConfig):
    """The fields of a `MMMAEConfig` as a config of transformers; `model_config` returns them as the former.

    Args:
        values: fields of `MMMAEConfig`, and of `transformers.PreTrainedConfig`.
    """

    model_type = MODEL_TYPE
    temperature: float = 0.07  # an undeclared one would be taken for a setting of text generation

    def __init__(self, **values: Any) -> None:
        names = {field.name for field in fields(MMMAEConfig)}
        own = {name: value for name, value in values.items() if name in names}
        super().__init__(**{name: value for name, value in values.items() if name not in names})
        for name, value in MMMAEConfig.from_dict(own).to_dict().items():
            setattr(self, name, value)

    def model_config(self) -> MMMAEConfig:
        """Return the config of the model, checked again."""
        return MMMAEConfig.from_dict({field.name: getattr(self, field.name) for field in fields(MMMAEConfig)})

    @property
    def hidden_size(self) -> int:
        """Channels of an encoded token."""
        return int(self.dim)

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of the encoder."""
        return int(self.depth)


class MMMAEPreTrainedModel(PreTrainedModel):
    """Base class of the models here, which hold one of this package's under the name `base_model_prefix`."""

    config_class = MMMAEPretrainedConfig
    main_input_name = "hsi"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave weights as this package has initialised them."""

    def inner(self) -> Backbone:
        """Return the model of this package."""
        model: Backbone = getattr(self, self.base_model_prefix)
        return model

    def activation_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """Turn `activation_checkpointing` on; for the arguments see the method of `FastModel`."""
        self.inner().activation_checkpointing_enable(*arguments, **options)

    def gradient_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """Turn `activation_checkpointing` on; an older name of `activation_checkpointing_enable`."""
        self.inner().gradient_checkpointing_enable(*arguments, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Turn `activation_checkpointing` off."""
        self.inner().gradient_checkpointing_disable()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write `config.json` and `model.safetensors`, which this package's `from_pretrained` reads too.

        Args:
            save_directory: made if it does not exist.
            is_main_process: False writes nothing.
            state_dict: the weights to write; None means the model's.
            options: `push_to_hub=True` uploads the files, with the options of this package's `push_to_hub`; others
                have no effect.
        """
        if not is_main_process:
            return
        prefix = f"{self.base_model_prefix}."
        weights = self.state_dict() if state_dict is None else state_dict
        weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        save_weights(save_directory, self.inner().config, weights)
        if options.pop("push_to_hub", False):
            repository = options.pop("repo_id", None) or Path(save_directory).name
            self.inner().push_to_hub(repository, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **options: Any) -> Any:
        """Load safetensors files by transformers, with its options; the weights must be complete.

        Raises:
            ValueError: the files lack weights of the model.
        """
        wants_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **options)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{pretrained_model_name_or_path}: {len(missing)} weights of {cls.__name__} are missing, the first is "
                f"{missing[0]}; an encoder's folder needs AutoModel"
            )
        return (model, info) if wants_info else model


class MMMAEModel(MMMAEPreTrainedModel):
    """The HSI encoder; reads the folders of encoders and of whole models."""

    base_model_prefix = "encoder"
    _keys_to_ignore_on_load_unexpected = (
        r"^(aux_|conditioning\.|contrastive_head\.|decoder_|mask_token$)",  # of a whole model
    )

    def __init__(self, config: MMMAEPretrainedConfig) -> None:
        super().__init__(config)
        self.encoder = HSIEncoder(config.model_config().replace(aux={}))
        self.post_init()

    def forward(
        self, hsi: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode `[B, C, T, H, W]`.

        Args:
            hsi: normalised volumes.
            output_hidden_states: return the outputs of all blocks too, `[B, N, D]` each.
            return_dict: return an object with names; False returns a tuple.
        """
        indices = self.encoder.config.depth if output_hidden_states else 0
        tokens, hidden = self.encoder.forward_intermediates(hsi, indices, output_fmt="NLC")
        output = BaseModelOutput(last_hidden_state=tokens, hidden_states=tuple(hidden) or None)
        return output.to_tuple() if return_dict is False else output


@dataclass
class MMMAEPreTrainingOutput(ModelOutput):
    """Output of `MMMAEForPreTraining`, see `mmmae.Output`."""

    loss: Tensor | None = None
    prediction: Tensor | None = None
    latent: Tensor | None = None
    ids_keep: Tensor | None = None
    ids_masked: Tensor | None = None


class MMMAEForPreTraining(MMMAEPreTrainedModel):
    """The whole masked autoencoder, a `FastModel`."""

    base_model_prefix = "mmmae"

    def __init__(self, config: MMMAEPretrainedConfig) -> None:
        super().__init__(config)
        self.mmmae = FastModel(config.model_config())
        self.post_init()

    def forward(
        self,
        hsi: Tensor,
        aux: Mapping[str, Tensor | None] | None = None,
        present: Mapping[str, Tensor] | None = None,
        valid: Tensor | None = None,
        seed: int | Tensor | None = None,
        return_dict: bool | None = None,
        return_loss: bool = True,
    ) -> MMMAEPreTrainingOutput | tuple[Any, ...]:
        """Mask and reconstruct a batch; for the arguments see `mmmae.FastModel.forward`.

        Args:
            hsi, aux, present, valid, seed: as there.
            return_dict: return an object with names; False returns a tuple.
            return_loss: ignored, the loss is always returned; by its default a `Trainer` knows that.
        """
        out = self.mmmae(hsi, aux, present, valid, seed=seed)
        output = MMMAEPreTrainingOutput(out.loss, out.prediction, out.latent, out.mask.ids_keep, out.mask.ids_masked)
        return output.to_tuple() if return_dict is False else output


AutoConfig.register(MODEL_TYPE, MMMAEPretrainedConfig)
AutoModel.register(MMMAEPretrainedConfig, MMMAEModel)
AutoModelForPreTraining.register(MMMAEPretrainedConfig, MMMAEForPreTraining)
