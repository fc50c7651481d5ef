"""Checks of a model's inputs before any work, random draws from a seed, and the output that both models return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmmae_kernels import TokenMask, random_masking
from mmmae_kernels.checks import (
    check_device,
    check_dtype,
    check_floating,
    check_ids,
    check_rank,
    check_shape,
    check_tensor,
    described,
    is_readable,
)
from mmmae_kernels.dispatch import in_debug_mode
from mmmae_kernels.random_masking.op import check_seed, seed_tensor
from mmmae_kernels.random_masking.reference import DROPOUT_STREAM, philox_noise

from ..config import MMMAEConfig


class Output(NamedTuple):
    """The output of a forward pass. K tokens are visible, M are masked, and M' of these are predicted.

    Attributes:
        loss: `[]`, loss_reconstruction + contrastive_weight * loss_contrastive.
        loss_reconstruction: `[]`.
        loss_contrastive: `[]`, the mean over the modalities that are present, 0 if none is.
        prediction: `[B, M', target_dim]` of the first M' masked tokens, in the order of `mask.ids_masked`.
        latent: `[B, K, D]` of the visible tokens, in the order of `mask.ids_keep`.
        mask: all tables of the mask.

    Example:
        >>> model = mmmae.fast_model("tiny")
        >>> out = model(torch.randn(2, 1, 12, 224, 224), seed=0)
        >>> out.prediction.shape, out.latent.shape
        (torch.Size([2, 588, 64]), torch.Size([2, 196, 64]))
        >>> out.mask.ids_keep.shape, out.mask.ids_masked.shape
        (torch.Size([2, 196]), torch.Size([2, 588]))
    """

    loss: Tensor
    loss_reconstruction: Tensor
    loss_contrastive: Tensor
    prediction: Tensor
    latent: Tensor
    mask: TokenMask


def check_hsi(config: MMMAEConfig, hsi: Tensor, device: torch.device | None = None) -> None:
    """Raise ValueError unless `hsi` is a float `[B, C, T, H, W]` volume with the config's channels and bands.

    Args:
        config: of the model.
        hsi: the volume.
        device: the device of the model, where `hsi` must lie; None or `meta` allow any device.
    """
    check_tensor("hsi", hsi)
    if hsi.dim() == 4:
        raise ValueError(
            f"hsi has shape {list(hsi.shape)}, expected [B, C, T, H, W]; a volume without channel axis needs "
            "hsi[:, None]"
        )
    check_rank("hsi", hsi, "[B, C, T, H, W]")
    if device is not None and device.type != "meta" and hsi.device != device:
        raise ValueError(f"hsi is on {hsi.device}, expected {device} like the model's parameters; hsi.to(...) moves it")
    check_floating("hsi", hsi)
    if hsi.shape[1] != config.in_channels:
        raise ValueError(f"hsi has {hsi.shape[1]} channels (C), expected in_channels = {config.in_channels}")
    if hsi.shape[2] != config.bands:
        bands, pt = hsi.shape[2], config.patch[0]
        multiple = "" if bands % pt == 0 else f"; {bands} is not a multiple of the spectral patch {pt}"
        raise ValueError(f"hsi has {bands} bands (T), expected bands = {config.bands}{multiple}")
    check_not_empty("hsi", hsi)
    _check_finite("hsi", hsi, None)


def check_aux(
    config: MMMAEConfig, hsi: Tensor, aux: Mapping[str, Tensor | None] | None, present: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Check auxiliary images and their presence.

    Args:
        config: of the model.
        hsi: the volumes that the images belong to.
        aux, present: see `FastModel.forward`.

    Returns:
        The images that are given, and bool `[B]` for each of them: which samples have it. Both by name, in the order
        of the config.

    Raises:
        ValueError: a modality is unknown, an image or a presence has the wrong shape or type, or `present` names an
            image that `aux` lacks.
    """
    aux, present = {} if aux is None else aux, {} if present is None else present
    for argument, names in (("aux", aux), ("present", present)):
        if not isinstance(names, Mapping):
            raise ValueError(f"{argument} is {described(names)}, expected a dict of modality name to Tensor")
        for name in names:
            if name not in config.aux:
                known = ", ".join(config.aux) or "none"
                raise ValueError(f"{argument} has an unknown modality {name!r}, must be one of {known}")
    batch = hsi.shape[0]
    images, presence = {}, {}
    for name, has in present.items():
        if not isinstance(has, Tensor) or has.is_sparse or has.dtype != torch.bool or tuple(has.shape) != (batch,):
            raise ValueError(f"present[{name!r}] is {described(has)}, expected a torch.bool Tensor of shape [{batch}]")
        if aux.get(name) is None and _host_may_look(has) and bool(has.any()):
            raise ValueError(f"present[{name!r}] is true for some samples, expected an image in aux[{name!r}]")
    for name, channels in config.aux.items():
        image = aux.get(name)
        if image is None:
            continue
        label = f"aux[{name!r}]"
        check_tensor(label, image)
        check_rank(label, image, "[B, C, H, W]")
        check_floating(label, image)
        if image.shape[0] != batch or image.shape[1] != channels:
            raise ValueError(f"{label} has shape {list(image.shape)}, expected [{batch}, {channels}, H, W]")
        check_not_empty(label, image)
        check_device(label, image, hsi.device)
        images[name] = image
        has = present[name] if name in present else hsi.new_ones(batch, dtype=torch.bool)
        presence[name] = has.to(hsi.device, non_blocking=True)
        _check_finite(label, image, presence[name])
    return images, presence


