"""The definition of `patch_embed`: cut all patches, select some, project, add bias and position."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def patchify_reference(volume: Tensor, patch: tuple[int, int, int], ids: Tensor | None = None) -> Tensor:
    """Cut `[B, C, T, H, W]` into rows `[B, N, C*pt*ph*pw]`, row-major over (t, h, w); only rows `ids` if given."""
    batch, channels, bands, height, width = volume.shape
    pt, ph, pw = patch
    grid = volume.reshape(batch, channels, bands // pt, pt, height // ph, ph, width // pw, pw)
    rows = grid.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
    return rows if ids is None else rows.gather(1, ids[:, :, None].expand(-1, -1, rows.shape[2]))


def patch_embed_reference(
    volume: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, position: Tensor | None
) -> Tensor:
    """Compute embeddings of the patches of `volume` that `ids` names."""
    patch = (weight.shape[2], weight.shape[3], weight.shape[4])
    return project(patchify_reference(volume, patch, ids), weight, bias, ids, position)


def project(rows: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, position: Tensor | None) -> Tensor:
    """Compute embeddings of patches given as rows `[B, K, C*pt*ph*pw]`; `ids` are their token numbers."""
    tokens = F.linear(rows.to(weight.dtype), weight.flatten(1), bias)
    if position is None:
        return tokens
    return tokens + (position if ids is None else F.embedding(ids, position))


def token_count(volume: Tensor, patch: Sequence[int]) -> int:
    """Return the number of patches of a sample."""
    (bands, height, width), (pt, ph, pw) = volume.shape[2:], patch
    return (bands // pt) * (height // ph) * (width // pw)
