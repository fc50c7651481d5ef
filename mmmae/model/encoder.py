"""The HSI encoder, which is what remains in use after pretraining, and a linear classifier on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor, nn

from mmmae_kernels import patch_embed, use_backend
from mmmae_kernels.attention.op import attention_backend
from mmmae_kernels.autocast import cast_once, is_autocast, use_copies
from mmmae_kernels.dispatch import check_backend, current_backend
from mmmae_kernels.transformer_block.reference import take

from ..checks import check_whole
from ..config import MMMAEConfig
from .conventions import ClassifierConventions, Conventions, group_matcher
from .initialisation import initialise
from .inputs import check_hsi
from .layers import EPSILON, Block, PatchEmbed, begin_stream, materialised, product_parameters
from .layers import norm as apply_norm
from .position import position_table
from .pretrained import Pretrained
from .resize import resize

MapFormat: TypeAlias = Literal["NCTHW", "NCHW", "NLC"]


class Backbone(Conventions, Pretrained):
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

    @overload
    def forward_intermediates(
        self,
        hsi: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: MapFormat = "NCTHW",
        intermediates_only: Literal[False] = False,
        normalize: bool = False,
    ) -> tuple[Tensor, list[Tensor]]: ...

    @overload
    def forward_intermediates(
        self,
        hsi: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: MapFormat = "NCTHW",
        intermediates_only: Literal[True],
        normalize: bool = False,
    ) -> list[Tensor]: ...

    def forward_intermediates(
        self,
        hsi: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: MapFormat = "NCTHW",
        intermediates_only: bool = False,
        normalize: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """Encode, and return the outputs of some blocks too, as maps for dense prediction.

        Args:
            hsi: `[B, C, T, H, W]`.
            indices: numbers of the blocks, negative ones from the end; n means the last n, None all.
            norm: apply the final norm to the maps too.
            output_fmt: shape of a map: `NCTHW` is `[B, D, t, h, w]`; `NCHW`, for networks on images, has the spectral
                axis among the channels, `[B, D * t, h, w]`; `NLC` is `[B, N, D]`.
            intermediates_only: return only the maps, and run no block after the last of `indices`.
            normalize: another name of `norm`.

        Returns:
            The tokens `[B, N, D]`, and a map for each index, in the order of `indices`.

        Raises:
            ValueError: there is no block of such a number, there is no such format, or the volume does not fit, see
                `forward`.

        Example:
            >>> encoder = mmmae.fast_model("tiny").hsi_encoder()
            >>> tokens, maps = encoder.forward_intermediates(torch.randn(1, 1, 12, 224, 224), [0, -1])
            >>> tokens.shape, [tuple(block.shape) for block in maps]
            (torch.Size([1, 784, 64]), [(1, 64, 4, 14, 14), (1, 64, 4, 14, 14)])
        """
        if output_fmt not in get_args(MapFormat):
            raise ValueError(f"output_fmt is {output_fmt!r}, must be one of {', '.join(get_args(MapFormat))}")
        depth = len(self.blocks)
        if indices is None or isinstance(indices, int):
            count = depth if indices is None else indices
            if not 0 <= count <= depth:
                raise ValueError(f"indices is {count}, expected a number of blocks in 0..{depth}, or a list of numbers")
            indices = range(depth - count, depth)
        for index in indices:
            if not -depth <= index < depth:
                raise ValueError(f"indices has {index}, expected numbers in {-depth}..{depth - 1}")
        numbers = [index % depth for index in indices]
        check_hsi(self.config, hsi, self.pos_embed_spatial.device)
        outputs: dict[int, Tensor] = {}  # [B, N, D]
        with self.backend(), self.weights_cast_once():
            volume = resize(hsi, self.config.image_size)
            stream = begin_stream(self.embed(volume, None, self.embed_by_module(volume)), self.config)
            for number, block in enumerate(self.blocks):
                if intermediates_only and len(outputs) == len(set(numbers)):
                    break
                stream = block(*stream)
                if number in numbers:
                    outputs[number] = apply_norm(self.norm, stream) if norm or normalize else materialised(stream)
            maps = [self._as_map(outputs[number], output_fmt) for number in numbers]
            return maps if intermediates_only else (apply_norm(self.norm, stream), maps)

    def _as_map(self, tokens: Tensor, output_fmt: MapFormat) -> Tensor:
        if output_fmt == "NLC":
            return tokens
        volume: Tensor = tokens.transpose(1, 2).unflatten(2, self.config.grid)  # type: ignore[no-untyped-call]
        return volume.flatten(1, 2) if output_fmt == "NCHW" else volume

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The maps of the blocks in the format `NCHW`, as timm's `FeatureInfo` lists them."""
        channels, reduction = self.config.dim * self.config.grid[0], self.config.patch[1]
        return [
            {"num_chs": channels, "reduction": reduction, "module": f"blocks.{number}", "index": number}
            for number in range(len(self.blocks))
        ]

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns by which timm sorts the parameters into groups, for learning rates by depth."""
        return group_matcher("", coarse)

    @classmethod
    def _select_weights(
        cls, directory: Path, config: MMMAEConfig, weights: dict[str, Tensor]
    ) -> tuple[MMMAEConfig, dict[str, Tensor]]:
        prefix = "encoder."  # in a fine-tuned model
        tuned = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        if tuned or "mask_token" not in weights:
            return config, tuned or weights
        config = config.replace(aux={})  # of a whole model: as `FastModel.hsi_encoder` does
        with torch.device("meta"):
            names = cls(config).state_dict().keys()
        return config, {name: weight for name, weight in weights.items() if name in names}


class LinearClassifier(ClassifierConventions):
    """An encoder with a linear head on the mean of its tokens, for probing and fine-tuning.

    Args:
        encoder: it becomes part of the classifier, whose training changes it too.
        classes: number of classes.
        freeze_encoder: train only the head, without gradients through the encoder.
    """

    encoder: HSIEncoder

    def __init__(self, encoder: HSIEncoder, classes: int, *, freeze_encoder: bool = False) -> None:
        super().__init__()
        self.encoder, self.freeze_encoder = encoder, freeze_encoder
        self.reset_classifier(classes)

    def forward(self, hsi: Tensor) -> Tensor:
        """Classify `[B, C, T, H, W]`; return logits `[B, classes]`."""
        return self.forward_head(self.forward_features(hsi))

    def forward_features(self, hsi: Tensor) -> Tensor:
        """Encode `[B, C, T, H, W]` to tokens `[B, N, D]`."""
        with torch.no_grad() if self.freeze_encoder else contextlib.nullcontext():
            tokens: Tensor = self.encoder(hsi)
        return tokens

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify tokens `[B, N, D]`; return logits `[B, classes]`, or with `pre_logits` the mean token `[B, D]`."""
        mean = tokens.mean(dim=1)
        return mean if pre_logits else self.head(mean)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.head.out_features

    def get_classifier(self) -> nn.Linear:
        """Return the layer that computes the logits."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the layer that computes the logits by an untrained one, on the encoder's device."""
        check_whole("classes", num_classes, 1)
        encoder = self.encoder
        self.head = nn.Linear(encoder.config.dim, num_classes, device=encoder.device, dtype=encoder.dtype)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)


def adopt_parameters(module: nn.Module, source: nn.Module) -> None:
    """Replace the parameters of `module` by those of the same names in `source`: the same tensors, not copies."""
    for path, child in module.named_modules():
        for name in [name for name, _ in child.named_parameters(recurse=False)]:
            child.register_parameter(name, source.get_parameter(f"{path}.{name}" if path else name))
