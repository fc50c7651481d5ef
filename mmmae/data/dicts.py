"""Subjects from any data set whose items are dicts of arrays, such as those of torchgeo."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .normalization import Normalization, load_or_save, robust_percentiles
from .readers.cube import Cube
from .sample import Sample
from .subjects import Subjects, contents


class DictDataset(Protocol):
    """A data set whose items are mappings."""

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def __getitem__(self, index: Any, /) -> Mapping[str, Any]:
        """Return an item."""
        ...


class DictSubjects(Subjects):
    """Subjects from the items of a data set, each a dict of tensors or arrays in any units.

    Args:
        dataset: has a mapping for each of `items`; a `torch.utils.data.Dataset` or a list.
        items: what to index the data set by, one a subject: None means all numbers below its length. A geographic data
            set of torchgeo takes the queries of a sampler, as in `list(GridGeoSampler(dataset, size=128))`.
        image: key of the cube, `[T, H, W]` or `[1, T, H, W]`.
        aux: auxiliary modality -> key of its image, `[C, H, W]` or `[H, W]`. A subject lacks the modality where the key
            is missing or its value is None.
        mask: key of the measured area, `[H, W]` or `[1, H, W]`, 0 outside it. Pixels with NaN or infinite values are
            outside it in any case.
        names: of the subjects; None numbers them.
        image_size: side, or (height, width), to which images of other sizes are resized bilinearly; None keeps them.
        wavelengths: of the bands in nm, if they are known.
        normalization: statistics, or the path of their JSON file, which is written if it does not exist yet. None:
            computed at the first access, which reads the data set once for each modality.

    Raises:
        ValueError: at construction, the data set is empty, an image has the wrong rank, or no item has a modality; on
            access, an item differs from the first in its bands, or has no mask of the size of its cube. The message
            names subject and key.

    Example:
        >>> import torch
        >>> from mmmae.data import DictSubjects
        >>> items = [{"image": torch.rand(12, 40, 40), "sar": torch.rand(2, 20, 20)}, {"image": torch.rand(12, 9, 9)}]
        >>> data = DictSubjects(items, aux={"radar": "sar"}, image_size=32)
        >>> data[0].hsi.shape, data[0].aux["radar"].shape, data[1].aux
        (torch.Size([1, 12, 32, 32]), torch.Size([2, 32, 32]), {})
    """

    def __init__(
        self,
        dataset: DictDataset,
        items: Sequence[Any] | None = None,
        *,
        image: str = "image",
        aux: Mapping[str, str] | None = None,
        mask: str | None = None,
        names: Sequence[str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        wavelengths: Sequence[float] | None = None,
        normalization: str | os.PathLike[str] | Normalization | None = None,
    ) -> None:
        self.dataset, self.mask = dataset, mask
        self.items = range(len(dataset)) if items is None else list(items)
        count = len(self.items)
        if count == 0:
            raise ValueError("the data set is empty, expected at least one item")
        self.keys = {"hsi": image, **(aux or {})}
        if len(self.keys) != 1 + len(aux or {}):
            raise ValueError('"hsi" is the name of the cubes; give the auxiliary modality another')
        self.names = [f"{index:0{len(str(count - 1))}}" for index in range(count)] if names is None else list(names)
        if len(set(self.names)) != len(self.names) or len(self.names) != count:
            raise ValueError(
                f"names has {len(set(self.names))} different names, expected one for each of {count} items"
            )
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        channels = {modality: self._first(modality).shape[0] for modality in self.keys}
        self.bands = channels.pop("hsi")
        self.modalities = channels
        if wavelengths is not None and len(wavelengths) != self.bands:
            raise ValueError(f"wavelengths has {len(wavelengths)} numbers, expected one for each of {self.bands} bands")
        self.wavelengths = None if wavelengths is None else torch.tensor(wavelengths, dtype=torch.float32)
        self._path = None if isinstance(normalization, (Normalization, type(None))) else Path(normalization)
        if isinstance(normalization, Normalization):
            self.normalization = normalization

    @cached_property
    def normalization(self) -> Normalization:
        """The statistics; the first access reads the data set if they do not exist yet."""
        return self._compute() if self._path is None else load_or_save(self._path, self._compute)

    def __getitem__(self, index: int) -> Sample:
        item, name = self.dataset[self.items[index]], self.names[index]
        cube = self._image(index, item, "hsi")
        if cube is None:
            raise ValueError(f"subject {name!r} has no {self.keys['hsi']!r}, expected it in {list(item)}")
        valid = self._resize(self._measured(index, item, cube).float()[None])[0] >= 0.5
        hsi = self._resize(self._normalised("hsi", cube)).masked_fill(~valid, 0.0)[None]
        images = {modality: self._image(index, item, modality) for modality in self.modalities}
        aux = {
            modality: self._resize(self._normalised(modality, image))
            for modality, image in images.items()
            if image is not None
        }
        return Sample(name, hsi, aux, valid)

    def __repr__(self) -> str:
        return f"DictSubjects({contents(self)})"

    def _image(self, index: int, item: Mapping[str, Any], modality: str) -> Tensor | None:
        """Return an image of an item as float32 `[C, H, W]`, or None if it has none."""
        image = self._tensor(index, item, modality)
        channels = self.bands if modality == "hsi" else self.modalities[modality]
        if image is not None and image.shape[0] != channels:
            raise ValueError(
                f"{self.keys[modality]!r} of subject {self.names[index]!r} has {image.shape[0]} bands, expected "
                f"{channels} as of the first"
            )
        return image

    def _tensor(self, index: int, item: Mapping[str, Any], modality: str) -> Tensor | None:
        key = self.keys[modality]
        if item.get(key) is None:
            return None
        image = torch.as_tensor(item[key]).float()
        if modality == "hsi" and image.dim() == 4 and image.shape[0] == 1:
            image = image[0]
        elif modality != "hsi" and image.dim() == 2:
            image = image[None]
        if image.dim() != 3:
            raise ValueError(
                f"{key!r} of subject {self.names[index]!r} has shape {list(image.shape)}, expected [C, H, W]"
            )
        return image

    def _first(self, modality: str) -> Tensor:
        """Return the first image of a modality."""
        for index, key in enumerate(self.items):
            image = self._tensor(index, self.dataset[key], modality)
            if image is not None:
                return image
        raise ValueError(f"no item has {self.keys[modality]!r}, the key of modality {modality!r}")

    def _measured(self, index: int, item: Mapping[str, Any], cube: Tensor) -> Tensor:
        """Return bool `[H, W]`, which pixels of a cube `[T, H, W]` were measured."""
        finite = torch.isfinite(cube).all(0)
        if self.mask is None:
            return finite
        name, size = self.names[index], list(finite.shape)
        if item.get(self.mask) is None:
            raise ValueError(f"subject {name!r} has no mask {self.mask!r}, expected it in {list(item)}")
        mask = torch.as_tensor(item[self.mask])
        if list(mask.shape) not in (size, [1, *size]):
            raise ValueError(
                f"{self.mask!r} of subject {name!r} has shape {list(mask.shape)}, expected {size} or [1, H, W]"
            )
        return finite & (mask.reshape(finite.shape) != 0)

    def _normalised(self, modality: str, image: Tensor) -> Tensor:
        """Return normalised values, 0 where there are none."""
        return self.normalization.apply(modality, image).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def _resize(self, image: Tensor) -> Tensor:
        if self.image_size is None or tuple(image.shape[1:]) == self.image_size:
            return image
        return F.interpolate(image[None], self.image_size, mode="bilinear", align_corners=False)[0]

    def _compute(self) -> Normalization:
        return Normalization({modality: robust_percentiles(self._cubes(modality), len(self)) for modality in self.keys})

    def _cubes(self, modality: str) -> Iterator[Cube]:
        """Yield the images of a modality, for their statistics."""
        for index, key in enumerate(self.items):
            item = self.dataset[key]
            image = self._image(index, item, modality)
            if image is not None:
                nodata = ~torch.isfinite(image)
                if modality == "hsi":
                    nodata |= ~self._measured(index, item, image)
                yield Cube(image.masked_fill(nodata, 0.0), None, nodata)
