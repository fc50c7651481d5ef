"""Weights from others' checkpoints, read without running the code that such a file can hold."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .pretrained import load_tensors

# Keys under which checkpoints hold their weights, in the order in which they are looked for, also within each other.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "encoder", "backbone", "model_ema", "ema")
# What DDP, torch.compile, Lightning and larger models put before names; torch.compile also within them.
PREFIXES = re.compile(r"^(?:(?:module|model|encoder|backbone|teacher_backbone|vit|spec_vit|vit_core)\.)+")
COMPILED = "_orig_mod."


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint in float32, by name, without the keys that wrap them.

    Raises:
        OSError: there is no such file, or it can't be read.
        ValueError: it is broken, or holds objects other than tensors, plain values and an `argparse.Namespace`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a checkpoint")
    contents: Any = load_tensors(path) if path.suffix == ".safetensors" else _load(path)
    contents = _unwrapped(contents)
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path}: holds a {type(contents).__name__}, expected weights by name")
    named: dict[str, Any] = {}
    for given, value in contents.items():
        name = PREFIXES.sub("", str(given).replace(COMPILED, ""))
        if name in named and not _is_same(value, named[name]):
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


def _load(path: Path) -> Any:
    """Return what a file of PyTorch holds, without running code."""
    path.open("rb").close()  # a file that can't be read is not a broken one
    try:
        # The training scripts of MAE save their options as a Namespace. What torch warns of is refused below.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load passes on whatever its unpickler or zip reader raises
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            reason = f"refused: it holds an object, {refused[1]}, and loading it could run arbitrary code"
        elif "Unsupported operand" in str(error) and _begins_as_pickle(path):
            reason = "refused: it is a plain pickle, and loading it could run arbitrary code"
        else:
            reason = "not a checkpoint of PyTorch, or a broken one"
        raise ValueError(f"{path}: {reason}; expected tensors and plain values") from error


def _unwrapped(contents: Any) -> Any:
    """Return the innermost mapping under keys that wrap weights."""
    while isinstance(contents, Mapping):
        inner = next((contents[key] for key in WRAPPERS if isinstance(contents.get(key), Mapping)), None)
        if inner is None:
            break
        contents = inner
    return contents


def _is_same(value: Any, other: Any) -> bool:
    """Return whether two entries are one weight: a module that is reached by two paths is saved twice."""
    are_tensors = isinstance(value, Tensor) and isinstance(other, Tensor)
    return are_tensors and value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other)


def _begins_as_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO
