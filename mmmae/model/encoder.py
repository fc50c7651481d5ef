"""The HSI encoder, which is what remains in use after pretraining, and a linear classifier on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmmae_kernels import patch_embed, use_backend
from mmmae_kernels.attention.op import attention_backend
from mmmae_kernels.autocast import cast_once, is_autocast, use_copies
from mmmae_kernels.dispatch import check_backend, current_backend
from mmmae_kernels.transformer_block.reference import take

from ..checks import check_whole
from ..config import MMMAEConfig
from .initialisation import initialise
from .inputs import check_hsi
from .layers import EPSILON, Block, PatchEmbed, begin_stream, materialised, norm, product_parameters
from .position import position_table
from .pretrained import Pretrained
from .resize import resize


class Backbone(Pretrained):
    """Base class of the encoder and the masked autoencoder, with their common parameters and steps."""

    def __init__(self, config: MMMAEConfig, kernels: str = "auto", attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.kernels, self.attention = check_backend(kernels), attention
        current_backend(), attention_backend(attention)  # raise for a wrong name in the environment now, not in a step
        groups, rows, columns = config.grid
        self.patch_embed = PatchEmbed(config)
        self.pos_embed_spatial = nn.Parameter(torch.empty(1, rows * columns, config.dim))
        self.pos_embed_spectral = nn.Parameter(torch.empty(1, groups, config.dim))
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.mlp_ratio, attention, config.activation_checkpointing)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, eps=EPSILON)

    def embed(self, volume: Tensor, ids: Tensor | None, embedded: Tensor | None = None) -> Tensor:
        """Return tokens with their positions added.

        Args:
            volume: `[B, C, T, image_size, image_size]`.
            ids: `[B, K]`, tokens to embed; None means all.
            embedded: what `embed_by_module` returned for the volume.

        Returns:
            `[B, K, D]`.
        """
        position = position_table(self.pos_embed_spatial, self.pos_embed_spectral)
        if embedded is not None:
            tokens = embedded + position
            return tokens if ids is None else take(tokens, ids)
        projection = self.patch_embed.proj
        return patch_embed(volume, projection.weight, projection.bias, ids, position)

    def embed_by_module(self, volume: Tensor) -> Tensor | None:
        """Return all tokens `[B, N, D]` by calling the layer if a user changed it, else None."""
        return None if self.patch_embed.is_plain() else self.patch_embed(volume)

    def backend(self) -> contextlib.AbstractContextManager[None]:
        """Select the backend that this model was made with; `auto` follows `use_backend` and `MMMAE_KERNELS`."""
        return use_backend(current_backend() if self.kernels == "auto" else self.kernels)

    def weights_cast_once(
        self, modalities: Iterable[str] = (), each_encoder: bool = True
    ) -> contextlib.AbstractContextManager[None]:
        """Cast the weights of matrix products for a forward pass under autocast, which each op would do by itself.

        Args:
            modalities: names of the images of the forward pass.
            each_encoder: whether the encoder of each image runs by itself, and not together with the others.
        """
        if torch.compiler.is_compiling() or not is_autocast(self.pos_embed_spatial):
            return contextlib.nullcontext()
        return use_copies(cast_once(product_parameters(self.product_layers(modalities, each_encoder))))

    def product_layers(self, modalities: Iterable[str], each_encoder: bool = True) -> list[nn.Module]:
        """Return the layers with matrix products of a forward pass; for the arguments see `weights_cast_once`."""
        return [self.patch_embed, *self.blocks]


class HSIEncoder(Backbone):
    """Encoder of hyperspectral images: resizing, patch embedding, positions and transformer blocks over all tokens.

    There is no masking and no guidance by auxiliary images.

    Args:
        config: as of the whole model; fields of the decoder and of auxiliary images are not used.
        kernels, attention: see `mmmae.fast_model`.

    Example:
        >>> encoder = mmmae.fast_model("tiny").hsi_encoder()
        >>> encoder(torch.randn(2, 1, 12, 200, 300)).shape  # any height and width
        torch.Size([2, 784, 64])

        An encoder for images of another size has resized position embeddings:

        >>> encoder = mmmae.fast_model("tiny").hsi_encoder(image_size=448)
        >>> encoder(torch.randn(2, 1, 12, 448, 448)).shape
        torch.Size([2, 3136, 64])
    """

    def __init__(self, config: MMMAEConfig, kernels: str = "auto", attention: str = "auto") -> None:
        super().__init__(config, kernels, attention)
        initialise(self, config)

    def forward(self, hsi: Tensor) -> Tensor:
        """Encode `[B, C, T, H, W]`, of any H and W, to tokens `[B, N, D]`, row-major over (t, h, w).

        Raises:
            ValueError: the volume does not have the rank, channels and bands of the config.
        """
        return self.forward_features(hsi)

    def forward_features(self, hsi: Tensor) -> Tensor:
        """Encode as `forward` does; timm's models have this name for it."""
        tokens, _ = self.forward_intermediates(hsi, ())
        return tokens

    def forward_intermediates(
        self, hsi: Tensor, indices: Sequence[int] | None = None, *, normalize: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode, and return the outputs of some blocks too, as maps for dense prediction.

        Args:
            hsi: `[B, C, T, H, W]`.
            indices: numbers of the blocks, negative ones from the end; None means all.
            normalize: apply the final norm to the maps too.

        Returns:
            The tokens `[B, N, D]`, and a map `[B, D, t, h, w]` for each index, in the order of `indices`.

        Raises:
            ValueError: there is no block of such a number, or the volume does not fit, see `forward`.

        Example:
            >>> encoder = mmmae.fast_model("tiny").hsi_encoder()
            >>> tokens, maps = encoder.forward_intermediates(torch.randn(1, 1, 12, 224, 224), [0, -1])
            >>> tokens.shape, [tuple(block.shape) for block in maps]
            (torch.Size([1, 784, 64]), [(1, 64, 4, 14, 14), (1, 64, 4, 14, 14)])
        """
        depth = len(self.blocks)
        indices = range(depth) if indices is None else indices
        for index in indices:
            if not -depth <= index < depth:
                raise ValueError(f"indices has {index}, expected numbers in {-depth}..{depth - 1}")
        wanted = {index % depth for index in indices}
        check_hsi(self.config, hsi, self.pos_embed_spatial.device)
        maps: dict[int, Tensor] = {}
        with self.backend(), self.weights_cast_once():
            volume = resize(hsi, self.config.image_size)
            stream = begin_stream(self.embed(volume, None, self.embed_by_module(volume)), self.config)
            for number, block in enumerate(self.blocks):
                stream = block(*stream)
                if number in wanted:
                    tokens: Any = norm(self.norm, stream) if normalize else materialised(stream)
                    maps[number] = tokens.transpose(1, 2).unflatten(2, self.config.grid)
            encoded = norm(self.norm, stream)
        return encoded, [maps[index % depth] for index in indices]

    @classmethod
    def _select_weights(
        cls, directory: Path, config: MMMAEConfig, weights: dict[str, Tensor]
    ) -> tuple[MMMAEConfig, dict[str, Tensor]]:
        if "mask_token" not in weights:
            return config, weights
        config = config.replace(aux={})  # of a whole model: as `FastModel.hsi_encoder` does
        with torch.device("meta"):
            names = cls(config).state_dict().keys()
        return config, {name: weight for name, weight in weights.items() if name in names}


class LinearClassifier(nn.Module):
    """An encoder with a linear head on the mean of its tokens, for probing and fine-tuning.

    Args:
        encoder: it becomes part of the classifier, whose training changes it too.
        classes: number of classes.
        freeze_encoder: train only the head, without gradients through the encoder.
    """

    def __init__(self, encoder: HSIEncoder, classes: int, *, freeze_encoder: bool = False) -> None:
        super().__init__()
        check_whole("classes", classes, 1)
        self.encoder, self.freeze_encoder = encoder, freeze_encoder
        self.head = nn.Linear(encoder.config.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, hsi: Tensor) -> Tensor:
        """Classify `[B, C, T, H, W]`; return logits `[B, classes]`."""
        with torch.no_grad() if self.freeze_encoder else contextlib.nullcontext():
            tokens = self.encoder(hsi)
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


def adopt_parameters(module: nn.Module, source: nn.Module) -> None:
    """Replace the parameters of `module` by those of the same names in `source`: the same tensors, not copies."""
    for path, child in module.named_modules():
        for name in [name for name, _ in child.named_parameters(recurse=False)]:
            child.register_parameter(name, source.get_parameter(f"{path}.{name}" if path else name))
