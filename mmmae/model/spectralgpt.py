"""Import of encoders from checkpoints of SpectralGPT (Hong et al., 2024): the same network under other names."""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import MMMAEConfig
from .encoder import HSIEncoder
from .position import resize_positions

# Keys under which checkpoints hold their weights, in the order in which they are looked for, also within each other.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "encoder", "backbone", "model_ema", "ema")
# What DDP, torch.compile, Lightning and larger models put before names; torch.compile also within them.
PREFIXES = re.compile(r"^(?:(?:module|model|encoder|backbone)\.)+")
COMPILED = "_orig_mod."
HEAD_WIDTH = 64
NEEDED = ("patch_embed.proj.weight", "pos_embed_spatial", "pos_embed_temporal", "blocks.0.mlp.fc1.weight")
NO_CLASS_TOKEN = "the encoder has no class token; its features differ from those of a network that has one"
LEFT_OUT = {
    "decoder": "of the decoder",
    "mask_token": "of the decoder",
    "cls_token": NO_CLASS_TOKEN,
    "pos_embed_class": NO_CLASS_TOKEN,
    "head": "of another task",
    "fc_norm": "of another task",
}


class Entry(NamedTuple):
    """The outcome of an import for weights of one kind.

    Attributes:
        name: of the weights in the file, or in the encoder if they are missing; * stands for the number of a block.
        weights: how many there are.
        outcome: "loaded", "resized", "left out" or "missing".
        reason: why, or into what; empty if there is nothing to say.
    """

    name: str
    weights: int
    outcome: str
    reason: str


def import_spectralgpt(
    path: str | Path, *, heads: int | None = None, image_size: int | None = None, bands: int | None = None
) -> tuple[HSIEncoder, list[Entry]]:
    """Load an encoder from a checkpoint of SpectralGPT; the shapes of its weights determine the config.

    Args:
        path: a checkpoint of PyTorch, with or without decoder, or a safetensors file.
        heads: number of attention heads, which no shape shows; None means heads of width 64.
        image_size, bands: to resize the position embeddings for; None means the checkpoint's.

    Returns:
        The encoder, and the outcome for each kind of weights, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, holds objects other than tensors and plain values, or no such network.

    Example:
        >>> weights = mmmae.fast_model("tiny").hsi_encoder().state_dict()  # stands for a published checkpoint
        >>> weights["pos_embed_temporal"] = weights.pop("pos_embed_spectral")  # SpectralGPT's name
        >>> torch.save({"model": weights}, folder / "checkpoint.pth")
        >>> encoder, entries = mmmae.import_spectralgpt(folder / "checkpoint.pth", heads=2, image_size=112)
        >>> {(entry.name, entry.outcome, entry.reason) for entry in entries if entry.outcome != "loaded"}
        {('pos_embed_spatial', 'resized', '4 x 14 x 14 to 4 x 7 x 7 tokens')}
    """
    path = Path(path)
    tensors = read_tensors(path)
    try:
        saved = _config(tensors, heads)
        changes = {"image_size": image_size, "bands": bands}
        config = saved.replace(**{name: value for name, value in changes.items() if value is not None})
        with torch.device("meta"):
            encoder = HSIEncoder(config)
        sources = {name: _sources(name, tensors) for name in encoder.state_dict()}
        weights = {name: _weight(name, tensors, names, saved) for name, names in sources.items()}
        resized = resize_positions(weights, saved, config)
        encoder.load_state_dict({**weights, **resized}, strict=True, assign=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    for parameter in encoder.parameters():
        parameter.requires_grad_()
    return encoder, _entries(tensors, sources, resized, saved, config)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint in float32, by name, without the keys that wrap them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, or holds objects other than tensors, plain values and an `argparse.Namespace`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a checkpoint")
    contents: Any
    try:
        if path.suffix == ".safetensors":
            contents = load_file(path)
        else:
            # The training scripts of MAE save their options as a Namespace. What torch warns of is refused below.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                contents = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file: {error}") from error
    except Exception as error:  # torch.load passes on whatever its unpickler or zip reader raises
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            reason = f"refused: it holds an object, {refused[1]}, and loading it could run arbitrary code"
        elif "Unsupported operand" in str(error) and _begins_as_pickle(path):
            reason = "refused: it is a plain pickle, and loading it could run arbitrary code"
        else:
            reason = "not a checkpoint of PyTorch, or a broken one"
        raise ValueError(f"{path}: {reason}; expected tensors and plain values") from error
    contents = _unwrapped(contents)
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path}: holds a {type(contents).__name__}, expected weights by name")
    named: dict[str, Any] = {}
    for given, value in contents.items():
        name = PREFIXES.sub("", str(given).replace(COMPILED, ""))
        if name in named:
            raise ValueError(f"{path}: two entries are named {name} without their prefixes, one of them {given}")
        named[name] = value
    tensors: dict[str, Tensor] = {}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            continue
        is_dense = value.layout == torch.strided and not value.is_nested and not value.is_quantized
        if value.is_meta or value.is_complex() or not is_dense:
            raise ValueError(f"{path}: {name} is not a dense tensor of real numbers")
        tensors[name] = value.to(torch.float32)
        if not tensors[name].isfinite().all():
            raise ValueError(f"{path}: {name} has NaN or infinity")
    return tensors


