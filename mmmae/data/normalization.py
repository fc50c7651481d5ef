"""Robust normalisation: per-band percentiles of a data set, the map defined by them, and their JSON file."""

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

from ..files import check_can_write_file, json_value, write_json
from .readers.cube import Cube

PERCENTILES = (2, 50, 98)
MAX_PIXELS_PER_FILE = 8192
MAX_VALUES = 2**23
FORMAT = "mmmae-normalization-1"
READING = ("nodata", "scale")

Percentiles = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Normalization:
    """Statistics that map each band's 2nd, 50th and 98th percentile to about -1, 0 and 1.

    A value x becomes `(x - p50) / ((p98 - p2) / 2)`. A band that is constant up to float32 rounding is not scaled, so
    that it becomes 0.

    Attributes:
        percentiles: modality -> (p2, p50, p98) of each band, in the units of the files.
        selection: modality -> a phrase that lists the bands measured ("bands 0,2"); empty if not known.
        reading: modality -> the nodata value and the scale that were given for its files ({"scale": "0.5"}), as text,
            in which NaN equals NaN; a modality that is not in it was read in a way that is not known.

    Example:
        >>> import torch
        >>> from mmmae.data import Normalization
        >>> statistics = Normalization({"hsi": [(0.0, 100.0, 200.0), (10.0, 20.0, 50.0)]})
        >>> cube = torch.tensor([150.0, 40.0]).view(2, 1, 1)  # two bands, one pixel
        >>> normalized = statistics.apply("hsi", cube)
        >>> normalized.flatten()
        tensor([0.5000, 1.0000])
        >>> statistics.invert("hsi", normalized).flatten()
        tensor([150.,  40.])
    """

    percentiles: Mapping[str, Percentiles]
    selection: Mapping[str, str] = field(default_factory=dict)
    reading: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, bands in self.percentiles.items():
            if len(bands) == 0:
                raise ValueError(f"modality {name!r} has no bands")
            for band, values in enumerate(bands):
                if len(values) != 3 or not all(map(math.isfinite, values)) or list(values) != sorted(values):
                    raise ValueError(
                        f"modality {name!r}, band {band}: percentiles are {list(values)}, "
                        "expected three finite numbers in ascending order"
                    )

    @classmethod
    def identity(cls, bands: Mapping[str, int]) -> "Normalization":
        """Return statistics that leave values as they are.

        Args:
            bands: modality -> number of bands.
        """
        return cls({name: ((-1.0, 0.0, 1.0),) * count for name, count in bands.items()})

    def apply(self, name: str, values: Tensor) -> Tensor:
        """Normalise `values` `[..., C, H, W]` of modality `name`, as float32.

        Raises:
            ValueError: the modality is unknown, or C is not its number of bands.
        """
        centre, scale = self._centre_and_scale(name, values)
        return (values.float() - centre) / scale

    def invert(self, name: str, values: Tensor) -> Tensor:
        """Return normalised `values` `[..., C, H, W]` to the units of the files, as float32."""
        centre, scale = self._centre_and_scale(name, values)
        return values.float() * scale + centre

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file atomically: a reader sees the old file or the new one, never a part."""
        write_json(Path(path), self.to_json(), indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Normalization":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            IsADirectoryError: it is a folder.
            ValueError: it holds something else or is damaged. The message names the path.
        """
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path}: is a folder, expected a file of normalisation statistics")
        try:
            return cls.from_json(json_value(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        except ValueError as error:
            raise ValueError(f"{path}: is not a file of normalisation statistics: {error!s}") from error

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file that `save` writes."""
        percentiles = {name: [list(values) for values in bands] for name, bands in self.percentiles.items()}
        reading = {name: dict(given) for name, given in self.reading.items()}
        return {"format": FORMAT, "percentiles": percentiles, "selection": dict(self.selection), "reading": reading}

    @classmethod
    def from_json(cls, content: Any) -> "Normalization":
        """Undo `to_json`; raise ValueError for anything that it does not return."""
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f'expected a JSON object with "format": "{FORMAT}"')
        try:
            percentiles = {
                name: tuple((float(low), float(middle), float(high)) for low, middle, high in bands)
                for name, bands in content["percentiles"].items()
            }
            selection = {name: str(text) for name, text in content.get("selection", {}).items()}
            reading = {name: remembered(given) for name, given in content.get("reading", {}).items()}
            return cls(percentiles, selection, reading)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__} {error}") from error

    def _centre_and_scale(self, name: str, values: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self.percentiles:
            raise ValueError(f"no statistics for modality {name!r}; there are {', '.join(self.percentiles) or 'none'}")
        low, middle, high = np.array(self.percentiles[name], dtype=np.float64).T
        if values.ndim < 3 or values.shape[-3] != len(middle):
            raise ValueError(
                f"modality {name!r} has shape {list(values.shape)}, expected [..., {len(middle)}, H, W], "
                f"because the statistics are of {len(middle)} bands"
            )
        half = (high - low) / 2
        resolution = np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
        scale = np.where(half > resolution, half, 1.0)
        centre_and_scale = torch.tensor(np.stack([middle, scale]), dtype=torch.float32, device=values.device)
        return centre_and_scale[0, :, None, None], centre_and_scale[1, :, None, None]


def remembered(reading: Mapping[str, Any]) -> dict[str, str]:
    """Return as text those arguments of `read_cube` that change values: nodata and scale, where they are given."""
    return {option: repr(float(reading[option])) for option in READING if reading.get(option) is not None}


def listed(reading: Mapping[str, str]) -> str:
    """Return a phrase for what `remembered` returned."""
    return " and ".join(f"{option} {text}" for option, text in reading.items()) or "no nodata and no scale"


def robust_percentiles(cubes: Iterable[Cube], count: int) -> Percentiles:
    """Compute the 2nd, 50th and 98th percentile of each band over the valid pixels of cubes, read one at a time.

    A pixel is valid if none of its bands is nodata. At most 8192 valid pixels of each cube are used, fewer where the
    data set would exceed 2^23 values, so that memory stays below 100 MB besides one cube. They are spread by the golden
    ratio (pixel numbers `floor(n * frac(i * 0.618...))`): evenly, aligned with no image width, and alike on every run.

    Args:
        cubes: of equally many bands.
        count: the number of cubes.

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
    """Load a file, which one of the processes that call this computes and writes if it does not exist yet."""
    with _one_process_at_a_time(path.parent):
        if not path.exists():
            check_can_write_file(path)  # before every file is read
            compute().save(path)
    return Normalization.load(path)


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on a folder, if the system has such locks; it ends with the process at the latest."""
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
