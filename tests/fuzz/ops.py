"""Every public function: how to call it, how to draw its arguments, and what it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

import mmmae_kernels
import tests.fuzz.definitions as definitions
from mmmae_kernels.linear import linear
from tests.fuzz.arguments import (
    Arguments,
    draw_add_layer_norm,
    draw_attention,
    draw_concat_attention,
    draw_decoder_tokens,
    draw_gelu_linear,
    draw_linear,
    draw_masked_l2_loss,
    draw_norm_linear,
    draw_patch_embed,
    draw_patch_l2_loss,
    draw_patchify,
    draw_random_masking,
    draw_transformer_block,
    tied_add_layer_norm,
    tied_attention,
    tied_embedding,
    tied_linear,
    tied_masked_l2_loss,
    tied_norm_linear,
    tied_transformer_block,
)
from tests.fuzz.draw import Draw


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
        products: tensors that a matrix product computes, so that they have autocast's dtype under autocast.
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
    products: frozenset[str] = frozenset()
    alike: frozenset[str] = frozenset()
    free: frozenset[str] = frozenset()
    chooses: bool = False
    numeric: frozenset[str] = frozenset()
    unseen: frozenset[str] = frozenset()


def call_transformer_block(**arguments: Any) -> tuple[Tensor, Tensor]:
    weights = {name: arguments.pop(name) for name in mmmae_kernels.BlockWeights._fields if name in arguments}
    return mmmae_kernels.transformer_block(weights=mmmae_kernels.BlockWeights(**weights), **arguments)


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
        products=frozenset({"prediction"}),
        alike=frozenset({"bias"}),
        numeric=frozenset({"volume", "weights"}),
    ),
    "masked_l2_loss": Op(
        mmmae_kernels.masked_l2_loss,
        draw_masked_l2_loss,
        definitions.masked_l2_loss,
        tied_masked_l2_loss,
        optional=frozenset({"ids", "weights"}),
        products=frozenset({"prediction"}),
        numeric=frozenset({"target", "weights"}),
    ),
    "decoder_tokens": Op(
        mmmae_kernels.decoder_tokens,
        draw_decoder_tokens,
        definitions.decoder_tokens,
        lambda arguments: {"visible": (0, 2), "mask_token": (0,), "ids_restore": (0, 1), "position": (0, 1)},
        products=frozenset({"visible"}),
    ),
    "add_layer_norm": Op(
        mmmae_kernels.add_layer_norm,
        draw_add_layer_norm,
        definitions.add_layer_norm,
        tied_add_layer_norm,
        optional=frozenset({"residual", "residual_bias"}),
        products=frozenset({"residual"}),
        alike=frozenset({"bias"}),
        free=frozenset({"x"}),
    ),
    "norm_linear": Op(
        mmmae_kernels.norm_linear,
        draw_norm_linear,
        definitions.norm_linear,
        tied_norm_linear,
        optional=frozenset({"residual", "bias", "residual_bias"}),
        products=frozenset({"residual"}),
        alike=frozenset({"norm_bias", "weight", "bias"}),
        free=frozenset({"x"}),
    ),
    "gelu_linear": Op(
        mmmae_kernels.gelu_linear,
        draw_gelu_linear,
        definitions.gelu_linear,
        tied_linear,
        optional=frozenset({"bias", "hidden_bias"}),
        products=frozenset({"hidden"}),
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
        products=frozenset({"q", "k", "v"}),
        alike=frozenset({"k", "v"}),
        chooses=True,
    ),
    "concat_attention": Op(
        mmmae_kernels.concat_attention,
        draw_concat_attention,
        definitions.concat_attention,
        lambda arguments: {"qkv": (0, 2, 3, 4), "vectors": (0, 2, 3, 4), "present": (0, 1)},
        products=frozenset({"qkv", "vectors"}),
        alike=frozenset({"vectors"}),
        chooses=True,
    ),
    "transformer_block": Op(
        call_transformer_block,
        draw_transformer_block,
        definitions.transformer_block,
        tied_transformer_block,
        optional=frozenset({"residual", "residual_bias", "ids"}),
        products=frozenset({"residual"}),
        alike=frozenset(name for name in mmmae_kernels.BlockWeights._fields if name.endswith(("weight", "qkv_bias"))),
        unseen=frozenset(mmmae_kernels.BlockWeights._fields) | {"residual_bias"},
    ),
}
