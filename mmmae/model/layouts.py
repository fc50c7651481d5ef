"""Patch and position embeddings of others' checkpoints, in the form that this project's encoder has.

Transformer blocks have the same parts everywhere; how networks embed patches, bands and positions is what differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = Mapping[str, Tensor]

KERNEL, BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
SPATIAL, SPECTRAL = "pos_embed_spatial", "pos_embed_spectral"
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
# SpectralEarth's adapter: the numbers of its convolutions along the bands, and their strides, which no weight shows.
ADAPTER_LAYERS, ADAPTER_STRIDES, ADAPTER_PADDING = (0, 3, 6), (5, 5, 3), 1
ENMAP_BANDS = 202  # that SpectralEarth's networks were pretrained on


class Source(NamedTuple):
    """What becomes of a weight of the file.

    Attributes:
        target: the weight of the encoder that it goes into.
        outcome: "loaded", or "adapted" if the numbers change.
        reason: how they change; may be empty.
    """

    target: str
    outcome: str = "loaded"
    reason: str = ""


class Embeddings(NamedTuple):
    """Patch and position embeddings of a network.

    Attributes:
        kernel: `[D, C, pt, ph, pw]`.
        bias: `[D]`, or None.
        spatial: positions `[1, h*w, D]`, or None if the network has none.
        spectral: positions `[1, t, D]`, or None.
        sources: the weights of the file that these were made from.
    """

    kernel: Tensor
    bias: Tensor | None
    spatial: Tensor | None
    spectral: Tensor | None
    sources: dict[str, Source]


class Layout(NamedTuple):
    """A way in which checkpoints name their embeddings.

    Attributes:
        name: of networks that have it.
        needed: names of weights; the first one tells the layout from others.
        read: makes the embeddings from the weights of a file and the number of bands that the user asks for, or None.
    """

    name: str
    needed: tuple[str, ...]
    read: Callable[[Tensors, int | None], Embeddings]


def find_layout(tensors: Tensors) -> Layout:
    """Return the layout of a checkpoint by the names of its weights.

    Raises:
        ValueError: it has none that is known.
    """
    for layout in LAYOUTS:
        if layout.needed[0] in tensors:
            return layout
    known = "; ".join(f"{layout.needed[0]} ({layout.name})" for layout in LAYOUTS)
    found = ", ".join(list(tensors)[:3])
    raise ValueError(f"not an encoder of a known layout: it holds {found or 'no weights'}, expected one of {known}")


def resample_bands(kernel: Tensor, bands: int) -> Tensor:
    """Return a patch kernel for another number of bands in a token.

    A band of the new kernel takes its share of each old band that it overlaps, if both divide the same part of the
    spectrum evenly. The new kernel then answers to a spectrum as the old one does to averages of it, and to a constant
    spectrum with the same numbers; so are kernels inflated in I3D (Carreira and Zisserman, 2017).

    Args:
        kernel: `[D, C, pt, ph, pw]`.
        bands: the new pt.
    """
    old = kernel.shape[2]
    if old == bands:
        return kernel
    edges, old_edges = (torch.arange(n + 1, dtype=torch.float64, device="cpu") / n for n in (bands, old))
    starts = torch.maximum(edges[:-1, None], old_edges[:-1])
    ends = torch.minimum(edges[1:, None], old_edges[1:])
    overlap = (ends - starts).clamp(min=0) * old  # [new, old]: shares of old bands, each adds up to 1
    return torch.einsum("nt,dctyx->dcnyx", overlap.to(kernel), kernel)


def _spectralgpt(tensors: Tensors, bands: int | None) -> Embeddings:
    kernel = _kernel(tensors, KERNEL, "D, C, bands, rows, columns")
    spatial, spectral = (_positions(tensors, name, len(kernel)) for name in (SPATIAL, "pos_embed_temporal"))
    sources = {KERNEL: Source(KERNEL), SPATIAL: Source(SPATIAL), "pos_embed_temporal": Source(SPECTRAL)}
    return Embeddings(kernel, tensors.get(BIAS), spatial, spectral, {**sources, **_bias_source(tensors)})


def _vit(tensors: Tensors, bands: int | None) -> Embeddings:
    """Read a plain ViT: its channels become the bands of one token."""
    kernel = _kernel(tensors, KERNEL, "D, bands, rows, columns")
    positions = tensors["pos_embed"]
    width = positions.shape[-1] if positions.dim() == 3 and 0 < positions.shape[2] < len(kernel) else len(kernel)
    spatial, reason = _without_prefix(tensors, _positions(tensors, "pos_embed", width))
    if width < len(kernel):  # SatMAE's networks of time series compute the rest from dates
        spatial = F.pad(spatial, (0, len(kernel) - width))
        reason = "; ".join(filter(None, [reason, f"0 in {len(kernel) - width} channels, which encode dates there"]))
    sources = {KERNEL: Source(KERNEL), "pos_embed": Source(SPATIAL, reason=reason), **_bias_source(tensors)}
    return Embeddings(kernel[:, None], tensors.get(BIAS), spatial, None, sources)


def _channel_groups(tensors: Tensors, bands: int | None) -> Embeddings:
    """Read a network with one kernel for each group of bands, where this encoder has one for all: their mean."""
    spectral = tensors["channel_embed"]
    groups = spectral.shape[1] if spectral.dim() == 3 else 0
    names = [f"patch_embed.{group}.proj.weight" for group in range(groups)]
    kernels = [_kernel(tensors, name, "D, bands, rows, columns") for name in names]
    if not kernels or len({(len(kernel), *kernel.shape[2:]) for kernel in kernels}) != 1:
        shapes = ", ".join(str(list(kernel.shape)) for kernel in kernels) or "no weights"
        raise ValueError(
            f"its patch kernels are {shapes}, expected one for each group of bands, of equal widths and sizes"
        )
    dim, width = len(kernels[0]), spectral.shape[2]
    _positions(tensors, "channel_embed", width)
    spatial, reason = _without_prefix(tensors, _positions(tensors, "pos_embed", dim - width))
    size = max(kernel.shape[1] for kernel in kernels)
    mean = torch.stack([resample_bands(kernel[:, None], size) for kernel in kernels]).mean(dim=0)
    biases = [tensors.get(name.replace(".weight", ".bias"), mean.new_zeros(dim)) for name in names]
    bias = torch.stack(biases).mean(dim=0)
    # Positions and channel embeddings are concatenated there, here added; a bias of a group is a position as well.
    spectral = F.pad(spectral, (dim - width, 0)) + torch.stack(biases) - bias
    how = f"the mean of {groups} groups' kernels of {size} bands"
    sources = {name: Source(KERNEL, "adapted", how) for name in names}
    rest = "their mean, and the differences into pos_embed_spectral"
    sources |= {name: Source(BIAS, "adapted", rest) for name in (n.replace(".weight", ".bias") for n in names)}
    sources |= {"pos_embed": Source(SPATIAL, reason=reason), "channel_embed": Source(SPECTRAL)}
    return Embeddings(mean, bias, F.pad(spatial, (0, width)), spectral, sources)


def _spectral_tokens(tensors: Tensors, bands: int | None) -> Embeddings:
    """Read a network whose tokens are bands of a whole image: the image is one patch."""
    weight = tensors["spat_map.weight"]
    side = math.isqrt(weight.shape[1]) if weight.dim() == 2 else 0
    if side == 0 or side**2 != weight.shape[1]:
        raise ValueError(f"spat_map.weight has shape {list(weight.shape)}, expected [D, pixels of a square]")
    spectral = _positions(tensors, "pos_embed", len(weight))
    sources = {"spat_map.weight": Source(KERNEL), "pos_embed": Source(SPECTRAL)}
    sources |= {"spat_map.bias": Source(BIAS)} if "spat_map.bias" in tensors else {}
    kernel = weight.reshape(len(weight), 1, 1, side, side)
    return Embeddings(kernel, tensors.get("spat_map.bias"), None, spectral, sources)


def _spectral_adapter(tensors: Tensors, bands: int | None) -> Embeddings:
    """Read a ViT behind convolutions along the bands: all bands become one token, the convolutions a linear map."""
    inner = _vit(tensors, bands)
    offset, slope, names = _linearised_adapter(tensors, ENMAP_BANDS if bands is None else bands)
    features = inner.kernel[:, 0]  # [D, F, rows, columns]
    if features.shape[1] != len(offset):
        raise ValueError(f"{KERNEL} has {features.shape[1]} channels, expected {len(offset)}, those of the adapter")
    kernel = torch.einsum("dfyx,ft->dtyx", features, slope)[:, None]
    bias = torch.einsum("dfyx,f->d", features, offset) + tensors.get(BIAS, kernel.new_zeros(len(kernel)))
    how = f"of a spectral adapter, linearised at the mean spectrum of {slope.shape[1]} bands"
    sources = {name: Source(KERNEL, "adapted", how) for name in names}
    sources |= {KERNEL: Source(KERNEL, "adapted", "joined with the spectral adapter")}
    sources |= {BIAS: Source(BIAS, "adapted", "joined with the spectral adapter")} if BIAS in tensors else {}
    return inner._replace(kernel=kernel, bias=bias, sources={"pos_embed": inner.sources["pos_embed"], **sources})


def _linearised_adapter(tensors: Tensors, bands: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return features `[F]` at the mean spectrum, their derivative `[F, bands]` there, and the names of the weights.

    The mean spectrum is zero, as the network normalises bands. Around it the ReLUs that are open stay open, and the
    adapter is this linear map.
    """
    spectra = F.pad(torch.eye(bands, device="cpu"), (0, 0, 1, 0))[:, None]  # [1 + bands, 1, bands]
    names = []
    for layer, stride in zip(ADAPTER_LAYERS, ADAPTER_STRIDES, strict=True):
        convolution, norm = f"spectral_adapter.{layer}", f"spectral_adapter.{layer + 1}"
        layers = [f"{convolution}.weight", f"{convolution}.bias"]
        layers += [f"{norm}.{part}" for part in ("running_mean", "running_var", "weight", "bias")]
        check_names(tensors, layers)
        weight, bias, mean, variance, scale, shift = (tensors[name] for name in layers)
        if weight.dim() != 5 or weight.shape[1] != spectra.shape[1] or weight.shape[3:] != (1, 1):
            expected = f"[features, {spectra.shape[1]}, bands, 1, 1]"
            raise ValueError(f"{convolution}.weight has shape {list(weight.shape)}, expected {expected}")
        if spectra.shape[2] + 2 * ADAPTER_PADDING < weight.shape[2]:
            raise ValueError(f"bands is {bands}, expected enough for the three convolutions of the spectral adapter")
        spectra = F.conv1d(spectra, weight.flatten(2), bias, stride, ADAPTER_PADDING)
        spectra = F.batch_norm(spectra, mean, variance, scale, shift)
        spectra = spectra * (spectra[:1] > 0)
        names += layers
    features = spectra.mean(dim=2)
    return features[0], (features[1:] - features[0]).T, names


