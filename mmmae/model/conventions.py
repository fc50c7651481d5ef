"""Names by which timm, transformers and peft ask a model for its width, its device, its groups of parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import MMMAEConfig


class Conventions(nn.Module):
    """Attributes and methods that other libraries expect of a model with an encoder of this package."""

    config: MMMAEConfig

    @property
    def num_features(self) -> int:
        """Channels of an encoded token."""
        return self.config.dim

    @property
    def embed_dim(self) -> int:
        """Channels of an encoded token."""
        return self.config.dim

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the parameters, all or only those with gradients, with or without the position embeddings."""
        return sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if (parameter.requires_grad or not only_trainable) and not (exclude_embeddings and "pos_embed" in name)
        )

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters with several dimensions that weight decay should leave alone."""
        return {
            name
            for name, _ in self.named_parameters()
            if "pos_embed" in name or name.rpartition(".")[2] == "mask_token"
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn `activation_checkpointing` on or off, in the config too; see `MMMAEConfig`."""
        for name in ("blocks", "decoder_blocks"):
            for block in getattr(self, name, ()):
                block.recompute = enable
        self.config = self.config.replace(activation_checkpointing=enable)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Turn `activation_checkpointing` on, as a `Trainer` asks for it.

        Args:
            activation_checkpointing_kwargs: options of PyTorch's checkpoints; they have no effect.
            every_n_layers: must be 1, every block is recomputed.
            offload: must be False.

        Raises:
            ValueError: one of the last two is something else.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(f"every_n_layers is {every_n_layers} and offload {offload}, expected 1 and False")
        self.set_grad_checkpointing(True)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Turn `activation_checkpointing` on; an older name of `activation_checkpointing_enable`."""
        self.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Turn `activation_checkpointing` off."""
        self.set_grad_checkpointing(False)


class ClassifierConventions(Conventions):
    """The same of a model that classifies by an encoder."""

    encoder: Conventions

    @property
    def config(self) -> MMMAEConfig:  # type: ignore[override]
        """Config of the encoder."""
        return self.encoder.config

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn the encoder's `activation_checkpointing` on or off, in its config too; see `MMMAEConfig`."""
        self.encoder.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns by which timm sorts the parameters into groups, for learning rates by depth."""
        return group_matcher("encoder.", coarse)


def group_matcher(encoder: str, coarse: bool = False) -> dict[str, str]:
    """Return the patterns by which timm sorts parameters into groups from the input to the output.

    The encoder's last norm and everything outside the encoder form the last group, as in `mmmae finetune`.

    Args:
        encoder: prefix of the names of the encoder's parameters, such as `encoder.` in a larger model.
        coarse: put all blocks into one group.
    """
    start = "^" + re.escape(encoder)
    block = r"blocks\." if coarse else r"blocks\.(\d+)"
    return {"stem": f"{start}(?:patch_embed|pos_embed)", "blocks": start + block}
