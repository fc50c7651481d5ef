"""Valid arguments of every public function, and the axes whose sizes others of its arguments determine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.fuzz.draw import Draw

Arguments = dict[str, Any]


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
