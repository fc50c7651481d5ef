"""What a model accepts: checks that raise before any work, and the output both models return."""

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
    """What a forward pass returns. K visible tokens, M masked ones, of which M' are predicted, see `decoded_ids`."""

    loss: Tensor  # [] reconstruction + contrastive_weight * contrastive
    loss_reconstruction: Tensor  # []
    loss_contrastive: Tensor  # [] mean over the modalities that are present, 0 if none is
    prediction: Tensor  # [B, M', target_dim] of the first masked tokens, in the order of mask.ids_masked
    latent: Tensor  # [B, K, D] of the visible tokens, in the order of mask.ids_keep
    mask: TokenMask  # all of it


def check_hsi(config: MMMAEConfig, hsi: Tensor, device: torch.device | None = None) -> None:
    """Raise ValueError unless `hsi` is a float `[B, C, T, H, W]` volume with the config's channels and bands.

    Args:
        device: the model's, where `hsi` must lie; None, or `meta` for parameters that are yet to come, for any.
    """
    check_tensor("hsi", hsi)
    if hsi.dim() == 4:
        raise ValueError(
            f"hsi has shape {list(hsi.shape)}, expected [B, C, T, H, W]; a volume without channel axis needs "
            "hsi[:, None]"
        )
    check_rank("hsi", hsi, "[B, C, T, H, W]")
    if device is not None and device.type != "meta" and hsi.device != device:
        raise ValueError(f"hsi is on {hsi.device}, expected {device} as the model's parameters; hsi.to(...) moves it")
    check_floating("hsi", hsi)
    if hsi.shape[1] != config.in_channels:
        raise ValueError(f"hsi has {hsi.shape[1]} channels (C), expected in_channels = {config.in_channels}")
    if hsi.shape[2] != config.bands:
        multiple = (
            "" if hsi.shape[2] % config.patch[0] == 0 else f", and no multiple of the spectral patch {config.patch[0]}"
        )
        raise ValueError(f"hsi has {hsi.shape[2]} bands (T), expected bands = {config.bands}{multiple}")
    check_not_empty("hsi", hsi)
    _check_finite("hsi", hsi, None)


def check_aux(
    config: MMMAEConfig, hsi: Tensor, aux: Mapping[str, Tensor | None] | None, present: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The images of the modalities that any sample has, in the config's order, and who has them (bool `[B]` each).

    Raises:
        ValueError: a modality is unknown, an image or a presence does not fit, or a sample has an image not given.
    """
    aux, present = {} if aux is None else aux, {} if present is None else present
    for argument, names in (("aux", aux), ("present", present)):
        if not isinstance(names, Mapping):
            raise ValueError(f"{argument} is {described(names)}, expected a dict of modality name to Tensor")
        for name in names:
            if name not in config.aux:
                known = ", ".join(config.aux) or "none"
                raise ValueError(f"{argument} has an unknown modality {name!r}, must be one of: {known}")
    batch = hsi.shape[0]
    images, presence = {}, {}
    for name, has in present.items():
        if not isinstance(has, Tensor) or has.is_sparse or has.dtype != torch.bool or tuple(has.shape) != (batch,):
            raise ValueError(f"present[{name!r}] is {described(has)}, expected a torch.bool Tensor of shape [{batch}]")
        if aux.get(name) is None and _host_may_look(has) and bool(has.any()):
            raise ValueError(f"present[{name!r}] says that samples have it, but aux has no image for it")
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
    """Raise ValueError unless `valid` is None or bool `[B, H, W]` of the HSI's size."""
    if valid is None:
        return
    check_shape("valid", valid, (hsi.shape[0], hsi.shape[3], hsi.shape[4]))
    check_dtype("valid", valid, torch.bool)
    check_device("valid", valid, hsi.device)


def draw_mask(config: MMMAEConfig, hsi: Tensor, mask: TokenMask | None, seed: int | Tensor) -> TokenMask:
    """The given mask, checked, or one drawn from `seed` for this rank's samples."""
    batch = hsi.shape[0]
    if mask is None:
        first = first_sample(batch)
        return random_masking(batch, config.tokens, config.keep, seed, device=hsi.device, first_sample=first)
    if not isinstance(mask, TokenMask):
        raise ValueError(f"mask is {described(mask)}, expected a TokenMask; TokenMask(*tables) makes one of three")
    check_seed(seed)
    for name, ids in zip(mask._fields, mask, strict=True):
        check_rank(f"mask.{name}", ids, "[B, N]")
    keep, masked = mask.ids_keep.shape[-1], mask.ids_masked.shape[-1]
    if keep == 0 or keep + masked != config.tokens:
        raise ValueError(
            f"mask has {keep} visible and {masked} masked tokens, expected {config.tokens} together, one visible"
        )
    if masked > 0 and config.decoded_of(masked) == 0:
        raise ValueError(
            f"mask has {masked} masked tokens, expected enough that decode_fraction = {config.decode_fraction} "
            "leaves one to predict"
        )
    for name, ids, width in zip(mask._fields, mask, (keep, masked, config.tokens), strict=True):
        check_shape(f"mask.{name}", ids, (batch, width))
        check_device(f"mask.{name}", ids, hsi.device)
        check_ids(f"mask.{name}", ids, config.tokens)
    return mask


def decoded_ids(config: MMMAEConfig, mask: TokenMask) -> Tensor:
    """The masked tokens that are predicted, `[B, M']`: the first of `ids_masked`, all at a `decode_fraction` of 1.

    `random_masking` lists masked tokens in the order of their noise, so that its first are a uniformly random share. In
    a mask that a user gives the order, and so the choice, is the user's.
    """
    if config.decode_fraction == 1:
        return mask.ids_masked
    masked = int(mask.ids_masked.shape[1])  # a tensor, which nothing can round, where torch.jit traces
    return mask.ids_masked[:, : config.decoded_of(masked)]


def draw_conditioning(
    config: MMMAEConfig, presence: Mapping[str, Tensor], seed: int | Tensor, *, training: bool
) -> Tensor:
    """Which modality guides which sample: those it has, less those that `conditioning_dropout` hides in training.

    Args:
        presence: name -> bool `[B]`, not empty, in the config's order.
        seed: with the sample's and the modality's number it alone decides what is dropped.

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
    chosen = torch.stack([noise[:, column] for column in columns], dim=1)  # a list as index is copied to the device
    return guides & (chosen >= config.dropout_threshold)


def draw_seed() -> Tensor:
    """A seed from torch's default generator, so that `torch.manual_seed` governs what is drawn from it."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def seed_on(seed: int | Tensor, device: torch.device) -> Tensor:
    """Return the seed as an int64 scalar on `device`; one from the host is filled in, because a copy is waited for."""
    key = seed_tensor(seed)
    if key.device.type == "cpu" and device.type != "cpu" and not torch.compiler.is_compiling():
        return torch.full((), int(key), dtype=torch.int64, device=device)
    return key.to(device)


def first_sample(batch: int) -> int:
    """Number of this rank's first sample in the batch of all ranks."""
    return torch.distributed.get_rank() * batch if is_distributed() else 0


def is_distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_not_empty(name: str, image: Tensor) -> None:
    """Raise ValueError if a dimension is 0."""
    if 0 in image.shape:
        raise ValueError(f"{name} is empty: its shape is {list(image.shape)}")


def _host_may_look(tensor: Tensor) -> bool:
    """Return whether a check may read values: from a GPU, which is waited for, in debug mode alone."""
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
