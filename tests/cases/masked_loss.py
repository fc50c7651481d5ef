"""Cases of `masked_l2_loss` and `patch_l2_loss`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import mmmae_kernels
from mmmae_kernels.masked_loss.reference import masked_l2_loss_reference, patch_l2_loss_reference
from tests.cases.case import Case, Inputs, draw, draw_ids


def masked_l2_loss_cases() -> Iterator[Case]:
    def case(
        name: str,
        batch: int,
        masked: int,
        width: int,
        *,
        tokens: int | None = None,
        weights: str | None = None,
        normalize: bool = False,
        transposed: bool = False,
        target: torch.dtype | None = None,
        small: bool = False,
    ) -> Case:
        def make() -> Inputs:
            rows = masked if tokens is None else tokens
            shape = (batch, width, masked) if transposed else (batch, masked, width)
            given = (draw(batch, rows, width, seed=1) * 40).abs().clamp(max=250).floor()
            return {
                "prediction": draw(*shape),
                "target": draw(batch, rows, width, seed=1) if target is None else given,
                "ids": None if tokens is None else draw_ids(batch, masked, tokens),
                "weights": _weights(weights, batch, masked),
            }

        def arguments(i: Inputs) -> tuple[Any, ...]:
            prediction = i["prediction"].transpose(1, 2) if transposed else i["prediction"]
            return prediction, i["target"], i["ids"], i["weights"]

        kept = {"weights": torch.float32} if weights == "fractions" else {}
        return Case(
            "masked_l2_loss",
            name,
            make,
            lambda i: [mmmae_kernels.masked_l2_loss(*arguments(i), normalize=normalize)],
            lambda i: [masked_l2_loss_reference(*(*arguments(i), normalize))],
            small,
            kept if target is None else {**kept, "target": target},
            frozenset({"prediction"}),
            frozenset({"target", "weights"}),
        )

    yield case("row by row", 2, 7, 64, small=True)
    yield case("one number", 1, 1, 1, small=True)
    yield case("by id, weighted", 2, 5, 65, tokens=9, weights="fractions", small=True)
    yield case("normalised, a mask as weights", 2, 5, 72, tokens=7, weights="mask", normalize=True, small=True)
    yield case("all weights zero", 1, 3, 33, weights="zeros", small=True)
    yield case("several warps", 1, 3, 521, tokens=7, weights="fractions", normalize=True, small=True)
    yield case("prediction transposed", 2, 5, 40, tokens=6, transposed=True, small=True)
    yield case("a target of bytes", 2, 5, 40, target=torch.uint8, small=True)
    for masked in (1, 63, 783):
        yield case(f"{masked} tokens", 2, masked, 64, tokens=784)
    for width in (1, 192, 768, 1000):
        yield case(f"width {width}", 2, 7, width, tokens=9, weights="fractions", normalize=width > 1)
    yield case("no row", 2, 0, 64, tokens=9)
    yield case("no sample", 0, 3, 64)


def patch_l2_loss_cases() -> Iterator[Case]:
    def case(
        name: str,
        batch: int,
        masked: int,
        width: int,
        patch: tuple[int, int, int] = (3, 16, 16),
        *,
        grid: tuple[int, int, int] = (2, 3, 2),
        weights: str | None = None,
        normalize: bool = False,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        small: bool = False,
    ) -> Case:
        def make() -> Inputs:
            tokens = grid[0] * grid[1] * grid[2]
            volume = draw(batch, 1, *(count * size for count, size in zip(grid, patch, strict=True)))
            return {
                "prediction": draw(batch, masked, width),
                "volume": volume if dtype is None else (volume * 40).abs().clamp(max=250).floor(),
                "weight": draw(width, 1, *patch, seed=1) / 16,
                "bias": draw(width, seed=2) if bias else None,
                "ids": draw_ids(batch, masked, tokens),
                "weights": _weights(weights, batch, masked),
            }

        def arguments(i: Inputs) -> tuple[Any, ...]:
            return i["prediction"], i["volume"], i["weight"], i["bias"], i["ids"], i["weights"]

        kept = {"weights": torch.float32} if weights == "fractions" else {}
        return Case(
            "patch_l2_loss",
            name,
            make,
            lambda i: [mmmae_kernels.patch_l2_loss(*arguments(i), normalize=normalize)],
            lambda i: [patch_l2_loss_reference(*(*arguments(i), normalize))],
            small,
            kept if dtype is None else {**kept, "volume": dtype},
            frozenset({"prediction"}),
            frozenset({"volume", "weight", "bias", "weights"}),
        )

    yield case("plain", 2, 7, 72, small=True)
    yield case("one token", 1, 1, 40, (1, 8, 8), small=True)
    yield case("weighted, 5x7x7", 2, 5, 33, (5, 7, 7), weights="fractions", bias=False, small=True)
    yield case("normalised", 2, 3, 33, (1, 8, 8), normalize=True, small=True)
    yield case("normalised, weighted", 2, 3, 33, (1, 8, 8), weights="fractions", normalize=True, small=True)
    yield case("normalised, a mask as weights", 2, 5, 65, (1, 8, 8), weights="mask", normalize=True, small=True)
    yield case("all weights zero", 1, 3, 33, (1, 8, 8), weights="zeros", small=True)
    yield case("bytes", 1, 3, 40, dtype=torch.uint8, small=True)
    for masked in (1, 63, 783):
        yield case(f"{masked} tokens", 2, masked, 64, (1, 4, 4), grid=(4, 14, 14))
    for width in (1, 192, 768, 1000):
        yield case(f"width {width}", 2, 7, width, weights="mask", normalize=width > 1)
    yield case("no row", 2, 0, 64)
    yield case("no sample", 0, 3, 64)


def _weights(kind: str | None, batch: int, masked: int) -> Tensor | None:
    if kind is None:
        return None
    if kind == "zeros":
        return torch.zeros(batch, masked, dtype=torch.float64)
    weights = draw(batch, masked, seed=7).abs()
    return weights > 0.5 if kind == "mask" else weights


CASES = [*masked_l2_loss_cases(), *patch_l2_loss_cases()]
