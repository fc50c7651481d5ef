"""Valid arguments of every public function, drawn from a seed, and the facts that `calls.py` needs of each function."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

import mmmae_kernels
import tests.fuzz.definitions as definitions
from mmmae_kernels.linear import linear

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 13, 16, 17, 31, 33, 67)
Arguments = dict[str, Any]


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


@dataclasses.dataclass(frozen=True)
class Op:
    """A public function and how to call it.

    Args:
        call: the function, with arguments by name.
        draw: draws valid arguments.
        define: computes the result in plain PyTorch, written from the docstring; in float64 it is the truth.
        tied: argument -> the axes whose sizes other arguments determine.
        optional: arguments that may be None.
        constant: tensors that never get a gradient.
        alike: tensors that must have the dtype of another.
        free: tensors `[..., D]` of any rank from 1 on.
        chooses: whether the function has an argument `backend`, as attention has.
        numeric: tensors of any numeric dtype.
        unseen: tensors whose layout is not checked, so that torch itself refuses a sparse one.
    """

    call: Callable[..., Any]
    draw: Callable[[Draw], Arguments]
    define: Callable[..., Sequence[Tensor]]
    tied: Callable[[Arguments], dict[str, Sequence[int]]] = lambda arguments: {}
    optional: frozenset[str] = frozenset()
    constant: frozenset[str] = frozenset()
    alike: frozenset[str] = frozenset()
    free: frozenset[str] = frozenset()
    chooses: bool = False
    numeric: frozenset[str] = frozenset()
    unseen: frozenset[str] = frozenset()


def draw_embedding(draw: Draw) -> Arguments:
    """Draw volume, weight, bias and ids, and the number of tokens as `tokens`, which is not an argument."""
    patch = [draw.random.choice((1, 1, 2, 3, 5)) for _ in range(3)]
    grid = [draw.random.choice((0, 1, 1, 2, 2, 3)) for _ in range(3)]
    batch, channels, width = draw.size(5), draw.size(3), draw.size(33)
    tokens = math.prod(grid)
    count = draw.size() if tokens else 0
    return {
        "volume": draw.volume(batch, channels, *(parts * size for parts, size in zip(grid, patch, strict=True))),
        "weight": draw.floats(width, channels, *patch, scale=0.3),
        "bias": draw.floats(width) if draw.flag() else None,
        "ids": draw.ids(batch, count, tokens),
        "tokens": tokens,
    }


def draw_patch_embed(draw: Draw) -> Arguments:
    arguments = draw_embedding(draw)
    tokens, width = arguments.pop("tokens"), arguments["weight"].shape[0]
    position = draw.floats(tokens, width, dtype=draw.other()) if draw.flag() else None
    return {**arguments, "ids": arguments["ids"] if draw.flag(0.7) else None, "position": position}


def tied_embedding(arguments: Arguments) -> dict[str, Sequence[int]]:
    patch = arguments["weight"].shape[2:]
    volume = [1, *(2 + axis for axis, part in enumerate(patch) if part > 1)]
    if arguments["ids"] is not None:
        volume.append(0)
    return {"volume": volume, "weight": (1,), "bias": (0,), "ids": (0,), "position": (0, 1)}


def draw_patchify(draw: Draw) -> Arguments:
    arguments = draw_embedding(draw)
    ids = arguments["ids"] if draw.flag(0.7) else None
    return {"volume": arguments["volume"], "patch": tuple(arguments["weight"].shape[2:]), "ids": ids}


def draw_patch_l2_loss(draw: Draw) -> Arguments:
    arguments = draw_embedding(draw)
    arguments.pop("tokens")
    rows, width = arguments["ids"].shape, arguments["weight"].shape[0]
    prediction = draw.floats(*rows, width, dtype=draw.other())
    weights = draw_weights(draw, *rows) if width else None
    return {"prediction": prediction, **arguments, "weights": weights, "normalize": draw.flag()}


def draw_weights(draw: Draw, *shape: int) -> Tensor | None:
    if draw.flag(0.3):
        return None
    if draw.flag():
        return draw.bools(*shape)
    values = torch.rand(shape, generator=draw.generator, dtype=torch.float64) * 3
    return draw.laid_out(values.to(draw.random.choice((torch.float32, torch.float64, torch.int64, torch.uint8))))


def draw_masked_l2_loss(draw: Draw) -> Arguments:
    batch, rows, width = draw.size(5), draw.size(), draw.size(67)
    tokens = draw.size(33, least=1)
    with_ids = draw.flag()
    target = (batch, tokens if with_ids else rows, width)
    return {
        "prediction": draw.floats(batch, rows, width),
        "target": draw.volume(*target),
        "ids": draw.ids(batch, rows, tokens) if with_ids else None,
        "weights": draw_weights(draw, batch, rows) if width else None,
        "normalize": draw.flag(),
    }


def tied_masked_l2_loss(arguments: Arguments) -> dict[str, Sequence[int]]:
    target = (0, 2) if arguments["ids"] is not None else (0, 1, 2)
    return {"prediction": (0, 2), "target": target, "ids": (0, 1), "weights": (0, 1)}


def draw_decoder_tokens(draw: Draw) -> Arguments:
    batch, tokens, width = draw.size(5), draw.size(33), draw.size(67)
    keep = draw.random.randint(0, tokens)
    orders = [torch.randperm(tokens, generator=draw.generator) for _ in range(batch)]
    order = torch.stack(orders) if orders else torch.zeros(0, tokens, dtype=torch.int64)
    return {
        "visible": draw.floats(batch, keep, width),
        "mask_token": draw.floats(width, dtype=draw.other()),
        "ids_restore": draw.laid_out(order, expand=False),
        "position": draw.floats(tokens, width, dtype=draw.other()),
    }


def draw_leading(draw: Draw) -> list[int]:
    return [draw.size(7) for _ in range(draw.random.choice((0, 1, 2, 2, 2, 3)))]


def draw_add_layer_norm(draw: Draw) -> Arguments:
    shape = [*draw_leading(draw), draw.size(67)]
    width = shape[-1]
    with_residual = draw.flag(0.7)
    x = draw.floats(*shape)
    residual = draw.floats(*shape, dtype=draw.other()) if with_residual else None
    total = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return {
        "x": x,
        "residual": residual,
        "weight": draw.floats(width, dtype=total),
        "bias": draw.floats(width, dtype=total),
        "epsilon": draw.random.choice((1e-6, 1e-2, 0.5)),
        "residual_bias": draw.floats(width, dtype=draw.other()) if with_residual and draw.flag() else None,
    }


def tied_add_layer_norm(arguments: Arguments) -> dict[str, Sequence[int]]:
    axes = tuple(range(arguments["x"].dim()))
    vectors: dict[str, Sequence[int]] = dict.fromkeys(("weight", "bias", "residual_bias"), (0,))
    return {"x": axes[-1:], "residual": axes, **vectors}


def draw_norm_linear(draw: Draw) -> Arguments:
    norm = draw_add_layer_norm(draw)
    total, width, inputs = norm["weight"].dtype, draw.size(33), norm["weight"].shape[0]
    return {
        "x": norm["x"],
        "residual": norm["residual"],
        "norm_weight": norm["weight"],
        "norm_bias": norm["bias"],
        "weight": draw.floats(width, inputs, dtype=total, scale=0.3),
        "bias": draw.floats(width, dtype=total) if draw.flag() else None,
        "epsilon": norm["epsilon"],
        "residual_bias": norm["residual_bias"],
    }


def tied_norm_linear(arguments: Arguments) -> dict[str, Sequence[int]]:
    axes = tuple(range(arguments["x"].dim()))
    vectors: dict[str, Sequence[int]] = dict.fromkeys(("norm_weight", "norm_bias", "bias", "residual_bias"), (0,))
    return {"x": axes[-1:], "residual": axes, "weight": (1,), **vectors}


def draw_linear(draw: Draw) -> Arguments:
    inputs, outputs = draw.size(67), draw.size(33)
    return {
        "x": draw.floats(*draw_leading(draw), inputs),
        "weight": draw.floats(outputs, inputs, scale=0.3),
        "bias": draw.floats(outputs) if draw.flag() else None,
    }


def draw_gelu_linear(draw: Draw) -> Arguments:
    arguments = draw_linear(draw)
    inputs = arguments["weight"].shape[1]
    hidden = arguments.pop("x")
    return {
        "hidden": hidden,
        **arguments,
        "hidden_bias": draw.floats(inputs, dtype=draw.other()) if draw.flag() else None,
    }


def tied_linear(arguments: Arguments) -> dict[str, Sequence[int]]:
    return {"x": (-1,), "hidden": (-1,), "weight": (1,), "bias": (0,), "hidden_bias": (0,)}


def draw_attention(draw: Draw) -> Arguments:
    batch, queries, keys, heads, width = draw.size(4), draw.size(), draw.size(), draw.size(4), draw.size(33)
    packed = draw.random.choice(("qkv", "kv", "none"))
    if packed == "qkv":
        keys = queries
    layouts: dict[str, dict[str, tuple[int, ...]]] = {
        "qkv": {"q": (batch, queries, 3, heads, width)},
        "kv": {"q": (batch, queries, heads, width), "k": (batch, keys, 2, heads, width)},
        "none": {"q": (batch, queries, heads, width), **dict.fromkeys("kv", (batch, keys, heads, width))},
    }
    names = layouts[packed]
    tensors = {name: draw.floats(*names[name]) if name in names else None for name in "qkv"}
    return {**tensors, "key_present": draw.bools(batch, keys) if draw.flag() else None}


def tied_attention(arguments: Arguments) -> dict[str, Sequence[int]]:
    if arguments["k"] is None:
        return {"q": (2,), "key_present": (0, 1)}
    if arguments["v"] is None:
        return {"q": (0, 2, 3), "k": (0, 2, 3, 4), "key_present": (0, 1)}
    return {"q": (0, 2, 3), "k": (0, 1, 2, 3), "v": (0, 1, 2, 3), "key_present": (0, 1)}


def draw_concat_attention(draw: Draw) -> Arguments:
    batch, tokens, vectors, heads, width = draw.size(4), draw.size(), draw.size(4), draw.size(4), draw.size(33)
    return {
        "qkv": draw.floats(batch, tokens, 3, heads, width),
        "vectors": draw.floats(batch, vectors, 2, heads, width),
        "present": draw.bools(batch, vectors),
    }


def draw_transformer_block(draw: Draw) -> Arguments:
    batch, tokens, heads, hidden = draw.size(3), draw.size(17), draw.size(4, least=1), draw.size(33)
    width = heads * draw.size(8)
    x = draw.floats(batch, tokens, width)
    with_residual = draw.flag()
    residual = draw.floats(batch, tokens, width, dtype=draw.other()) if with_residual else None
    total = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    layers = {"qkv": (3 * width, width), "proj": (width, width), "fc1": (hidden, width), "fc2": (width, hidden)}
    weights = {f"{name}_weight": draw.floats(*shape, dtype=total, scale=0.3) for name, shape in layers.items()}
    weights |= {f"{name}_bias": draw.floats(shape[0], dtype=total) for name, shape in layers.items() if name != "fc2"}
    norms = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")
    return {
        "x": x,
        "residual": residual,
        "residual_bias": draw.floats(width, dtype=draw.other()) if with_residual and draw.flag() else None,
        **{name: draw.floats(width, dtype=total) for name in norms},
        **weights,
        "heads": heads,
        "ids": draw.ids(batch, draw.size(), tokens) if tokens > 0 and draw.flag() else None,
        "epsilon": draw.random.choice((1e-6, 1e-2)),
    }


def tied_transformer_block(arguments: Arguments) -> dict[str, Sequence[int]]:
    vectors = [name for name in arguments if name.endswith("_bias") or name.startswith("norm")]
    matrices: dict[str, Sequence[int]] = {
        "qkv_weight": (0, 1),
        "proj_weight": (0, 1),
        "fc1_weight": (1,),
        "fc2_weight": (0,),
    }
    return {"x": (2,), "residual": (0, 1, 2), "ids": (0,), **dict.fromkeys(vectors, (0,)), **matrices}


def call_transformer_block(**arguments: Any) -> tuple[Tensor, Tensor]:
    weights = {name: arguments.pop(name) for name in mmmae_kernels.BlockWeights._fields if name in arguments}
    return mmmae_kernels.transformer_block(weights=mmmae_kernels.BlockWeights(**weights), **arguments)


def draw_random_masking(draw: Draw) -> Arguments:
    tokens = draw.size(67)
    keep = draw.random.randint(0, tokens)
    seed = draw.random.choice((0, 1, -1, 2**63, 2**64 - 1, -(2**63), draw.random.getrandbits(64)))
    kinds: list[Callable[[int], Any]] = [int, int, numpy.int64, numpy.int32]
    seeds: list[Callable[[int], Any]] = [
        int,
        lambda number: numpy.uint64(number % 2**64),
        lambda number: torch.tensor((number + 2**63) % 2**64 - 2**63),
        lambda number: torch.tensor(number % 2**31, dtype=torch.int32),
    ]
    make = draw.random.choice(kinds)
    return {
        "batch": make(draw.size(5)),
        "tokens": make(tokens),
        "keep": make(keep),
        "seed": draw.random.choice(seeds)(seed),
        "device": draw.random.choice((None, "cpu", torch.device("cpu"))),
        "first_sample": draw.random.choice((0, 1, 7, 2**32 - 1, 2**40)),
    }


OPS: dict[str, Op] = {
    "random_masking": Op(mmmae_kernels.random_masking, draw_random_masking, definitions.random_masking),
    "patch_embed": Op(
        mmmae_kernels.patch_embed,
        draw_patch_embed,
        definitions.patch_embed,
        tied_embedding,
        optional=frozenset({"bias", "ids", "position"}),
        alike=frozenset({"bias"}),
        numeric=frozenset({"volume"}),
    ),
    "patchify": Op(
        mmmae_kernels.patchify,
        draw_patchify,
        definitions.patchify,
        lambda arguments: {"volume": [2 + axis for axis, part in enumerate(arguments["patch"]) if part > 1]},
        optional=frozenset({"ids"}),
        numeric=frozenset({"volume"}),
    ),
    "patch_l2_loss": Op(
        mmmae_kernels.patch_l2_loss,
        draw_patch_l2_loss,
        definitions.patch_l2_loss,
        lambda arguments: {
            **tied_embedding(arguments),
            "prediction": (0, 1, 2),
            "weight": (0, 1),
            "ids": (0, 1),
            "weights": (0, 1),
        },
        optional=frozenset({"bias", "weights"}),
        constant=frozenset({"volume", "weight", "bias"}),
        alike=frozenset({"bias"}),
        numeric=frozenset({"volume", "weights"}),
    ),
    "masked_l2_loss": Op(
        mmmae_kernels.masked_l2_loss,
        draw_masked_l2_loss,
        definitions.masked_l2_loss,
        tied_masked_l2_loss,
        optional=frozenset({"ids", "weights"}),
        numeric=frozenset({"target", "weights"}),
    ),
    "decoder_tokens": Op(
        mmmae_kernels.decoder_tokens,
        draw_decoder_tokens,
        definitions.decoder_tokens,
        lambda arguments: {"visible": (0, 2), "mask_token": (0,), "ids_restore": (0, 1), "position": (0, 1)},
    ),
    "add_layer_norm": Op(
        mmmae_kernels.add_layer_norm,
        draw_add_layer_norm,
        definitions.add_layer_norm,
        tied_add_layer_norm,
        optional=frozenset({"residual", "residual_bias"}),
        alike=frozenset({"bias"}),
        free=frozenset({"x"}),
    ),
    "norm_linear": Op(
        mmmae_kernels.norm_linear,
        draw_norm_linear,
        definitions.norm_linear,
        tied_norm_linear,
        optional=frozenset({"residual", "bias", "residual_bias"}),
        alike=frozenset({"norm_bias", "weight", "bias"}),
        free=frozenset({"x"}),
    ),
    "gelu_linear": Op(
        mmmae_kernels.gelu_linear,
        draw_gelu_linear,
        definitions.gelu_linear,
        tied_linear,
        optional=frozenset({"bias", "hidden_bias"}),
        alike=frozenset({"weight", "bias"}),
        free=frozenset({"hidden"}),
    ),
    "linear": Op(
        linear,
        draw_linear,
        definitions.linear,
        tied_linear,
        optional=frozenset({"bias"}),
        alike=frozenset({"weight", "bias"}),
        free=frozenset({"x"}),
    ),
    "attention": Op(
        mmmae_kernels.attention,
        draw_attention,
        definitions.attention,
        tied_attention,
        optional=frozenset({"k", "v", "key_present"}),
        alike=frozenset({"k", "v"}),
        chooses=True,
    ),
    "concat_attention": Op(
        mmmae_kernels.concat_attention,
        draw_concat_attention,
        definitions.concat_attention,
        lambda arguments: {"qkv": (0, 2, 3, 4), "vectors": (0, 2, 3, 4), "present": (0, 1)},
        alike=frozenset({"vectors"}),
        chooses=True,
    ),
    "transformer_block": Op(
        call_transformer_block,
        draw_transformer_block,
        definitions.transformer_block,
        tied_transformer_block,
        optional=frozenset({"residual", "residual_bias", "ids"}),
        alike=frozenset(name for name in mmmae_kernels.BlockWeights._fields if name.endswith(("weight", "qkv_bias"))),
        unseen=frozenset(mmmae_kernels.BlockWeights._fields) | {"residual_bias"},
    ),
}
