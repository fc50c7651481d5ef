"""Sizes, numbers and memory layouts drawn from a seed."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 13, 16, 17, 31, 33, 67)


class Draw:
    """Sizes, numbers and memory layouts that follow from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice((torch.float32, *FLOATS))

    def size(self, most: int = 17, least: int = 0) -> int:
        """Return one of `SIZES` between `least` and `most`."""
        return self.random.choice([size for size in SIZES if least <= size <= most])

    def flag(self, share: float = 0.5) -> bool:
        """Return True with probability `share`."""
        return self.random.random() < share

    def other(self) -> torch.dtype:
        """Return the call's dtype or, less often, another floating point dtype."""
        return self.random.choice((self.dtype, *FLOATS)) if self.flag(0.3) else self.dtype

    def floats(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return self.laid_out(values.to(self.dtype if dtype is None else dtype))

    def volume(self, *shape: int) -> Tensor:
        """Return floats, or integers of one of the dtypes that sensors give."""
        if self.flag(0.7):
            return self.floats(*shape, dtype=self.other())
        dtype = self.random.choice((torch.uint8, torch.int16, torch.int32))
        return self.laid_out(torch.randint(0, 200, shape, generator=self.generator).to(dtype))

    def ids(self, batch: int, count: int, tokens: int) -> Tensor:
        return self.laid_out(torch.randint(max(tokens, 1), (batch, count), generator=self.generator))

    def bools(self, *shape: int) -> Tensor:
        return self.laid_out(torch.rand(shape, generator=self.generator) < self.random.choice((0.0, 0.5, 0.8, 1.0)))

    def laid_out(self, tensor: Tensor, *, expand: bool = True) -> Tensor:
        """Return the tensor in a random layout: contiguous, permuted, strided among invalid numbers, or expanded."""
        layout = self.random.choice(("plain", "plain", "permuted", "pieces", "pieces", "expanded"))
        if layout == "permuted":
            order = self.random.sample(range(tensor.dim()), tensor.dim())
            return tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(tensor.dim())])
        if layout == "pieces":
            starts = [self.random.randrange(3) for _ in tensor.shape]
            steps = [self.random.choice((1, 1, 2, 3)) for _ in tensor.shape]
            ends = [start + step * size for start, step, size in zip(starts, steps, tensor.shape, strict=True)]
            buffer = tensor.new_full([end + 2 for end in ends], never_right(tensor.dtype))
            pieces = tuple(slice(start, end, step) for start, end, step in zip(starts, ends, steps, strict=True))
            return buffer[pieces].copy_(tensor)
        if layout == "expanded" and expand:
            for axis, size in enumerate(tensor.shape):
                if size > 0 and self.flag():
                    tensor = tensor.narrow(axis, 0, 1).expand(tensor.shape)
        return tensor


def never_right(dtype: torch.dtype) -> float:
    """Return a number of the dtype that no valid argument holds."""
    if dtype.is_floating_point:
        return math.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).max
