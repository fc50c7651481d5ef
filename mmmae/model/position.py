"""Learned separable position embeddings, and how they change for another grid or other wavelengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import MMMAEConfig

NANOMETRES_A_POSITION = 10.0  # about a band of an imaging spectrometer
AMPLITUDE = 0.02 * math.sqrt(2)  # the sinusoids then have the standard deviation of random positions, 0.02


def position_table(spatial: Tensor, spectral: Tensor) -> Tensor:
    """Return the position of every token, `[t*h*w, D]`, from `spatial [1, h*w, D]` and `spectral [1, t, D]`."""
    return (spectral.transpose(0, 1) + spatial).flatten(0, 1)


def wavelength_embedding(wavelengths: Sequence[float], patch: int, dim: int) -> Tensor:
    """Return initial spectral positions: sinusoids of the mean wavelength of each token's bands.

    The frequencies are those of Vaswani et al. (2017), with positions in steps of 10 nm. The periods then run from
    63 nm, at which neighbouring bands of a spectrometer are different but similar, to beyond the thermal infrared.

    Args:
        wavelengths: of the T bands, in nm.
        patch: number of bands in a token.
        dim: D.

    Returns:
        `[1, T / patch, D]` float32: sines in the first half of D, cosines in the second.
    """
    position = mean_wavelengths(wavelengths, patch)[:, None] / NANOMETRES_A_POSITION
    pairs = math.ceil(dim / 2)
    angle = position * 10000 ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
    return AMPLITUDE * torch.cat([angle.sin(), angle.cos()], dim=1)[None, :, :dim].to(torch.float32)


def mean_wavelengths(wavelengths: Sequence[float], patch: int) -> Tensor:
    """Return the mean wavelength in nm of each token's bands, `[T / patch]` float64, on the CPU."""
    return torch.tensor(wavelengths, dtype=torch.float64, device="cpu").view(-1, patch).mean(dim=1)


def resize_positions(weights: dict[str, Tensor], old: MMMAEConfig, new: MMMAEConfig) -> dict[str, Tensor]:
    """Resize position embeddings to the grid and wavelengths of another config.

    Args:
        weights: of a model or encoder, by name.
        old: the config that the weights belong to.
        new: the config to resize them for.

    Returns:
        The position embeddings that change, by name.

    Raises:
        ValueError: an embedding does not have the size of `old`'s grid, or `new` has wavelengths and `old` has none.
    """
    if new.wavelengths is not None and old.wavelengths is None:
        raise ValueError(
            "wavelengths are given, but the weights were pretrained without: leave them out to interpolate positions "
            "by band number, or pretrain with the config field wavelengths"
        )
    (old_groups, *old_plane), (groups, *plane) = old.grid, new.grid
    resized = {}
    for name, weight in weights.items():
        if name.endswith("pos_embed_spatial"):
            resized[name] = _resize_plane(name, weight, old_plane, plane)
        elif name.startswith("aux_encoders.") and name.endswith(".pos_embed"):
            old_side, side = (config.image_size // config.aux_patch for config in (old, new))
            resized[name] = _resize_plane(name, weight, [old_side, old_side], [side, side])
        elif name.endswith("pos_embed_spectral"):
            _check_rows(name, weight, old_groups)
            if new.wavelengths is not None and old.wavelengths is not None:
                resized[name] = move_spectral(weight, old.wavelengths, new.wavelengths)
            else:
                resized[name] = resize_spectral(weight, groups)
    return {name: weight for name, weight in resized.items() if weight is not weights[name]}


def resize_spatial(spatial: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize `[1, h*w, D]` from the grid `old` to the grid `new` by bicubic interpolation, as is usual for ViTs.

    With antialias, PyTorch's kernel is Keys' with a = -0.5, which reproduces linear ramps; without, it is not.
    """
    image = spatial.reshape(1, *old, -1).permute(0, 3, 1, 2).to(torch.float32)
    resized = F.interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=True)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(spatial.dtype)


def resize_spectral(spectral: Tensor, groups: int) -> Tensor:
    """Resize `[1, t, D]` to `[1, groups, D]` by linear interpolation; return the tensor itself if t is `groups`."""
    if spectral.shape[1] == groups:
        return spectral
    bands = spectral.transpose(1, 2).to(torch.float32)
    return F.interpolate(bands, size=groups, mode="linear", align_corners=False).transpose(1, 2).to(spectral.dtype)


def move_spectral(spectral: Tensor, old: Sequence[float], new: Sequence[float]) -> Tensor:
    """Move spectral positions `[1, t, D]` from the wavelengths `old` to the wavelengths `new`.

    The sinusoids of the old wavelengths are replaced by those of the new ones. The rest, which was learned, is
    interpolated linearly over the mean wavelengths of the tokens, and constant beyond the first and last. The tensor
    itself is returned if the wavelengths are the same.
    """
    if tuple(old) == tuple(new):
        return spectral
    patch, dim = len(old) // spectral.shape[1], spectral.shape[2]
    learned = spectral[0].detach().to("cpu", torch.float64) - wavelength_embedding(old, patch, dim)[0]
    known, order = mean_wavelengths(old, patch).sort()
    learned = interpolate(learned[order], known, mean_wavelengths(new, patch))
    return (wavelength_embedding(new, patch, dim) + learned[None]).to(spectral)


def interpolate(rows: Tensor, known: Tensor, wanted: Tensor) -> Tensor:
    """Interpolate rows `[t, D]`, given at increasing positions `known [t]`, linearly at the positions `wanted [g]`.

    Beyond the ends the first and the last row are used.
    """
    right = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    left = (right - 1).clamp(min=0)
    gap = (known[right] - known[left]).clamp(min=torch.finfo(known.dtype).tiny)
    share = ((wanted - known[left]) / gap).clamp(0, 1)
    return torch.lerp(rows[left], rows[right], share[:, None])


def _resize_plane(name: str, weight: Tensor, old: list[int], new: list[int]) -> Tensor:
    _check_rows(name, weight, old[0] * old[1])
    return weight if old == new else resize_spatial(weight, (old[0], old[1]), (new[0], new[1]))


def _check_rows(name: str, weight: Tensor, rows: int) -> None:
    if weight.dim() != 3 or weight.shape[1] != rows:
        raise ValueError(f"{name} has shape {list(weight.shape)}, expected [1, {rows}, D] for its config")