def _unwrapped(contents: Any) -> Any:
    """Return the innermost mapping under keys that wrap weights."""
    while isinstance(contents, Mapping):
        inner = next((contents[key] for key in WRAPPERS if isinstance(contents.get(key), Mapping)), None)
        if inner is None:
            break
        contents = inner
    return contents


def _begins_as_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO


def _config(tensors: Mapping[str, Tensor], heads: int | None) -> MMMAEConfig:
    for name in NEEDED:
        if name not in tensors:
            raise ValueError(f"not an encoder of SpectralGPT: it has no {name}")
    projection, spatial, temporal, hidden = (tensors[name] for name in NEEDED)
    if projection.dim() != 5 or 0 in projection.shape:
        raise ValueError(f"{NEEDED[0]} has shape {list(projection.shape)}, expected [D, C, bands, rows, columns]")
    dim, channels, pt, ph, pw = projection.shape
    for name, position in (("pos_embed_spatial", spatial), ("pos_embed_temporal", temporal)):
        if position.dim() != 3 or position.shape[0] != 1 or position.shape[2] != dim:
            raise ValueError(f"{name} has shape {list(position.shape)}, expected [1, tokens, {dim}]")
    pixels = spatial.shape[1] * ph * pw
    size = math.isqrt(pixels)
    if size**2 != pixels:
        raise ValueError(
            f"pos_embed_spatial has {spatial.shape[1]} rows, expected as many as patches of {ph} x {pw} fill a square"
        )
    if hidden.dim() != 2:
        raise ValueError(f"{NEEDED[3]} has shape {list(hidden.shape)}, expected [hidden, {dim}]")
    if heads is None and dim % HEAD_WIDTH != 0:
        raise ValueError(f"the width {dim} is not a multiple of {HEAD_WIDTH}, expected heads to be given")
    blocks = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    return MMMAEConfig(
        image_size=size,
        bands=temporal.shape[1] * pt,
        in_channels=channels,
        patch=(pt, ph, pw),
        dim=dim,
        depth=len(blocks),  # a gap in their numbers shows as a missing weight
        heads=dim // HEAD_WIDTH if heads is None else heads,
        mlp_ratio=hidden.shape[0] / dim,
        aux={},
    )


def _sources(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the file that make up the encoder's weight `name`; none if a default can replace it."""
    if ".attn.qkv." in name and name not in tensors:
        names = [name.replace(".attn.qkv.", f".attn.{part}.") for part in "qkv"]
    else:
        names = ["pos_embed_temporal" if name == "pos_embed_spectral" else name]
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
    sources: Mapping[str, list[str]],
    resized: Mapping[str, Tensor],
    saved: MMMAEConfig,
    config: MMMAEConfig,
) -> list[Entry]:
    targets = {source: name for name, names in sources.items() for source in names}
    counts: Counter[tuple[str, str, str]] = Counter()
    for source in tensors:
        if source not in targets:
            known = [reason for prefix, reason in LEFT_OUT.items() if source.startswith(prefix)]
            row = "left out", known[0] if known else "no part of the encoder"
        elif targets[source] in resized:
            grids = [" x ".join(map(str, part.grid)) for part in (saved, config)]
            row = "resized", f"{grids[0]} to {grids[1]} tokens"
        else:
            name = targets[source]
            row = "loaded", "" if name == source else f"into {_kind(name).removeprefix('blocks.*.')}"
        counts[(_kind(source), *row)] += 1
    for name, names in sources.items():
        if not names:
            counts[(_kind(name), "missing", f"set to {1 if name.endswith('.weight') else 0}")] += 1
    return [Entry(name, weights, outcome, reason) for (name, outcome, reason), weights in counts.items()]


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
