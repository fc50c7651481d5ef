"""Cases of `patch_embed` and `patchify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import mmmae_kernels
from mmmae_kernels.patch_embed.reference import patch_embed_reference, patchify_reference
from tests.cases.case import Case, Inputs, draw, draw_ids


def patch_embed_cases() -> Iterator[Case]:
    def case(
        name: str,
        batch: int,
        channels: int,
        patch: tuple[int, int, int],
        width: int,
        keep: int | None,
        *,
        grid: tuple[int, int, int] = (2, 3, 2),
        view: Callable[[Tensor], Tensor] = lambda volume: volume,
        dtype: torch.dtype | None = None,
        bias: bool = True,
        position: bool = True,
        strided: str = "as they come",
        named: int | None = None,
        small: bool = False,
    ) -> Case:
        tokens = grid[0] * grid[1] * grid[2]

        def make() -> Inputs:
            volume = draw(batch, channels, *(count * size for count, size in zip(grid, patch, strict=True)))
            if dtype is not None and not dtype.is_floating_point:
                volume = (volume * 40).abs().clamp(max=250).floor()
            return {
                "volume": volume,
                "weight": draw(width, channels, *patch, seed=1) / 16,
                "bias": draw(width, seed=2) if bias else None,
                "ids": None if keep is None else draw_ids(batch, keep, named or tokens),
                "position": draw(tokens, width, seed=3) if position else None,
            }

        def with_view(i: Inputs) -> tuple[Any, ...]:
            return view(i["volume"]), i["weight"], i["bias"], i["ids"], i["position"]

        kept = {} if dtype is None else {"volume": dtype}
        return Case(
            "patch_embed",
            name,
            make,
            lambda i: [mmmae_kernels.patch_embed(*with_view(i))],
            lambda i: [patch_embed_reference(*with_view(i))],
            small,
            kept,
            constant=frozenset({"volume"} if dtype is not None and not dtype.is_floating_point else ()),
            strided=strided,
        )

    yield case("3x16x16, repeated tokens", 2, 1, (3, 16, 16), 72, 14, small=True)
    yield case("5x7x7, two channels, all tokens", 1, 2, (5, 7, 7), 33, None, grid=(1, 2, 2), small=True)
    yield case("1x8x8, no bias, no position", 2, 3, (1, 8, 8), 64, 7, bias=False, position=False, small=True)
    yield case("a weight gradient of two sums", 2, 1, (1, 4, 4), 8, 130, grid=(2, 14, 14), small=True)
    for dtype in (torch.float32, torch.uint8, torch.int16):
        yield case(f"a volume of {dtype}", 2, 1, (3, 16, 16), 40, 3, grid=(1, 2, 2), dtype=dtype, small=True)
    for patch in ((1, 8, 8), (5, 7, 7), (3, 16, 16), (4, 14, 14)):
        for channels in (1, 2, 3):
            yield case(f"{patch}, {channels} channels", 2, channels, patch, 64, 5)
    for keep in (1, 7, 63, 65, 783):
        yield case(f"{keep} tokens", 1, 1, (1, 4, 4), 64, keep, grid=(4, 14, 14))
    for width in (1, 192, 768, 1000):
        yield case(f"width {width}", 2, 1, (3, 16, 16), width, 5)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda v: v.transpose(3, 4),
        "sliced": lambda v: v[:, :, 1:5, 16:48, ::2],
        "expanded": lambda v: v[:1].expand(2, -1, -1, -1, -1),
        "channels last": lambda v: v.contiguous(memory_format=torch.channels_last_3d),
    }
    for name, view in views.items():
        small = name in ("transposed", "sliced")
        yield case(name, 2, 2, (2, 16, 16), 33, 2, grid=(3, 4, 4), view=view, position=False, named=8, small=small)
    for strided in ("expanded", "transposed"):
        yield case(f"gradient {strided}", 2, 1, (1, 8, 8), 65, 5, strided=strided, small=True)
    for batch, keep_count in ((0, 3), (2, 0), (2, 12)):
        yield case(f"{keep_count} tokens of {batch} samples", batch, 1, (1, 8, 8), 64, keep_count)


def patchify_cases() -> Iterator[Case]:
    for name, patch, ids in (("asked", (3, 16, 16), True), ("all", (5, 7, 7), False)):

        def make(patch: tuple[int, int, int] = patch, ids: bool = ids) -> Inputs:
            volume = draw(2, 2, *(2 * size for size in patch))
            return {"volume": volume, "ids": draw_ids(2, 5, 8) if ids else None}

        def call(i: Inputs, patch: tuple[int, int, int] = patch) -> Sequence[Tensor]:
            return [mmmae_kernels.patchify(i["volume"], patch, i["ids"])]

        def define(i: Inputs, patch: tuple[int, int, int] = patch) -> Sequence[Tensor]:
            return [patchify_reference(i["volume"], patch, i["ids"])]

        yield Case("patchify", name, make, call, define, True, constant=frozenset({"volume"}))


CASES = [*patch_embed_cases(), *patchify_cases()]
