"""Write the features of subjects row by row, so that any number of them needs the memory of one batch."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice
from ...data import Batch
from ...data.subjects import Subjects
from ...files import check_can_write_file, write_atomically
from ...model.encoder import HSIEncoder
from ...precision import Precision, autocast, resolve_precision
from .batches import batches, check_options, check_outputs

POOLS = ("mean", "spatial", "tokens")
SUFFIXES = (".safetensors", ".npz")


def encode(
    encoder: HSIEncoder,
    subjects: Subjects,
    out: str | Path,
    *,
    pool: str = "mean",
    batch: int = 8,
    workers: int = 0,
    device: str = "cpu",
    precision: Precision = "auto",
) -> tuple[int, ...]:
    """Write the features of all subjects into one file, atomically.

    A `.safetensors` file holds the tensor `features` and in its metadata `names`, a JSON list, and `pool`. A `.npz`
    file holds the arrays `features` and `names` (unicode). Row i of `features` belongs to the subject `names[i]`.

    Args:
        encoder: moved to `device` and set to evaluation mode.
        subjects: must have the encoder's number of bands.
        out: the file, with the suffix `.safetensors` or `.npz`.
        pool: `mean` over all tokens, `[D]` a subject; `spatial`, the mean over the spectral groups, `[h, w, D]`; or
            `tokens`, all of them, `[t, h, w, D]`.
        batch: subjects a forward pass. A subject's features do not depend on the others, apart from rounding.
        workers: processes that read data.
        device: the device to compute on.
        precision: `32`, or autocast to `bf16` or `16`; `auto`: what `mmmae.precision.best_precision` says. The
            features of two precisions differ by rounding.

    Returns:
        The shape of `features`, which is float32.

    Raises:
        ValueError: an argument is not allowed, the subjects do not fit the encoder, their file would be
            replaced, or a feature is not finite.
        OSError: a file can't be read or written.

    Example:
        >>> import mmmae
        >>> import numpy as np
        >>> from mmmae.phantom import Phantom
        >>> from mmmae.training.inference.encode import encode
        >>> encoder = mmmae.fast_model("tiny", image_size=32).hsi_encoder()
        >>> encode(encoder, Phantom(3, image_size=32), "features.npz")
        (3, 64)
        >>> with np.load("features.npz") as file:
        ...     print(file["names"][0], file["features"].shape)
        phantom-0-00000 (3, 64)
    """
    out, config = Path(out), encoder.config
    check_features_file(out)
    check_choice("pool", pool, POOLS)
    check_options(config, subjects, precision, batch=batch, workers=workers)
    check_outputs(subjects, [out])
    precision = resolve_precision(precision, usable_device(device), config.dim)
    groups, height, width = config.grid
    row = {"mean": (), "spatial": (height, width), "tokens": (groups, height, width)}[pool]
    shape = (len(subjects), *row, config.dim)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = features(encoder, subjects, pool, batch, workers, device, precision)
    write = _write_npz if out.suffix == ".npz" else _write_safetensors
    write_atomically(out, lambda path: write(path, rows, shape, list(subjects.names), pool))
    return shape


def check_features_file(path: Path) -> None:
    """Raise ValueError for a folder or another suffix than `SUFFIXES`, and an OSError if it can't be written."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected {' or '.join(SUFFIXES)}")
    check_can_write_file(path)


def usable_device(name: str) -> torch.device:
    """Return the device of a name.

    Raises:
        ValueError: there is no such device, or it can't be used here.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(f"device is {name!r}, which can't be used: {str(error).splitlines()[0]}") from error


def features(
    encoder: HSIEncoder,
    subjects: Subjects,
    pool: str,
    batch: int,
    workers: int,
    device: str,
    precision: Precision = "32",
) -> Iterator[Tensor]:
    """Yield the features of one batch after another, float32 on the CPU, and show the progress."""
    encoder = encoder.eval().to(device)
    for samples in batches(subjects, batch, workers, label="encoding"):
        rows = pooled(encode_batch(encoder, samples, precision, device), pool).cpu()
        check_finite(rows, samples, precision)
        yield rows


@torch.inference_mode()
def encode_batch(encoder: HSIEncoder, samples: Batch, precision: Precision, device: str) -> Tensor:
    """Return the tokens of a batch, `[B, t, h, w, D]` float32."""
    with autocast(precision, torch.device(device)):
        tokens = encoder(samples.hsi.to(device)).float()
    grid: Tensor = tokens.unflatten(1, encoder.config.grid)
    return grid


def check_finite(rows: Tensor, samples: Batch, precision: Precision) -> None:
    """Raise ValueError if a feature is not finite; the message names the first subject and the likely cause."""
    finite = rows.flatten(1).isfinite().all(1)
    if finite.all():
        return
    index = int((~finite).nonzero()[0])
    cause = "the encoder's weights" if samples.hsi[index].isfinite().all() else "its values, which are not finite"
    if precision != "32" and cause == "the encoder's weights":
        cause += f", or the range of precision {precision}"
    raise ValueError(f"subject {samples.names[index]!r}: its features are not finite; the cause is in {cause}")


def pooled(tokens: Tensor, pool: str) -> Tensor:
    """Reduce tokens `[B, t, h, w, D]` to `mean` `[B, D]` or `spatial` `[B, h, w, D]`, or return all of them."""
    if pool == "tokens":
        return tokens
    return tokens.mean(1) if pool == "spatial" else tokens.mean((1, 2, 3))


def _write_npz(path: Path, rows: Iterator[Tensor], shape: tuple[int, ...], names: list[str], pool: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("names.npy", "w") as file:
            np.lib.format.write_array(file, np.array(names, dtype=np.str_), allow_pickle=False)
        with archive.open("features.npy", "w", force_zip64=True) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            _write_rows(file, rows)


def _write_safetensors(path: Path, rows: Iterator[Tensor], shape: tuple[int, ...], names: list[str], pool: str) -> None:
    """Write length of the header, header and values; `safetensors` itself needs the whole tensor in memory."""
    size = int(np.prod(shape, dtype=np.int64)) * 4
    header = {
        "__metadata__": {"format": "pt", "pool": pool, "names": json.dumps(names)},
        "features": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]},
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the values begin at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        _write_rows(file, rows)


def _write_rows(file: IO[bytes], rows: Iterator[Tensor]) -> None:
    for part in rows:
        file.write(part.contiguous().numpy().astype("<f4", copy=False).tobytes())
