"""Maps of classes as GeoTIFFs with names and colours, their probabilities, and pictures of them with a legend."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ...files import write_atomically
from ...model.finetuned import MOST_VALUE
from ...text import figure_text
from ..finetuning.maps import class_colours
from ..pictures import save_figure
from .rasters import categories_path, open_raster, write_categories
from .stitching import Rows

MOST_PIXELS = 2000  # along a side of a picture


class Classes(NamedTuple):
    """The classes of a map: their names, and the values of their pixels."""

    names: Sequence[str]
    values: Sequence[int]

    @classmethod
    def of(cls, names: Sequence[str], values: Sequence[int] | None) -> Classes:
        """Return the classes with these values, or numbered from 0.

        Raises:
            ValueError: there are not as many values as names, two are equal, or one is not in 0..65534.
        """
        chosen = range(len(names)) if values is None else values
        if len({*chosen}) != len(names) or not all(0 <= value <= MOST_VALUE for value in chosen):
            raise ValueError(f"values is {list(chosen)}, expected {len(names)} different numbers in 0..{MOST_VALUE}")
        return cls(names, list(chosen))

    @property
    def dtype(self) -> str:
        """Type of a map, which has one value more, for pixels without data."""
        return "uint8" if max(self.values) < 255 else "uint16"

    @property
    def nodata(self) -> int:
        """The value of pixels without data."""
        return int(np.iinfo(self.dtype).max)

    @property
    def colours(self) -> dict[int, tuple[float, float, float]]:
        """Value -> colour, as in the pictures of fine-tuning."""
        return {value: tuple(colour) for value, colour in zip(self.values, class_colours(len(self.names)), strict=True)}


def map_files(path: Path, *, probabilities: bool) -> list[Path]:
    """Return the files that `write_map` writes."""
    beside = [path, categories_path(path), path.with_suffix(".png")]
    return [*beside, probabilities_path(path)] if probabilities else beside


def probabilities_path(path: Path) -> Path:
    """Return the path of the probabilities beside a map."""
    return path.with_name(f"{path.stem}_probabilities.tif")


def write_map(
    path: Path,
    rows: Iterable[Rows],
    size: tuple[int, int],
    classes: Classes,
    place: Mapping[str, Any],
    *,
    probabilities: bool,
) -> None:
    """Write a map of classes, `NAME.tif` with `NAME.tif.aux.xml`, its picture, and if asked for its probabilities.

    Args:
        path: `NAME.tif`.
        rows: logits of all rows, from top to bottom.
        size: (height, width).
        classes: the classes, in the order of the logits.
        place: what `find_place` returned.
        probabilities: also write the float32 bands of `NAME_probabilities.tif`.
    """
    names = dict(zip(classes.values, classes.names, strict=True))
    tags = {"classes": names, "colours": classes.colours}

    def write(path: Path, beside: Path | None) -> None:
        with open_raster(path, ["class"], size, classes.dtype, classes.nodata, place, tags) as target:
            if beside is None:
                for logits, valid in rows:
                    target.write(_classified(logits, valid, classes))
                return
            with open_raster(beside, classes.names, size, "float32", np.nan, place) as shares:
                for logits, valid in rows:
                    target.write(_classified(logits, valid, classes))
                    shares.write(logits.softmax(0).masked_fill(~valid, np.nan).numpy())

    if probabilities:
        second = probabilities_path(path)
        write_atomically(path, lambda one: write_atomically(second, lambda other: write(one, other)))
    else:
        write_atomically(path, lambda temporary: write(temporary, None))
    write_categories(path, names)
    save_figure(draw_classes(path, classes), path.with_suffix(".png"))


def _classified(logits: Tensor, valid: Tensor, classes: Classes) -> npt.NDArray[Any]:
    """Return the value of the class with the largest logit `[1, n, W]`."""
    chosen = np.array(classes.values, classes.dtype)[logits.argmax(0).numpy()]
    return np.where(valid.numpy(), chosen, classes.nodata)[None]


def draw_classes(path: Path, classes: Classes) -> Figure:
    """Draw a map of classes with its legend; of large ones, each n-th pixel."""
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        source = rasterio.open(path.absolute(), driver="GTiff")
    with source:
        step = max(1, -(-max(source.shape) // MOST_PIXELS))
        shape = tuple(max(1, side // step) for side in source.shape)
        values = source.read(1, out_shape=shape, resampling=Resampling.nearest)
    picture = np.ones((*values.shape, 3), np.float32)
    for value, colour in classes.colours.items():
        picture[values == value] = colour
    height, width = (max(1.0, 8 * side / max(shape)) for side in shape)
    figure = Figure(figsize=(width + 2.5, height + 0.7), layout="constrained")
    panel = figure.subplots()
    panel.imshow(picture, interpolation="nearest")
    panel.set_axis_off()
    present = [number for number, value in enumerate(classes.values) if (values == value).any()]
    handles = [
        Patch(color=classes.colours[classes.values[number]], label=figure_text(classes.names[number]))
        for number in present
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    figure.suptitle(figure_text(path.stem))
    return figure
