"""An array of a file, not read yet, with what the file says about it."""

from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Part: TypeAlias = EllipsisType | tuple[slice, ...]
Attributes: TypeAlias = Mapping[str, Any]


class StoredArray(NamedTuple):
    """One array of a file.

    Attributes:
        shape: its sizes, in the order in which `read` returns them.
        numeric: whether it holds real numbers.
        dtype: the type of its values as they are stored.
        read: returns its values; called with slices, or `...` for all.
        attributes: returns its attributes, those of its groups from the nearest to the root, each as a mapping.
        dimensions: the names of its axes, "" where there is none.
        fill: the value that the storage holds where nothing was written, if it was chosen by the writer.
        unwritten: returns where nothing was written, or None if everything was; called as `read`.
        refusal: why its values must not be read, or None.
    """

    shape: tuple[int, ...]
    numeric: bool
    dtype: np.dtype[Any]
    read: Callable[[Part], npt.NDArray[Any]]
    attributes: Callable[[], tuple[Attributes, ...]] = lambda: ({},)
    dimensions: tuple[str, ...] = ()
    fill: float | None = None
    unwritten: Callable[[Part], npt.NDArray[np.bool_] | None] = lambda part: None
    refusal: str | None = None

    @property
    def is_vector(self) -> bool:
        """Whether it is a vector of numbers, of any number of axes."""
        return self.numeric and len(self.shape) > 0 and 0 < np.prod(self.shape, dtype=object) == max(self.shape)

    @property
    def is_number(self) -> bool:
        return self.numeric and np.prod(self.shape, dtype=object) == 1


StoredArrays: TypeAlias = dict[str, StoredArray]


def squeezed(array: StoredArray) -> StoredArray:
    """Return an array of more than three axes without the first ones if their size is 1, as that of a single time."""
    more = len(array.shape) - 3
    if more <= 0 or set(array.shape[:more]) != {1}:
        return array
    first = (slice(0, 1),) * more

    def read(part: Part) -> npt.NDArray[Any]:
        return np.asarray(array.read(part if part is ... else first + part)[(0,) * more])

    def unwritten(part: Part) -> npt.NDArray[np.bool_] | None:
        found = array.unwritten(part if part is ... else first + part)
        return None if found is None else found[(0,) * more]

    return array._replace(shape=array.shape[more:], read=read, unwritten=unwritten, dimensions=array.dimensions[more:])


def listing(arrays: StoredArrays) -> str:
    """Return the names and sizes of arrays for a message."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()) or "no array"


def text(value: Any) -> str:
    """Return an attribute as text, whether it is stored as text, bytes or an array of one of them."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
