"""The fast model: the reference's parameters and numbers, in a fraction of its time and memory.

It embeds only visible tokens, queries only with HSI tokens in the guidance, predicts only masked tokens, and never
holds attention scores, concatenated inputs or targets of all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmmae_kernels import TokenMask, decoder_tokens, masked_l2_loss, norm_linear, patch_l2_loss, patchify
from mmmae_kernels.checks import described
from mmmae_kernels.cpu import library

from ..config import MMMAEConfig, resolve_config
from .auxiliary import AUX_ENCODERS
from .encoder import Backbone, HSIEncoder, adopt_parameters
from .initialisation import initialise
from .inputs import (
    Output,
    check_aux,
    check_hsi,
    check_valid,
    decoded_ids,
    draw_conditioning,
    draw_mask,
    draw_seed,
    is_distributed,
)
from .layers import EPSILON, Block, Conditioning, Stream, is_plain, materialised, norm, project
from .losses import contrastive_loss, share_of_rank, token_weights
from .position import position_table, resize_positions
from .reference import ReferenceModel, reference_model
from .resize import resize

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def fast_model(
    config: MMMAEConfig | str | nn.Module = "base",
    *,
    kernels: str = "auto",
    attention: str = "auto",
    compile: bool | str = False,
    **overrides: Any,
) -> FastModel:
    """The model to train with.

    Args:
        config: a config, or a preset's name (`base`, `vit`, `tiny`): a freshly initialised model, the same weights
            under the same seed as `reference_model`; or an existing model, whose parameters are shared.
        kernels: backend of the fused ops: `auto`, `triton`, `native` or `eager`.
        attention: backend of attention: `auto`, or one of `flash_attn_4`, `flash_attn_3`, `flash_attn_2`, `xformers`,
            `native`, `sdpa` and `eager`.
        compile: hand the forward pass to `torch.compile`: True for its default, or one of `default`,
            `reduce-overhead`, `max-autotune` and `max-autotune-no-cudagraphs`.
        overrides: config fields to change.

    Raises:
        ValueError: a field or a backend is not allowed; the message says what is.
    """
    if not isinstance(compile, bool) and compile not in COMPILE_MODES:
        raise ValueError(f"compile is {compile!r}, must be False, True or one of {', '.join(COMPILE_MODES)}")
    if kernels in ("auto", "native") and not torch.cuda.is_available():
        library.module()  # warns once if it is missing
    if isinstance(config, nn.Module):
        if not isinstance(config, (ReferenceModel, FastModel)):
            raise ValueError(f"config is {described(config)}, expected a config, a preset or a model of this package")
        if overrides:
            raise ValueError(f"an existing model keeps its config: {', '.join(overrides)} can't be changed")
        source: ReferenceModel | FastModel = config
    else:
        source = reference_model(resolve_config(config, **overrides))
    with torch.device("meta"):
        model = FastModel(source.config, kernels, attention)
    adopt_parameters(model, source)
    model.train(source.training)
    if compile:
        model.compile(mode=compile if isinstance(compile, str) else None)
    return model


class FastModel(Backbone):
    """Multi-modal guided masked autoencoder on fused kernels. Make one by `mmmae.fast_model`."""

    def __init__(self, config: MMMAEConfig, kernels: str = "auto", attention: str = "auto") -> None:
        super().__init__(config, kernels, attention)
        groups, rows, columns = config.grid
        dim, width = config.dim, config.decoder_dim
        aux_encoder = AUX_ENCODERS[config.aux_encoder]
        self.aux_encoders = nn.ModuleDict(
            {name: aux_encoder(config, channels, attention) for name, channels in config.aux.items()}
        )
        self.aux_projections = nn.ModuleDict({name: nn.Linear(config.aux_dim, dim) for name in config.aux})
        depth, recompute = config.conditioning_depth if config.aux else 0, config.activation_checkpointing
        self.conditioning = nn.ModuleList(Conditioning(dim, config.heads, attention) for _ in range(depth))
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed_spatial = nn.Parameter(torch.empty(1, rows * columns, width))
        self.decoder_pos_embed_spectral = nn.Parameter(torch.empty(1, groups, width))
        self.decoder_blocks = nn.ModuleList(
            Block(width, config.decoder_heads, config.plain_mlp_ratio, attention, recompute)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=EPSILON)
        self.decoder_pred = nn.Linear(width, config.target_dim)
        if config.aux:
            self.contrastive_head = nn.Linear(dim, config.aux_dim)
        initialise(self, config)

    def forward(
        self,
        hsi: Tensor,
        aux: Mapping[str, Tensor | None] | None = None,
        present: Mapping[str, Tensor] | None = None,
        valid: Tensor | None = None,
        *,
        mask: TokenMask | None = None,
        seed: int | Tensor | None = None,
    ) -> Output:
        """Mask, encode, guide, decode and score.

        Args:
            hsi: `[B, C, T, H, W]`, C and T as in the config, any H and W.
            aux: name -> `[B, C_m, H_m, W_m]` of any size; None or no entry where no sample has the modality.
            present: name -> bool `[B]`, which samples have the modality; no entry where all have it. What stands in
                the image of a sample that has it not is never looked at.
            valid: bool `[B, H, W]`, which pixels count in the reconstruction loss; None means all. The others are
                encoded all the same and must be finite.
            mask: which tokens are visible; None draws it. At a `decode_fraction` below 1 the first of its `ids_masked`
                are predicted, and the decoder does not see the others.
            seed: what the mask and the conditioning dropout are drawn from, with the sample's number in the batch of
                all ranks; None takes one from torch's default generator.

        Returns:
            Losses, prediction, latent and mask, see `Output`.

        Raises:
            ValueError: an input does not fit the config; the message says what was given and what is expected.
        """
        config = self.config
        check_hsi(config, hsi, self.mask_token.device)
        images, presence = check_aux(config, hsi, aux, present)
        check_valid(hsi, valid)
        seed = draw_seed() if seed is None else seed
        with self.backend():
            mask = draw_mask(config, hsi, mask, seed)
            volume = resize(hsi, config.image_size)
            vectors = {name: self.aux_encoders[name](image, presence[name]) for name, image in images.items()}
            guides = draw_conditioning(config, presence, seed, training=self.training) if presence else None
            embedded = self.embed_by_module(volume)
            latent = self.encode(self.embed(volume, mask.ids_keep, embedded), vectors, guides)
            ids_predicted = decoded_ids(config, mask)
            prediction = self.decode(latent, mask, ids_predicted)
            weights = None if valid is None else token_weights(config, valid, ids_predicted)
            reconstruction = self.reconstruction_loss(prediction, volume, ids_predicted, weights, embedded)
        if is_distributed():
            reconstruction = reconstruction * share_of_rank(ids_predicted if weights is None else weights)
        contrastive = reconstruction.new_zeros(())
        if config.aux:
            contrastive = contrastive_loss(config, self.contrastive_head(latent.mean(dim=1)), vectors, presence)
        loss = reconstruction + config.contrastive_weight * contrastive
        if is_distributed():
            loss = loss + 0.0 * self._sum_of_idle(vectors)
        return Output(loss, reconstruction, contrastive, prediction, latent, mask)

    @classmethod
    def _own_part(
        cls, directory: Path, config: MMMAEConfig, weights: dict[str, Tensor]
    ) -> tuple[MMMAEConfig, dict[str, Tensor]]:
        if "mask_token" not in weights:
            raise ValueError(f"{directory}: holds an encoder alone, which mmmae.HSIEncoder reads; expected a model")
        return config, weights

    def encode(self, tokens: Tensor, vectors: Mapping[str, Tensor], guides: Tensor | None) -> Tensor:
        """Encode visible tokens, guided by vectors.

        Args:
            tokens: `[B, K, D]`, with positions.
            vectors: name -> `[B, aux_dim]`.
            guides: bool `[B, len(vectors)]`, which vector guides which sample; None without vectors.

        Returns:
            `[B, K, D]`.
        """
        stream = Stream(tokens)
        if guides is not None and len(self.conditioning) > 0:
            stacked = torch.stack([self.aux_projections[name](vector) for name, vector in vectors.items()], dim=1)
            for step in self.conditioning:
                stream = step(*stream, stacked, guides)
        for block in self.blocks:
            stream = block(*stream)
        return norm(self.norm, stream)

    def decode(self, latent: Tensor, mask: TokenMask, ids_predicted: Tensor) -> Tensor:
        """Predict masked tokens from the visible ones.

        Args:
            latent: `[B, K, D]`.
            mask: whose `ids_keep` the visible tokens are.
            ids_predicted: `[B, M']`.

        Returns:
            `[B, M', target_dim]`.
        """
        position = position_table(self.decoder_pos_embed_spatial, self.decoder_pos_embed_spectral)
        visible = project(self.decoder_embed, latent)
        if self.config.decode_fraction == 1:
            rows = ids_predicted
            tokens = decoder_tokens(visible, self.mask_token[0, 0], mask.ids_restore, position)
        else:  # visible tokens, then predicted ones: attention knows no order
            (batch, keep), decoded = mask.ids_keep.shape, ids_predicted.shape[1]
            rows = torch.arange(keep, keep + decoded, device=ids_predicted.device).expand(batch, -1)
            tokens = torch.cat([visible, self.mask_token.expand(batch, decoded, -1)], dim=1)
            tokens = tokens + F.embedding(torch.cat([mask.ids_keep, ids_predicted], dim=1), position)
        stream = Stream(tokens)  # [B, N, width], or [B, K + M', width]
        *earlier, last = self.decoder_blocks
        for block in earlier:
            stream = block(*stream)
        return self.predict(last(*stream, rows))

    def predict(self, stream: Stream) -> Tensor:
        """Apply the decoder's norm and head: stream `[B, M', width]` -> `[B, M', target_dim]`."""
        x, residual, residual_bias = stream
        last, head = self.decoder_norm, self.decoder_pred
        if not (is_plain(last, nn.LayerNorm) and is_plain(head, nn.Linear)):
            predicted: Tensor = head(last(materialised(stream)))
            return predicted
        arguments = (x, residual, last.weight, last.bias, head.weight, head.bias, last.eps, residual_bias)
        return norm_linear(*arguments)[1]

    def reconstruction_loss(
        self,
        prediction: Tensor,
        volume: Tensor,
        ids_predicted: Tensor,
        weights: Tensor | None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Return the L2 loss of a prediction.

        Args:
            prediction: `[B, M', target_dim]`.
            volume: `[B, C, T, image_size, image_size]`.
            ids_predicted: `[B, M']`.
            weights: `[B, M']`; None means 1 each.
            embedded: what `embed_by_module` gave of the volume.
        """
        normalize = self.config.normalize_target
        if self.config.target == "pixels":
            with torch.no_grad():
                target = patchify(volume, self.config.patch, ids_predicted)
            return masked_l2_loss(prediction, target, weights=weights, normalize=normalize)
        if embedded is not None:
            return masked_l2_loss(prediction, embedded.detach(), ids_predicted, weights, normalize=normalize)
        projection = self.patch_embed.proj
        return patch_l2_loss(
            *(prediction, volume, projection.weight, projection.bias, ids_predicted, weights), normalize=normalize
        )

    def _sum_of_idle(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Of parameters that this rank's samples do not use: data-parallel wrappers wait for a gradient of each."""
        idle = [module for name, module in self.aux_encoders.items() if name not in vectors]
        idle += [module for name, module in self.aux_projections.items() if name not in vectors]
        if not vectors:
            idle += self.conditioning
        parameters = [parameter for module in idle for parameter in module.parameters()]
        return torch.stack([parameter.sum() for parameter in parameters]).sum() if parameters else self.mask_token.sum()

    def hsi_encoder(
        self,
        *,
        image_size: int | None = None,
        bands: int | None = None,
        wavelengths: Sequence[float] | None = None,
    ) -> HSIEncoder:
        """The HSI encoder alone, over all tokens.

        It shares this model's parameters, apart from position embeddings resized for another `image_size`, other
        `bands`, or, if the model has them, other `wavelengths`. Its config names no auxiliary images.

        Raises:
            ValueError: the wavelengths are not one a band, or the model was made without.
        """
        changes = {"image_size": image_size, "bands": bands, "wavelengths": wavelengths}
        config = self.config.replace(aux={}, **{name: value for name, value in changes.items() if value is not None})
        with torch.device("meta"):
            encoder = HSIEncoder(config, self.kernels, self.attention)
        adopt_parameters(encoder, self)
        positions: dict[str, Tensor] = {
            "pos_embed_spatial": self.pos_embed_spatial,
            "pos_embed_spectral": self.pos_embed_spectral,
        }
        for name, resized in resize_positions(positions, self.config, config).items():
            setattr(encoder, name, nn.Parameter(resized.detach()))
        return encoder.train(self.training)