def check_names(tensors: Tensors, names: list[str] | tuple[str, ...], prefix: str = "it has no ") -> None:
    """Raise ValueError for the first name that no weight has."""
    for name in names:
        if name not in tensors:
            raise ValueError(f"{prefix}{name}")


def _kernel(tensors: Tensors, name: str, expected: str) -> Tensor:
    check_names(tensors, [name])
    kernel = tensors[name]
    if kernel.dim() != len(expected.split(",")) or 0 in kernel.shape:
        raise ValueError(f"{name} has shape {list(kernel.shape)}, expected [{expected}]")
    return kernel


def _positions(tensors: Tensors, name: str, dim: int) -> Tensor:
    check_names(tensors, [name])
    position = tensors[name]
    if position.dim() != 3 or position.shape[0] != 1 or position.shape[2] != dim:
        raise ValueError(f"{name} has shape {list(position.shape)}, expected [1, tokens, {dim}]")
    return position


def _without_prefix(tensors: Tensors, positions: Tensor) -> tuple[Tensor, str]:
    """Return positions without the rows of class and register tokens, which some networks have, and what was done."""
    prefix = sum(tensors[name].shape[1] for name in PREFIX_TOKENS if name in tensors and tensors[name].dim() == 3)
    patches = positions.shape[1] - prefix
    if prefix == 0 or patches <= 0 or math.isqrt(patches) ** 2 != patches:
        return positions, ""
    return positions[:, prefix:], f"without {prefix} of a class or register token" if prefix else ""


def _bias_source(tensors: Tensors) -> dict[str, Source]:
    return {BIAS: Source(BIAS)} if BIAS in tensors else {}


SPECTRALGPT = Layout("SpectralGPT", (SPATIAL, KERNEL, "pos_embed_temporal"), _spectralgpt)
LAYOUTS = (  # a network may have the names of a later one too
    SPECTRALGPT,
    Layout("SatMAE with groups of bands", ("channel_embed", "patch_embed.0.proj.weight", "pos_embed"), _channel_groups),
    Layout("HyperSIGMA's spectral network", ("spat_map.weight", "pos_embed"), _spectral_tokens),
    Layout("SpectralEarth", ("spectral_adapter.0.weight", KERNEL, "pos_embed"), _spectral_adapter),
    Layout("a ViT", ("pos_embed", KERNEL), _vit),
)
