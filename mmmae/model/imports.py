"""Import of encoders from the checkpoints of other networks; whatever has no place in this encoder is listed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_whole
from ..config import MMMAEConfig
from .checkpoints import read_tensors
from .encoder import HSIEncoder
from .layouts import (
    BIAS,
    KERNEL,
    SPATIAL,
    SPECTRAL,
    SPECTRALGPT,
    Embeddings,
    Layout,
    Source,
    check_names,
    find_layout,
    resample_bands,
)
from .position import resize_positions

HEAD_WIDTH = 64
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # of large ViTs, whose heads have another width
HIDDEN = "blocks.0.mlp.fc1.weight"
# Factors of a block's two outputs (LayerScale in timm, and as BEiT names it), by the layer that they are folded into.
SCALES = {"ls1.gamma": "attn.proj", "gamma_1": "attn.proj", "ls2.gamma": "mlp.fc2", "gamma_2": "mlp.fc2"}
NO_CLASS_TOKEN = "the encoder has no class token; its features differ from those of a network that has one"
LEFT_OUT = {
    r"decoder|mask_token": "of the decoder",
    r"cls_token|dist_token|pos_embed_class|channel_cls_embed": NO_CLASS_TOKEN,
    r"reg_token|register_tokens": "the encoder has no register tokens",
    r"head|fc_norm|fpn|conv_[qkv]\.|l1\.|teacher_head": "of another task",
    r"student_": "of the student; the teacher's weights are taken",
    r"patch_embed\.(spectral_adapter|original_patch_embed)\.": "another name of weights that are loaded",
    r".*num_batches_tracked": "a counter of training",
    r".*\.sampling_offsets\.": "its blocks attend to sampled points, these to all tokens",
    r".*\.[qk]_norm\.": "queries and keys are not normalised here; features differ",
    r".*(rel_pos|relative_position)": "attention has no relative positions here; features differ",
    r"norm_pre\.": "the encoder has no norm before its blocks; features differ",
}


class Entry(NamedTuple):
    """The outcome of an import for weights of one kind.

    Attributes:
        name: of the weights in the file, or in the encoder if they are missing; * stands for the number of a block.
        weights: how many there are.
        outcome: "loaded", "adapted", "resized", "left out" or "missing".
        reason: why, how, or into what; empty if there is nothing to say.
    """

    name: str
    weights: int
    outcome: str
    reason: str


def import_encoder(
    path: str | Path,
    *,
    heads: int | None = None,
    image_size: int | None = None,
    bands: int | None = None,
    patch_bands: int | None = None,
) -> tuple[HSIEncoder, list[Entry]]:
    """Load an encoder from the checkpoint of another network, which the names of its weights tell.

    The networks are SpectralGPT; ViTs of MAE and timm, also as SatMAE and HyperSIGMA have them; SatMAE with a kernel
    for each group of bands; HyperSIGMA's spectral network; and SpectralEarth. The shapes of the weights determine the
    config.

    Args:
        path: a checkpoint of PyTorch, with or without decoder, or a safetensors file.
        heads: number of attention heads, which no shape shows; None means heads of width 64, or 16 heads in ViTs of
            the widths 1152, 1280, 1408 and 1664.
        image_size, bands: to resize the position embeddings for; None means the checkpoint's.
        patch_bands: bands of a token, to adapt the patch kernel to; None means the checkpoint's.

    Returns:
        The encoder, and the outcome for each kind of weights, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, holds objects other than tensors and plain values, or no such network.

    Example:
        >>> weights = mmmae.fast_model("tiny").hsi_encoder().state_dict()  # stands for a published ViT of RGB images
        >>> weights["patch_embed.proj.weight"] = torch.randn(64, 3, 16, 16)
        >>> weights["pos_embed"] = weights.pop("pos_embed_spatial")
        >>> del weights["pos_embed_spectral"]
        >>> torch.save({"model": weights}, folder / "checkpoint.pth")
        >>> encoder, entries = mmmae.import_encoder(folder / "checkpoint.pth", heads=2, bands=12)
        >>> encoder.config.bands, encoder.config.patch
        (12, (3, 16, 16))
    """
    return _import(path, None, heads, image_size, bands, patch_bands)


def import_spectralgpt(
    path: str | Path, *, heads: int | None = None, image_size: int | None = None, bands: int | None = None
) -> tuple[HSIEncoder, list[Entry]]:
    """Load an encoder from a checkpoint of SpectralGPT (Hong et al., 2024): the same network under other names.

    Arguments, results and errors are those of `import_encoder`; checkpoints of other networks are refused.

    Example:
        >>> weights = mmmae.fast_model("tiny").hsi_encoder().state_dict()  # stands for a published checkpoint
        >>> weights["pos_embed_temporal"] = weights.pop("pos_embed_spectral")  # SpectralGPT's name
        >>> torch.save({"model": weights}, folder / "checkpoint.pth")
        >>> encoder, entries = mmmae.import_spectralgpt(folder / "checkpoint.pth", heads=2, image_size=112)
        >>> {(entry.name, entry.outcome, entry.reason) for entry in entries if entry.outcome != "loaded"}
        {('pos_embed_spatial', 'resized', '4 x 14 x 14 to 4 x 7 x 7 tokens')}
    """
    return _import(path, SPECTRALGPT, heads, image_size, bands, None)


def _import(
    path: str | Path,
    layout: Layout | None,
    heads: int | None,
    image_size: int | None,
    bands: int | None,
    patch_bands: int | None,
) -> tuple[HSIEncoder, list[Entry]]:
    path = Path(path)
    tensors = read_tensors(path)
    for field, value in (("heads", heads), ("image_size", image_size), ("bands", bands), ("patch_bands", patch_bands)):
        if value is not None:
            check_whole(field, value, 1)
    try:
        layout = find_layout(tensors) if layout is None else layout
        check_names(tensors, (*layout.needed, HIDDEN), f"not an encoder of {layout.name}: it has no ")
        embeddings = layout.read(tensors, bands)
        saved = _config(tensors, embeddings, heads)
        config = _changed(saved, image_size, bands, patch_bands)
        with torch.device("meta"):
            encoder = HSIEncoder(config)
        scaled, sources = _folded(tensors)
        sources |= embeddings.sources
        weights = {KERNEL: resample_bands(embeddings.kernel, config.patch[0])}
        for name, table in ((BIAS, embeddings.bias), (SPATIAL, embeddings.spatial), (SPECTRAL, embeddings.spectral)):
            shape = (config.dim,) if name == BIAS else (1, 1, config.dim)
            weights[name] = embeddings.kernel.new_zeros(shape) if table is None else table
        for name in encoder.state_dict():
            if name not in weights:
                names = _block_sources(name, tensors)
                weights[name] = _weight(name, scaled, names, saved)
                sources |= {source: Source(name) for source in names}
        resized = resize_positions(weights, saved, config)
        encoder.load_state_dict({**weights, **resized}, strict=True, assign=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    for parameter in encoder.parameters():
        parameter.requires_grad_()
    return encoder, _entries(tensors, sources, list(weights), resized, saved, config)


def _config(tensors: Mapping[str, Tensor], embeddings: Embeddings, heads: int | None) -> MMMAEConfig:
    dim, channels, pt, ph, pw = embeddings.kernel.shape
    patches = 1 if embeddings.spatial is None else embeddings.spatial.shape[1]
    size = math.isqrt(patches * ph * pw)
    if size**2 != patches * ph * pw:
        name = next(name for name, source in embeddings.sources.items() if source.target == SPATIAL)
        raise ValueError(
            f"{name} has {tensors[name].shape[1]} rows, expected as many as patches of {ph} x {pw} fill a square"
        )
    hidden = tensors[HIDDEN]
    if hidden.dim() != 2:
        raise ValueError(f"{HIDDEN} has shape {list(hidden.shape)}, expected [hidden, {dim}]")
    if heads is None and dim not in HEADS and dim % HEAD_WIDTH != 0:
        raise ValueError(f"the width {dim} is not a multiple of {HEAD_WIDTH}, expected heads to be given")
    blocks = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    return MMMAEConfig(
        image_size=size,
        bands=pt * (1 if embeddings.spectral is None else embeddings.spectral.shape[1]),
        in_channels=channels,
        patch=(pt, ph, pw),
        dim=dim,
        depth=len(blocks),  # a gap in their numbers shows as a missing weight
        heads=HEADS.get(dim, dim // HEAD_WIDTH) if heads is None else heads,
        mlp_ratio=hidden.shape[0] / dim,
        aux={},
    )


def _changed(saved: MMMAEConfig, image_size: int | None, bands: int | None, patch_bands: int | None) -> MMMAEConfig:
    changes: dict[str, object] = {"image_size": image_size, "bands": bands}
    if patch_bands is not None:
        changes["patch"] = (patch_bands, *saved.patch[1:])
    return saved.replace(**{name: value for name, value in changes.items() if value is not None})


def _folded(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Source]]:
    """Return the weights with the factors of blocks' outputs multiplied into the layers before, and these factors."""
    folded, sources = dict(tensors), {}
    for name, scale in tensors.items():
        match = re.fullmatch(r"(blocks\.\d+)\.(ls[12]\.gamma|gamma_[12])", name)
        if match is None:
            continue
        layer = f"{match[1]}.{SCALES[match[2]]}"
        check_names(tensors, [f"{layer}.weight"])
        if scale.shape != folded[f"{layer}.weight"].shape[:1]:
            expected = list(folded[f"{layer}.weight"].shape[:1])
            raise ValueError(f"{name} has shape {list(scale.shape)}, expected {expected}")
        for part in ("weight", "bias"):
            if f"{layer}.{part}" in folded:
                factor = scale[:, None] if part == "weight" else scale
                folded[f"{layer}.{part}"] = folded[f"{layer}.{part}"] * factor
        sources[name] = Source(f"{layer}.weight", "adapted", "and its bias, as a factor")
    return folded, sources


