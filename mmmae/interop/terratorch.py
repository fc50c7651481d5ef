"""The encoder in TerraTorch's registry of backbones, under the name `mmmae_encoder`, once this module is imported.

TerraTorch imports the package `custom_modules` of the folder that it is started in; one line there imports this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY
from torch import Tensor, nn

from ..data.normalization import Normalization
from ..model.encoder import HSIEncoder
from ..model.fast import fast_model
from ..model.heads import spread_blocks


class EncoderBackbone(nn.Module):
    """An encoder that takes images and returns a map for each of some blocks, as TerraTorch's decoders expect.

    Args:
        encoder: it becomes part of the backbone.
        indices: numbers of the blocks, negative ones from the end; None means up to four, spread evenly.
        normalization: statistics by which images in the units of the files are normalised; None: they are already.

    Attributes:
        out_channels: channels of each map; the encoder's spectral groups are among them.
    """

    def __init__(
        self, encoder: HSIEncoder, indices: Sequence[int] | None = None, normalization: Normalization | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.normalization = encoder, normalization
        self.indices = list(spread_blocks(encoder.config.depth) if indices is None else indices)
        self.out_channels = [encoder.feature_info[index]["num_chs"] for index in self.indices]

    def forward(self, image: Tensor, **_: Any) -> list[Tensor]:
        """Encode `[B, T, H, W]` or `[B, C, T, H, W]`, of any H and W, to maps `[B, D * t, h, w]`."""
        if self.normalization is not None:
            image = self.normalization.apply("hsi", image)
        hsi = image[:, None] if image.dim() == 4 else image
        return self.encoder.forward_intermediates(
            hsi, self.indices, output_fmt="NCHW", norm=True, intermediates_only=True
        )


@TERRATORCH_BACKBONE_REGISTRY.register
def mmmae_encoder(
    folder: str | None = None,
    *,
    preset: str = "base",
    indices: Sequence[int] | None = None,
    normalize: bool = False,
    pretrained: bool = True,
    **fields: Any,
) -> EncoderBackbone:
    """Make a backbone from a pretrained encoder, or an untrained one.

    In a config of TerraTorch the arguments have the prefix `backbone_`, as in `backbone_folder`.

    Args:
        folder: of an encoder or a whole model; or `owner/name`, a repository on the Hub. None: an untrained one.
        preset: of an untrained encoder.
        indices: see `EncoderBackbone`.
        normalize: normalise images by the `normalization.json` in the folder, which must be there. Otherwise the data
            module normalises them.
        pretrained: False makes an untrained encoder with the config of the folder.
        fields: fields of the config to change, such as `image_size`, `bands` and `wavelengths`.

    Raises:
        ValueError: `normalize` without a folder, or a field is not allowed.
        FileNotFoundError: the folder lacks a file.
    """
    if folder is None:
        if normalize:
            raise ValueError("normalize is True, expected a folder with normalization.json too")
        return EncoderBackbone(fast_model(preset, **fields).hsi_encoder(), indices)
    encoder = HSIEncoder.from_pretrained(folder, **fields)
    if not pretrained:
        encoder = fast_model(encoder.config).hsi_encoder()
    statistics = Normalization.load(Path(folder) / "normalization.json") if normalize else None
    return EncoderBackbone(encoder, indices, statistics)