def check_valid(hsi: Tensor, valid: Tensor | None) -> None:
    """Raise ValueError unless `valid` is None or bool `[B, H, W]` of the size of `hsi`."""
    if valid is None:
        return
    check_shape("valid", valid, (hsi.shape[0], hsi.shape[3], hsi.shape[4]))
    check_dtype("valid", valid, torch.bool)
    check_device("valid", valid, hsi.device)


def draw_mask(config: MMMAEConfig, hsi: Tensor, mask: TokenMask | None, seed: int | Tensor) -> TokenMask:
    """Return the given mask after checks, or one drawn from `seed` for the samples of this rank."""
    batch = hsi.shape[0]
    if mask is None:
        first = first_sample(batch)
        units = config.mask_units
        keep = config.keep * units // config.tokens
        drawn = random_masking(batch, units, keep, seed, device=hsi.device, first_sample=first)
        return drawn if units == config.tokens else _mask_of_units(config, drawn)
    if not isinstance(mask, TokenMask):
        raise ValueError(
            f"mask is {described(mask)}, expected a TokenMask; TokenMask(ids_keep, ids_masked, ids_restore) makes one"
        )
    check_seed(seed)
    for name, ids in zip(mask._fields, mask, strict=True):
        check_rank(f"mask.{name}", ids, "[B, N]")
    keep, masked = mask.ids_keep.shape[-1], mask.ids_masked.shape[-1]
    if keep == 0 or keep + masked != config.tokens:
        raise ValueError(
            f"mask has {keep} visible and {masked} masked tokens, expected {config.tokens} in total and at least one "
            "visible token"
        )
    if masked > 0 and config.decoded_of(masked) == 0:
        raise ValueError(
            f"mask has {masked} masked tokens, expected enough of them for decode_fraction = {config.decode_fraction} "
            "to leave one to predict"
        )
    for name, ids, width in zip(mask._fields, mask, (keep, masked, config.tokens), strict=True):
        check_shape(f"mask.{name}", ids, (batch, width))
        check_device(f"mask.{name}", ids, hsi.device)
        check_ids(f"mask.{name}", ids, config.tokens)
    return mask