def _block_sources(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the file that make up the encoder's weight `name`; none if a default can replace it."""
    if ".attn.qkv." in name and name not in tensors:
        names = [name.replace(".attn.qkv.", f".attn.{part}.") for part in "qkv"]
    else:
        names = [name]
    missing = [source for source in names if source not in tensors]
    is_free = name.endswith(".bias") or name.startswith("norm.")
    if not missing or (missing == names and is_free):
        return [] if missing else names
    raise ValueError(f"it has no {missing[0]}")


def _weight(name: str, tensors: Mapping[str, Tensor], sources: list[str], config: MMMAEConfig) -> Tensor:
    if len(sources) > 1:  # q, k and v
        shape = [config.dim, config.dim] if name.endswith(".weight") else [config.dim]
        for source in sources:
            if list(tensors[source].shape) != shape:
                raise ValueError(f"{source} has shape {list(tensors[source].shape)}, expected {shape}")
    if sources:
        return torch.cat([tensors[source] for source in sources]) if len(sources) > 1 else tensors[sources[0]]
    width = {"qkv": 3 * config.dim, "fc1": round(config.dim * config.mlp_ratio)}.get(name.split(".")[-2], config.dim)
    return torch.ones(width) if name.endswith(".weight") else torch.zeros(width)


def _entries(
    tensors: Mapping[str, Tensor],
    sources: Mapping[str, Source],
    targets: list[str],
    resized: Mapping[str, Tensor],
    saved: MMMAEConfig,
    config: MMMAEConfig,
) -> list[Entry]:
    grids = " to ".join(" x ".join(map(str, part.grid)) for part in (saved, config))
    sizes = f"{saved.patch[0]} to {config.patch[0]} bands of a token"
    counts: Counter[tuple[str, str, str]] = Counter()
    for name in tensors:
        if name not in sources:
            known = [reason for pattern, reason in LEFT_OUT.items() if re.match(pattern, name)]
            counts[(_kind(name), "left out", known[0] if known else "no part of the encoder")] += 1
            continue
        target, outcome, reason = sources[name]
        reasons = [reason]
        if target in resized:
            outcome, reasons = "resized", [reason, f"{grids} tokens"]
        elif target == KERNEL and saved.patch != config.patch:
            outcome, reasons = "adapted", [reason, sizes]
        if target != name and outcome != "resized":
            reasons.insert(0, f"into {_kind(target).removeprefix('blocks.*.')}")
        counts[(_kind(name), outcome, "; ".join(filter(None, reasons)))] += 1
    filled = {source.target for source in sources.values()}
    for target in targets:
        if target not in filled:
            value = 1 if target.endswith(".weight") else 0
            counts[(_kind(target), "missing", f"set to {value}")] += 1
    return [Entry(name, weights, outcome, reason) for (name, outcome, reason), weights in counts.items()]


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
