"""Robust normalisation: per-band percentiles of a data set, the value map made of them, and their JSON file."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomically
from .readers.cube import Cube

PERCENTILES = (2, 50, 98)
MAX_PIXELS_PER_FILE = 8192
MAX_VALUES = 2**23
FORMAT = "mmmae-normalization-1"

Percentiles = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Normalization:
    """Maps each band's 2nd, 50th and 98th percentile to about -1, 0 and 1: `(x - p50) / ((p98 - p2) / 2)`.

    A band that is constant up to float32 rounding keeps its scale, so that it maps to 0.

    Attributes:
        percentiles: modality -> for each band (p2, p50, p98), in the units of the files.
        selection: modality -> the bands that were measured, in words ("bands 0,2"); empty where not known.
    """

    percentiles: Mapping[str, Percentiles]
    selection: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, bands in self.percentiles.items():
            if len(bands) == 0:
                raise ValueError(f"modality {name!r} has no bands")
            for band, values in enumerate(bands):
                if len(values) != 3 or not all(map(math.isfinite, values)) or list(values) != sorted(values):
                    raise ValueError(
                        f"modality {name!r}, band {band}: percentiles are {list(values)}; "
                        "expected three finite numbers in ascending order"
                    )

    @classmethod
    def identity(cls, bands: Mapping[str, int]) -> "Normalization":
        """Return statistics that map every value to itself, for modalities of so many bands."""
        return cls({name: ((-1.0, 0.0, 1.0),) * count for name, count in bands.items()})

    def apply(self, name: str, values: Tensor) -> Tensor:
        """Normalise `values` `[..., C, H, W]` of modality `name`, as float32.

        Raises:
            ValueError: the modality is not known or C is not its number of bands.
        """
        centre, scale = self._centre_and_scale(name, values)
        return (values.float() - centre) / scale

    def invert(self, name: str, values: Tensor) -> Tensor:
        """The values `[..., C, H, W]` in the units of the files that `apply` maps to `values`."""
        centre, scale = self._centre_and_scale(name, values)
        return values.float() * scale + centre

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file; a reader sees the old file or the new one, never a part."""
        text = json.dumps(self.to_json(), indent=1) + "\n"
        write_atomically(Path(path), lambda temporary: temporary.write_text(text))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Normalization":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            IsADirectoryError: it is a folder.
            ValueError: the file is something else or damaged. Names the path.
        """
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path}: is a folder, expected a file of normalisation statistics")
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        except ValueError as error:
            raise ValueError(f"{path}: is not a file of normalisation statistics: {error!s}") from error

    def to_json(self) -> dict[str, Any]:
        """What `save` writes, as an object of JSON."""
        percentiles = {name: [list(values) for values in bands] for name, bands in self.percentiles.items()}
        return {"format": FORMAT, "percentiles": percentiles, "selection": dict(self.selection)}

    @classmethod
    def from_json(cls, content: Any) -> "Normalization":
        """Take what `to_json` made; anything else is a ValueError."""
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f'expected a JSON object with "format": "{FORMAT}"')
        try:
            percentiles = {
                name: tuple((float(low), float(middle), float(high)) for low, middle, high in bands)
                for name, bands in content["percentiles"].items()
            }
            return cls(percentiles, {name: str(text) for name, text in content.get("selection", {}).items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__} {error}") from error

    def _centre_and_scale(self, name: str, values: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self.percentiles:
            raise ValueError(f"no statistics for modality {name!r}; there are {', '.join(self.percentiles) or 'none'}")
        low, middle, high = np.array(self.percentiles[name], dtype=np.float64).T
        if values.ndim < 3 or values.shape[-3] != len(middle):
            raise ValueError(
                f"modality {name!r} has shape {list(values.shape)}; expected [..., {len(middle)}, H, W], "
                f"because the statistics are of {len(middle)} bands"
            )
        half = (high - low) / 2
        resolution = np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
        scale = np.where(half > resolution, half, 1.0)
        centre_and_scale = torch.tensor(np.stack([middle, scale]), dtype=torch.float32, device=values.device)
        return centre_and_scale[0, :, None, None], centre_and_scale[1, :, None, None]


def robust_percentiles(cubes: Iterable[Cube], count: int) -> Percentiles:
    """The 2nd, 50th and 98th percentile of each band over the valid pixels of `count` cubes, read one at a time.

    A pixel is valid if no band of it is nodata. Of each cube at most 8192 valid pixels are used, fewer where a data set
    would exceed 2^23 values, so that memory stays below 100 MB besides one cube. They are spread by the golden ratio
    (pixel numbers `floor(n * frac(i * 0.618...))`): even, aligned with no image width, and the same on every run.

    Raises:
        ValueError: no cube has a valid pixel.
    """
    chosen: list[Tensor] = []
    for cube in cubes:
        valid = ~cube.nodata.any(0)  # [H, W]
        pixels = cube.values[:, valid]  # [T, n]
        n = pixels.shape[1]
        limit = max(1, min(MAX_PIXELS_PER_FILE, MAX_VALUES // (len(pixels) * max(1, count))))
        if n > limit:
            golden = (math.sqrt(5) - 1) / 2
            pixels = pixels[:, torch.from_numpy((np.arange(limit) * golden % 1 * n).astype(np.int64))]
        if n:
            chosen.append(pixels)
    if not chosen:
        raise ValueError("no valid pixel in any file: all are nodata")
    values = torch.cat(chosen, dim=1)
    return tuple(
        (float(low), float(middle), float(high))
        for low, middle, high in (np.percentile(band.double().numpy(), PERCENTILES) for band in values)
    )


def load_or_save(path: Path, compute: Callable[[], Normalization]) -> Normalization:
    """What the file holds; if it is not there, it is computed and written by one of the processes that wait for it."""
    with _one_process_at_a_time(path.parent):
        if not path.exists():
            compute().save(path)
    return Normalization.load(path)


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on a folder where the system has such locks; it ends with the process at the latest."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders: then each process computes for itself
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
