"""Cases of the blocks of several models at once, which each model's own block defines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmmae_kernels import BlockWeights, add_layer_norm, transformer_block
from mmmae_kernels.add_layer_norm.reference import add_layer_norm_reference
from mmmae_kernels.transformer_block.op import BlockCall
from mmmae_kernels.transformer_block.reference import transformer_block_reference
from mmmae_kernels.transformer_block.stacked import plan_together, run_stacked_blocks, run_stacked_norm, stack_weights
from tests.cases.case import Case, Inputs, draw
from tests.cases.transformer_block import draw_weights

# name -> models, samples of each, tokens, width, heads, hidden width
SHAPES = {
    "odd": (2, 2, 9, 24, 3, 17),
    "past a block": (2, 2, 33, 72, 2, 130),
    "one token": (3, 1, 1, 16, 1, 16),
    "no sample": (2, 0, 4, 16, 2, 8),
}
FORMS = ("", ", without residual")
EPSILON = 1e-6
FIELDS = (*BlockWeights._fields, "last_bias", "norm_weight", "norm_bias")


def run_together(i: Inputs, models: int, heads: int) -> list[Tensor]:
    """Compute a block and the norm after it, of all models at once where that is possible."""
    weights = [{name: i[f"{name} {model}"] for name in FIELDS} for model in range(models)]
    blocks = [(BlockWeights(*(w[name] for name in BlockWeights._fields)), w["last_bias"]) for w in weights]
    calls = [BlockCall(i["x"], None, None, block, heads, None, EPSILON) for block, _ in blocks]
    plan = plan_together(calls, "auto")
    if plan is None:
        return run_apart(i, models, heads, transformer_block, add_layer_norm)
    others = [[w[name] for w in weights] for name in ("norm_weight", "norm_bias")]
    residual = i["residual"]
    if residual is not None:
        others.append([i[f"residual_bias {model}"] for model in range(models)])
    (stacked,), (norm_weight, norm_bias, *bias) = stack_weights([blocks], others, plan.dtype)
    x, residual = run_stacked_blocks(i["x"], residual, bias[0] if bias else None, stacked, heads, EPSILON, plan)
    return [x, run_stacked_norm(x, residual, stacked.last_bias, norm_weight, norm_bias, EPSILON)]


def run_apart(i: Inputs, models: int, heads: int, block: Any, norm: Any, *arguments: Any) -> list[Tensor]:
    """Compute a block and the norm after it, of one model after another, by the functions of the ops."""
    results = []
    residuals = [None] * models if i["residual"] is None else i["residual"].chunk(models)
    for model, (x, residual) in enumerate(zip(i["x"].chunk(models), residuals, strict=True)):
        *weights, last_bias, norm_weight, norm_bias = (i[f"{name} {model}"] for name in FIELDS)
        bias = i.get(f"residual_bias {model}")
        x, out = block(x, residual, bias, BlockWeights(*weights), heads, *arguments)
        results.append((x, norm(x, out, norm_weight, norm_bias, EPSILON, last_bias)[1]))
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def stacked_case(shape: str, form: str) -> Case:
    """Return the case of a shape and a form."""
    models, batch, tokens, width, heads, hidden = SHAPES[shape]

    def make() -> Inputs:
        x, residual = draw(models * batch, tokens, width), draw(models * batch, tokens, width, seed=1)
        inputs: Inputs = {"x": x, "residual": None if form else residual}
        for model in range(models):
            weights = draw_weights(width, hidden)
            weights["last_bias"] = weights.pop("fc2_bias")
            weights |= {
                name: torch.empty(width) for name in ("norm_weight", "norm_bias", *([] if form else ["residual_bias"]))
            }
            for place, (name, weight) in enumerate(weights.items()):
                drawn = draw(*weight.shape, seed=100 * model + place + 10)
                # Norms near 1, as after training: with normal numbers, errors depend on what the seed makes large.
                scaled = drawn / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 0.3 * drawn
                is_norm = name.startswith("norm") and name.endswith("weight")
                inputs[f"{name} {model}"] = 1 + scaled if is_norm else scaled
        return inputs

    return Case(
        "stacked_blocks",
        shape + form,
        make,
        lambda i: run_together(i, models, heads),
        lambda i: run_apart(i, models, heads, transformer_block_reference, add_layer_norm_reference, None, EPSILON),
        small=shape == "odd",
        products=frozenset({"residual"}),
    )


CASES = [stacked_case(shape, form) for shape in SHAPES for form in FORMS]
