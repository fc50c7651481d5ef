"""The fast model: the same parameters and results as the reference model, in a fraction of its time and memory.

It embeds only visible tokens, computes queries only for HSI tokens in the conditioning, predicts only masked tokens,
and never holds attention scores, concatenated inputs or the targets of all tokens in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmmae_kernels import TokenMask, decoder_tokens, masked_l2_loss, norm_linear, patch_l2_loss, patchify
from mmmae_kernels.checks import described
from mmmae_kernels.cpu import library

from ..config import MMMAEConfig, resolve_config
from .auxiliary import AUX_ENCODERS, Together, encode_together, plan_encoders
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
from .layers import EPSILON, Block, Conditioning, Stream, begin_stream, is_plain, materialised, norm, project
from .losses import contrastive_loss, token_weights
from .position import position_table, resize_positions
from .reference import ReferenceModel, reference_model
from .resize import resize

CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
COMPILE_MODES = get_args(CompileMode)


def fast_model(
    config: MMMAEConfig | str | nn.Module = "base",
    *,
    kernels: str = "auto",
    attention: str = "auto",
    compile: bool | str = False,
    **overrides: Any,
) -> FastModel:
    """Make the model to train with, or a fast model of an existing one.

    Args:
        config: a config, or the name of a preset (`base`, `vit`, `tiny`), for a freshly initialised model, with the
            weights that `reference_model` draws from the same seed; or an existing model, to share its parameters.
        kernels: backend of the fused ops: `auto`, `triton`, `native` or `eager`.
        attention: backend of attention: `auto`, or one of `flash_attn_4`, `flash_attn_3`, `flash_attn_2`, `xformers`,
            `native`, `torch_cudnn`, `torch_flash`, `torch_efficient`, `torch_cpu`, `sdpa` and `eager`.
        compile: compile the forward pass with `torch.compile`: True for its default mode, or one of `default`,
            `reduce-overhead`, `max-autotune` and `max-autotune-no-cudagraphs`.
        overrides: config fields to change.

    Raises:
        ValueError: a field or a backend is not allowed; the message says what is.

    Example:
        >>> model = mmmae.fast_model("tiny", aux={"ir": 1})
        >>> hsi = torch.randn(2, 1, 12, 224, 224)  # [B, C, T, H, W], normalised
        >>> out = model(hsi, {"ir": torch.randn(2, 1, 300, 200)}, seed=0)
        >>> out.loss.backward()
        >>> out.latent.shape  # 196 of 784 tokens are visible
        torch.Size([2, 196, 64])

        A fast model shares the parameters of a reference model and gives its results:

        >>> reference = mmmae.reference_model("tiny")
        >>> fast = mmmae.fast_model(reference)
        >>> fast.mask_token is reference.mask_token
        True
        >>> torch.testing.assert_close(fast(hsi, seed=0).loss, reference(hsi, seed=0).loss)
    """
    if not isinstance(compile, bool) and compile not in COMPILE_MODES:
        raise ValueError(f"compile is {compile!r}, must be False, True or one of {', '.join(COMPILE_MODES)}")
    if kernels in ("auto", "native") and not torch.cuda.is_available():
        library.module()  # warns once if it is missing
    if isinstance(config, nn.Module):
        if not isinstance(config, (ReferenceModel, FastModel)):
            raise ValueError(
                f"config is {described(config)}, expected a config, the name of a preset, or a model of this package"
            )
        if overrides:
            raise ValueError(
                f"{', '.join(overrides)} can't be changed in an existing model; model.config.replace(...) makes a "
                "config for a new one"
            )
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
    """Multi-modal guided masked autoencoder on fused kernels. Make one with `mmmae.fast_model`."""

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
        """Mask, encode, condition and decode a batch, and compute its loss.

        Args:
            hsi: `[B, C, T, H, W]`, C and T as in the config, any H and W.
            aux: name -> `[B, C_m, H_m, W_m]` of any size; None or no entry if no sample has the modality.
            present: name -> bool `[B]`, which samples have the modality; no entry if all have it. The image of a
                sample that lacks the modality is never read.
            valid: bool `[B, H, W]`, which pixels count in the reconstruction loss; None means all. The others are
                still encoded and must be finite.
            mask: which tokens are visible; None draws a mask. With a `decode_fraction` below 1, the first of its
                `ids_masked` are predicted, and the decoder does not see the others.
            seed: determines the mask and the conditioning dropout, together with each sample's number in the batch of
                all ranks; None draws one from torch's default generator.

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
            together = plan_encoders([self.aux_encoders[name] for name in images])
        with self.backend(), self.weights_cast_once(images, each_encoder=together is None):
            mask = draw_mask(config, hsi, mask, seed)
            volume = resize(hsi, config.image_size)
            vectors = self.encode_images(images, presence, together)
            guides = draw_conditioning(config, presence, seed, training=self.training) if presence else None
            embedded = self.embed_by_module(volume)
            latent = self.encode(self.embed(volume, mask.ids_keep, embedded), vectors, guides)
            ids_predicted = decoded_ids(config, mask)
            prediction = self.decode(latent, mask, ids_predicted)
            weights = None if valid is None else token_weights(config, valid, ids_predicted)
            reconstruction = self.reconstruction_loss(prediction, volume, ids_predicted, weights, embedded)
            contrastive = reconstruction.new_zeros(())
            if config.aux:
                contrastive = self.contrast(latent, vectors, presence)
        if is_distributed():
            from .collectives import share_of_rank

            reconstruction = reconstruction * share_of_rank(ids_predicted if weights is None else weights)
        loss = reconstruction + config.contrastive_weight * contrastive
        if is_distributed():
            loss = loss + 0.0 * self._sum_of_unused(vectors)
        return Output(loss, reconstruction, contrastive, prediction, latent, mask)

    @classmethod
    def _select_weights(
        cls, directory: Path, config: MMMAEConfig, weights: dict[str, Tensor]
    ) -> tuple[MMMAEConfig, dict[str, Tensor]]:
        if "mask_token" not in weights:
            raise ValueError(
                f"{directory}: holds only an encoder, expected a whole model; mmmae.HSIEncoder.from_pretrained reads it"
            )
        return config, weights

    def encode_images(
        self, images: Mapping[str, Tensor], presence: Mapping[str, Tensor], together: Together | None
    ) -> dict[str, Tensor]:
        """Encode auxiliary images to vectors, name -> `[B, aux_dim]`.

        Args:
            images: name -> `[B, C_m, H_m, W_m]`.
            presence: name -> bool `[B]`.
            together: what `plan_encoders` returned for the encoders of the images.
        """
        if together is None:
            return {name: self.aux_encoders[name](image, presence[name]) for name, image in images.items()}
        vectors = encode_together(together, images.values(), [presence[name] for name in images])
        return dict(zip(images, vectors, strict=True))

    def encode(self, tokens: Tensor, vectors: Mapping[str, Tensor], guides: Tensor | None) -> Tensor:
        """Encode visible tokens, guided by auxiliary vectors.

        Args:
            tokens: `[B, K, D]`, with positions added.
            vectors: name -> `[B, aux_dim]`.
            guides: bool `[B, len(vectors)]`, which vector guides which sample; None without vectors.

        Returns:
            `[B, K, D]`.
        """
        stream = begin_stream(tokens, self.config)
        if guides is not None and len(self.conditioning) > 0:
            stacked = self.project_vectors(vectors)
            for step in self.conditioning:
                stream = step(*stream, stacked, guides)
        for block in self.blocks:
            stream = block(*stream)
        return norm(self.norm, stream)

    def project_vectors(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Project auxiliary vectors, name -> `[B, aux_dim]`, to the width of the encoder: `[B, len(vectors), D]`."""
        return torch.stack([project(self.aux_projections[name], vector) for name, vector in vectors.items()], dim=1)

    def decode(self, latent: Tensor, mask: TokenMask, ids_predicted: Tensor) -> Tensor:
        """Predict masked tokens from the visible ones.

        Args:
            latent: `[B, K, D]`, the encoded visible tokens, in the order of `mask.ids_keep`.
            mask: the mask of the batch.
            ids_predicted: `[B, M']`, the tokens to predict.

        Returns:
            `[B, M', target_dim]`.
        """
        position = position_table(self.decoder_pos_embed_spatial, self.decoder_pos_embed_spectral)
        visible = project(self.decoder_embed, latent)
        if self.config.decode_fraction == 1:
            tokens = decoder_tokens(visible, self.mask_token[0, 0], mask.ids_restore, position)
        else:  # visible tokens, then predicted ones: attention does not depend on their order
            (batch, keep), decoded = mask.ids_keep.shape, ids_predicted.shape[1]
            tokens = torch.cat([visible, self.mask_token.expand(batch, decoded, -1)], dim=1)
            tokens = tokens + F.embedding(torch.cat([mask.ids_keep, ids_predicted], dim=1), position)
            ids_predicted = torch.arange(keep, keep + decoded, device=tokens.device).expand(batch, -1)  # among tokens
        stream = begin_stream(tokens, self.config)  # [B, N, width], or [B, K + M', width]
        *earlier, last = self.decoder_blocks
        for block in earlier:
            stream = block(*stream)
        return self.predict(last(*stream, ids_predicted))

    def predict(self, stream: Stream) -> Tensor:
        """Apply the decoder's norm and its prediction layer: `[B, M', width]` -> `[B, M', target_dim]`."""
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
        """Return the reconstruction loss of a prediction.

        Args:
            prediction: `[B, M', target_dim]`.
            volume: `[B, C, T, image_size, image_size]`.
            ids_predicted: `[B, M']`, the predicted tokens.
            weights: `[B, M']`, their weights; None means 1 each.
            embedded: what `embed_by_module` returned for the volume.
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

    def contrast(self, latent: Tensor, vectors: Mapping[str, Tensor], presence: Mapping[str, Tensor]) -> Tensor:
        """Return the contrastive loss of encoded tokens `[B, K, D]` against auxiliary vectors."""
        queries = project(self.contrastive_head, latent.mean(dim=1))
        return contrastive_loss(self.config, queries, vectors, presence)

    def product_layers(self, modalities: Iterable[str], each_encoder: bool = True) -> list[nn.Module]:
        layers = super().product_layers(modalities, each_encoder)
        layers += [self.decoder_embed, *self.decoder_blocks, self.decoder_pred]
        if self.config.aux:
            layers += [*self.conditioning, self.contrastive_head]
        for name in modalities:
            layers.append(self.aux_projections[name])
            if each_encoder:
                layers += getattr(self.aux_encoders[name], "blocks", ())  # a CNN has none
        return layers

    def _sum_of_unused(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Sum the parameters that no sample of this rank uses: data-parallel wrappers wait for every gradient."""
        unused = [module for name, module in self.aux_encoders.items() if name not in vectors]
        unused += [module for name, module in self.aux_projections.items() if name not in vectors]
        if not vectors:
            unused += self.conditioning
        parameters = [parameter for module in unused for parameter in module.parameters()]
        return torch.stack([parameter.sum() for parameter in parameters]).sum() if parameters else self.mask_token.sum()

    def hsi_encoder(
        self,
        *,
        image_size: int | None = None,
        bands: int | None = None,
        wavelengths: Sequence[float] | None = None,
    ) -> HSIEncoder:
        """Return the HSI encoder alone, over all tokens.

        It shares this model's parameters, except position embeddings that are resized for another `image_size`, other
        `bands` or other `wavelengths`. Its config has no auxiliary images.

        Args:
            image_size: side of the images in pixels; None means the model's.
            bands: number of bands; None means the model's.
            wavelengths: of the bands in nm, only for a model that has wavelengths in its config.

        Raises:
            ValueError: there is not one wavelength for each band, or the model was made without wavelengths.
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