def _mask_of_units(config: MMMAEConfig, drawn: TokenMask) -> TokenMask:
    """Return the mask of all tokens where whole units are drawn, places or spectral groups; see `config.masking`."""
    groups, rows, columns = config.grid
    places = rows * columns
    device = drawn.ids_restore.device
    if config.masking == "spectra":  # token = group * places + place
        members, own, others = groups, 1, torch.arange(groups, device=device) * places
    else:
        members, own, others = places, places, torch.arange(places, device=device)

    def tokens(ids: Tensor) -> Tensor:
        return (ids[:, :, None] * own + others).flatten(1)

    restore = drawn.ids_restore[:, :, None] * members + torch.arange(members, device=device)  # [B, units, members]
    restore = restore.transpose(1, 2) if config.masking == "spectra" else restore
    return TokenMask(tokens(drawn.ids_keep), tokens(drawn.ids_masked), restore.flatten(1))


def decoded_ids(config: MMMAEConfig, mask: TokenMask) -> Tensor:
    """Return the masked tokens to predict, `[B, M']`: the first of `ids_masked`, all of them if `decode_fraction` is 1.

    `random_masking` lists masked tokens in random order, so that the first ones are a random sample. In a mask given by
    the user, the user's order decides.
    """
    if config.decode_fraction == 1:
        return mask.ids_masked
    masked = int(mask.ids_masked.shape[1])  # under torch.jit.trace it is a tensor, which has no exact rounding
    return mask.ids_masked[:, : config.decoded_of(masked)]


def draw_conditioning(
    config: MMMAEConfig, presence: Mapping[str, Tensor], seed: int | Tensor, *, training: bool
) -> Tensor:
    """Draw which modalities guide which sample: those that it has, except the ones dropped in training.

    Args:
        config: of the model; its `conditioning_dropout` is the probability to drop one.
        presence: name -> bool `[B]`, not empty, in the order of the config.
        seed: determines what is dropped, together with the numbers of sample and modality.
        training: whether the model trains.

    Returns:
        Bool `[B, len(presence)]`.
    """
    guides = torch.stack(list(presence.values()), dim=1)
    if not training or config.conditioning_dropout == 0:
        return guides
    batch = guides.shape[0]
    samples = torch.arange(first_sample(batch), first_sample(batch) + batch, device=guides.device)
    key = seed_on(seed, guides.device)
    noise: Tensor = philox_noise(key, samples, len(config.aux), DROPOUT_STREAM)
    columns = [list(config.aux).index(name) for name in presence]
    noise = torch.stack([noise[:, column] for column in columns], dim=1)  # an index list would be copied to the device
    return guides & (noise >= config.dropout_threshold)


def draw_seed() -> Tensor:
    """Draw a seed from torch's default generator, so that `torch.manual_seed` determines it."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def seed_on(seed: int | Tensor, device: torch.device) -> Tensor:
    """Return the seed as an int64 scalar on `device`, without a copy from the host, which would wait for the device."""
    key = seed_tensor(seed)
    if key.device.type == "cpu" and device.type != "cpu" and not torch.compiler.is_compiling():
        return torch.full((), int(key), dtype=torch.int64, device=device)
    return key.to(device)


def first_sample(batch: int) -> int:
    """Return the number of this rank's first sample in the batch of all ranks."""
    return torch.distributed.get_rank() * batch if is_distributed() else 0


def is_distributed() -> bool:
    """Return whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_not_empty(name: str, image: Tensor) -> None:
    """Raise ValueError if a dimension of the image is 0."""
    if 0 in image.shape:
        raise ValueError(f"{name} has shape {list(image.shape)}, expected no dimension of 0")


def _host_may_look(tensor: Tensor) -> bool:
    """Return whether a check may read the values of a tensor: on a GPU, where it has to wait, only in debug mode."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or in_debug_mode())


def _check_finite(name: str, image: Tensor, present: Tensor | None) -> None:
    if not in_debug_mode() or not is_readable(image):
        return
    broken = ~image.isfinite().flatten(1).all(1)
    if present is not None:
        broken &= present
    if bool(broken.any()):
        samples = ", ".join(str(index) for index in broken.nonzero().flatten().tolist())
        raise ValueError(f"{name} has NaN or infinity in sample {samples} of the batch")
