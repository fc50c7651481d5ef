"""One table of cases an op, for every backend: what to call, on which inputs, and the definition to compare with."""

from __future__ import annotations

import functools
import itertools
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import mmmae_kernels
from mmmae_kernels import BlockWeights
from mmmae_kernels.add_layer_norm.reference import add_layer_norm_reference
from mmmae_kernels.decoder_tokens.reference import decoder_tokens_reference
from mmmae_kernels.gelu_linear.reference import gelu_linear_reference
from mmmae_kernels.masked_loss.reference import masked_l2_loss_reference, patch_l2_loss_reference
from mmmae_kernels.norm_linear.reference import norm_linear_reference
from mmmae_kernels.patch_embed.reference import patch_embed_reference, patchify_reference
from mmmae_kernels.transformer_block.reference import transformer_block_reference
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

        def with_view(i: Inputs) -> tuple[Tensor | None, ...]:
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
            frozenset({"volume"} if dtype is not None and not dtype.is_floating_point else ()),
            strided,
        )

    yield case("3x16x16, repeated tokens", 2, 1, (3, 16, 16), 72, 14, small=True)
    yield case("5x7x7, two channels, all tokens", 1, 2, (5, 7, 7), 33, None, grid=(1, 2, 2), small=True)
    yield case("1x8x8, no bias, no position", 2, 3, (1, 8, 8), 64, 7, bias=False, position=False, small=True)
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

        def arguments(i: Inputs) -> tuple[Tensor | None, ...]:
            prediction = i["prediction"].transpose(1, 2) if transposed else i["prediction"]
            return prediction, i["target"], i["ids"], i["weights"]

        kept = {"weights": torch.float32} if weights == "fractions" else {}
        return Case(
            "masked_l2_loss",
            name,
            make,
            lambda i: [mmmae_kernels.masked_l2_loss(*arguments(i), normalize=normalize)],
            lambda i: [masked_l2_loss_reference(*arguments(i), normalize)],
            small,
            kept if target is None else {**kept, "target": target},
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

        names = ("prediction", "volume", "weight", "bias", "ids", "weights")
        kept = {"weights": torch.float32} if weights == "fractions" else {}
        return Case(
            "patch_l2_loss",
            name,
            make,
            lambda i: [mmmae_kernels.patch_l2_loss(*(i[name] for name in names), normalize=normalize)],
            lambda i: [patch_l2_loss_reference(*(i[name] for name in names), normalize)],
            small,
            kept if dtype is None else {**kept, "volume": dtype},
            frozenset({"volume", "weight", "bias", "weights"}),
        )

    yield case("plain", 2, 7, 72, small=True)
    yield case("one token", 1, 1, 40, (1, 8, 8), small=True)
    yield case("weighted, 5x7x7", 2, 5, 33, (5, 7, 7), weights="fractions", bias=False, small=True)
    yield case("normalised, a mask as weights", 2, 5, 65, (1, 8, 8), weights="mask", normalize=True, small=True)
    yield case("all weights zero", 1, 3, 33, (1, 8, 8), weights="zeros", small=True)
    yield case("bytes", 1, 3, 40, dtype=torch.uint8, small=True)
    for masked in (1, 63, 783):
        yield case(f"{masked} tokens", 2, masked, 64, (1, 4, 4), grid=(4, 14, 14))
    for width in (1, 192, 768, 1000):
        yield case(f"width {width}", 2, 7, width, weights="mask", normalize=width > 1)
    yield case("no row", 2, 0, 64)
    yield case("no sample", 0, 3, 64)


def decoder_tokens_cases() -> Iterator[Case]:
    def case(
        name: str, batch: int, tokens: int, keep: int, width: int, *, strided: str = "as they come", **more: bool
    ) -> Case:
        def make() -> Inputs:
            return {
                "visible": draw(batch, keep, width),
                "mask_token": draw(width, seed=1),
                "ids_restore": draw_ids(batch, tokens, tokens) if tokens else torch.empty(batch, 0, dtype=torch.int64),
                "position": draw(tokens, width, seed=2),
            }

        names = ("visible", "mask_token", "ids_restore", "position")
        return Case(
            "decoder_tokens",
            name,
            make,
            lambda i: [mmmae_kernels.decoder_tokens(*(i[name] for name in names))],
            lambda i: [decoder_tokens_reference(*(i[name] for name in names))],
            strided=strided,
            **more,
        )

    yield case("some visible", 2, 13, 4, 72, small=True)
    yield case("odd width", 3, 9, 5, 129, small=True)
    yield case("gradient expanded", 2, 9, 5, 33, strided="expanded", small=True)
    yield case("gradient transposed", 2, 9, 5, 33, strided="transposed", small=True)
    yield case("none visible", 2, 9, 0, 64, small=True)
    yield case("all visible", 2, 9, 9, 64, small=True)
    for tokens in (1, 7, 63, 65, 783):
        yield case(f"{tokens} tokens", 2, tokens, (tokens + 3) // 4, 64)
    for width in (1, 192, 768, 1000):
        yield case(f"width {width}", 2, 13, 4, width)
    yield case("no sample", 0, 9, 4, 64)


def add_layer_norm_cases() -> Iterator[Case]:
    def case(
        name: str,
        shape: tuple[int, ...],
        *,
        residual: bool = True,
        shifted: bool = False,
        shift_dtype: torch.dtype | None = None,
        strided: str = "as they come",
        small: bool = False,
    ) -> Case:
        def make() -> Inputs:
            return {
                "x": draw(*shape),
                "residual": draw(*shape, seed=1) if residual else None,
                "weight": draw(shape[-1], seed=2),
                "bias": draw(shape[-1], seed=3),
                "residual_bias": draw(shape[-1], seed=4) if shifted else None,
            }

        def arguments(i: Inputs) -> tuple[Tensor | float | None, ...]:
            return i["x"], i["residual"], i["weight"], i["bias"], 1e-6, i["residual_bias"]

        return Case(
            "add_layer_norm",
            name,
            make,
            lambda i: list(mmmae_kernels.add_layer_norm(*arguments(i)))[0 if residual else 1 :],
            lambda i: list(add_layer_norm_reference(*arguments(i)))[0 if residual else 1 :],
            small,
            {} if shift_dtype is None else {"residual_bias": shift_dtype},
            strided=strided,
        )

    yield case("with residual", (2, 5, 72), small=True)
    yield case("without residual", (3, 64), residual=False, small=True)
    yield case("odd width", (2, 3, 129), small=True)
    yield case("several warps", (3, 521), small=True)
    yield case("with residual and its bias", (2, 9, 521), shifted=True, small=True)
    yield case("with a float32 bias", (2, 3, 40), shifted=True, shift_dtype=torch.float32, small=True)
    yield case("gradient expanded", (2, 3, 40), strided="expanded", small=True)
    yield case("gradient transposed", (2, 3, 40), strided="transposed", small=True)
    for rows in (1, 7, 63, 65, 783):
        yield case(f"{rows} rows", (rows, 64))
    for width in (3, 192, 768, 1000):
        yield case(f"width {width}", (2, 7, width), shifted=width > 192)
    yield case("one row", (64,))
    yield case("no row", (0, 5, 64), shifted=True)


def linear_cases() -> Iterator[Case]:
    def draw_inputs(shape: tuple[int, ...], width: int) -> Inputs:
        hidden = shape[-1]
        return {
            "x": draw(*shape),
            "residual": draw(*shape, seed=1),
            "norm_weight": draw(hidden, seed=2),
            "norm_bias": draw(hidden, seed=3),
            "weight": draw(width, hidden, seed=4) / hidden**0.5,
            "bias": draw(width, seed=5),
            "hidden_bias": draw(hidden, seed=6),
        }

    def of_norm(i: Inputs) -> tuple[Tensor | None, ...]:
        return tuple(i[name] for name in ("x", "residual", "norm_weight", "norm_bias", "weight", "bias"))

    def alone(i: Inputs) -> tuple[Tensor | None, ...]:
        return of_norm({**i, "residual": None})

    def shifted(i: Inputs) -> tuple[Tensor | float | None, ...]:
        return *of_norm({**i, "bias": None}), 1e-6, i["hidden_bias"]

    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "odd": ((2, 5, 72), 33),
        "past a block": ((2, 9, 528), 33),
        "wide": ((2, 7, 768), 1000),
        "no row": ((0, 8), 4),
    }
    for name, (shape, width) in shapes.items():
        make = functools.partial(draw_inputs, shape, width)
        yield Case(
            "norm_linear",
            name,
            make,
            lambda i: mmmae_kernels.norm_linear(*of_norm(i)),
            lambda i: norm_linear_reference(*of_norm(i), 1e-6),
            small=name in ("odd", "past a block"),
            constant=frozenset({"hidden_bias"}),
        )
        yield Case(
            "norm_linear",
            f"{name}, with a bias of residual",
            make,
            lambda i: mmmae_kernels.norm_linear(*shifted(i)),
            lambda i: norm_linear_reference(*shifted(i)),
            small=name in ("odd", "past a block"),
            constant=frozenset({"bias"}),
        )
        yield Case(
            "norm_linear",
            f"{name}, without residual",
            make,
            lambda i: [mmmae_kernels.norm_linear(*alone(i))[1]],
            lambda i: [norm_linear_reference(*alone(i), 1e-6)[1]],
            small=name in ("odd", "past a block"),
            constant=frozenset({"residual", "hidden_bias"}),
        )
        yield Case(
            "gelu_linear",
            name,
            make,
            lambda i: [mmmae_kernels.gelu_linear(3 * i["x"], i["weight"], i["bias"])],
            lambda i: [gelu_linear_reference(3 * i["x"], i["weight"], i["bias"])],
            small=name in ("odd", "past a block"),
            constant=frozenset({"residual", "norm_weight", "norm_bias", "hidden_bias"}),
        )
        for what, kept in (("a bias", {}), ("a float32 bias", {"hidden_bias": torch.float32})):
            yield Case(
                "gelu_linear",
                f"{name}, with {what} of hidden",
                make,
                lambda i: [mmmae_kernels.gelu_linear(3 * i["x"], i["weight"], None, i["hidden_bias"])],
                lambda i: [gelu_linear_reference(3 * i["x"], i["weight"], None, i["hidden_bias"])],
                small=name in ("odd", "past a block"),
                kept=kept,
                constant=frozenset({"residual", "norm_weight", "norm_bias", "bias"}),
            )


def transformer_block_cases() -> Iterator[Case]:
    shapes = {
        "odd": (2, 5, 24, 3, 17),
        "past a block": (2, 33, 72, 2, 130),
        "one token": (3, 1, 16, 1, 16),
        "no sample": (0, 4, 16, 2, 8),
    }
    for name, (batch, tokens, width, heads, hidden) in shapes.items():
        for what in ("", ", without residual", ", without residual_bias", ", of some tokens"):
            ids = draw_ids(batch, (tokens + 1) // 2, tokens) if what == ", of some tokens" else None

            def make(
                sizes: tuple[int, ...] = (batch, tokens, width, hidden), what: str = what, ids: Tensor | None = ids
            ) -> Inputs:
                batch, tokens, width, hidden = sizes
                sizes_of = {"qkv": (3 * width, width), "proj": (width, width), "fc1": (hidden, width)}
                layers = {
                    name: tensor
                    for place, (layer, (rows, columns)) in enumerate(sizes_of.items())
                    for name, tensor in (
                        (f"{layer}_weight", draw(rows, columns, seed=10 + place) / columns**0.5),
                        (f"{layer}_bias", draw(rows, seed=20 + place)),
                    )
                }
                norms = {
                    f"{norm}_{kind}": draw(width, seed=30 + place)
                    for place, (norm, kind) in enumerate(itertools.product(("norm1", "norm2"), ("weight", "bias")))
                }
                return {
                    "x": draw(batch, tokens, width),
                    "residual": None if what == ", without residual" else draw(batch, tokens, width, seed=1),
                    "residual_bias": None if "without" in what else draw(width, seed=2),
                    "ids": ids,
                    **{name: (layers | norms)[name] for name in BlockWeights._fields if name != "fc2_weight"},
                    "fc2_weight": draw(width, hidden, seed=40) / hidden**0.5,
                }

            def arguments(i: Inputs, heads: int = heads) -> tuple[Any, ...]:
                weights = BlockWeights(**{name: i[name] for name in BlockWeights._fields})
                return i["x"], i["residual"], i["residual_bias"], weights, heads, i["ids"]

            yield Case(
                "transformer_block",
                name + what,
                make,
                lambda i, arguments=arguments: mmmae_kernels.transformer_block(*arguments(i)),
                lambda i, arguments=arguments: transformer_block_reference(*arguments(i), 1e-6),
                small=name == "odd",
            )


def far_cases() -> Iterator[Case]:
    """Inputs whose elements lie up to 2^31 and more apart, as views of memory that is mapped, not allocated."""

    def case(
        op: str,
        name: str,
        make: Callable[[], Inputs],
        call: Callable[[Inputs], Tensor],
        define: Callable[[Inputs], Tensor],
        far: str,
    ) -> Case:
        def spread(i: Inputs, axis: int) -> Inputs:
            return {key: far_apart(tensor, axis) if key == far else tensor for key, tensor in i.items()}

        axis = 2 if far == "volume" and "bands" in name else 0
        return Case(op, name, make, lambda i: [call(spread(i, axis))], lambda i: [define(i)], constant=frozenset({far}))

    def volume() -> Inputs:
        return {
            "volume": draw(2, 1, 6, 32, 32),
            "weight": draw(40, 1, 3, 16, 16, seed=1) / 16,
            "ids": draw_ids(2, 5, 8),
            "prediction": draw(2, 5, 40, seed=2),
            "residual": draw(2, 5, 40, seed=3),
            "width": draw(40, seed=4),
            "restore": draw_ids(2, 9, 9),
            "position": draw(9, 40, seed=5),
        }

    for name in ("samples far apart", "bands far apart"):
        yield case(
            "patch_embed",
            name,
            volume,
            lambda i: mmmae_kernels.patch_embed(i["volume"], i["weight"], None, i["ids"]),
            lambda i: patch_embed_reference(i["volume"], i["weight"], None, i["ids"], None),
            "volume",
        )
        yield case(
            "patch_l2_loss",
            name,
            volume,
            lambda i: mmmae_kernels.patch_l2_loss(i["prediction"], i["volume"], i["weight"], None, i["ids"]),
            lambda i: patch_l2_loss_reference(i["prediction"], i["volume"], i["weight"], None, i["ids"], None, False),
            "volume",
        )
    yield case(
        "masked_l2_loss",
        "samples of the target far apart",
        volume,
        lambda i: mmmae_kernels.masked_l2_loss(i["prediction"], i["residual"]),
        lambda i: masked_l2_loss_reference(i["prediction"], i["residual"], None, None, False),
        "residual",
    )
    yield case(
        "decoder_tokens",
        "visible samples far apart",
        volume,
        lambda i: mmmae_kernels.decoder_tokens(i["residual"], i["width"], i["restore"], i["position"]),
        lambda i: decoder_tokens_reference(i["residual"], i["width"], i["restore"], i["position"]),
        "residual",
    )
    yield case(
        "add_layer_norm",
        "rows far apart",
        volume,
        lambda i: mmmae_kernels.add_layer_norm(i["prediction"][:, 0], i["residual"][:, 0], i["width"], i["width"])[1],
        lambda i: add_layer_norm_reference(i["prediction"][:, 0], i["residual"][:, 0], i["width"], i["width"], 1e-6)[1],
        "residual",
    )


def far_apart(tensor: Tensor, axis: int) -> Tensor:
    """The same values, neighbours along `axis` 2^31 + 16 elements apart."""
    strides = list(tensor.contiguous().stride())
    strides[axis] = 2**31 + 16
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, (last + 1) * tensor.element_size(), flags=flags)
    view = torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides)
    return view.copy_(tensor.detach())


CASES = [
    *patch_embed_cases(),
    *patchify_cases(),
    *masked_l2_loss_cases(),
    *patch_l2_loss_cases(),
    *decoder_tokens_cases(),
    *add_layer_norm_cases(),
    *linear_cases(),
    *transformer_block_cases(),
]


def _weights(kind: str | None, batch: int, masked: int) -> Tensor | None:
    if kind is None:
        return None
    if kind == "zeros":
        return torch.zeros(batch, masked, dtype=torch.float64)
    weights = draw(batch, masked, seed=7).abs()
    return weights > 0.5 if kind == "mask" else weights
