"""Cases of inputs whose elements lie up to 2^31 and more apart: offsets that no int32 holds."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import mmmae_kernels
from mmmae_kernels.add_layer_norm.reference import add_layer_norm_reference
from mmmae_kernels.decoder_tokens.reference import decoder_tokens_reference
from mmmae_kernels.masked_loss.reference import masked_l2_loss_reference, patch_l2_loss_reference
from mmmae_kernels.patch_embed.reference import patch_embed_reference
from tests.cases.attention import merge, merge_case, merge_definition
from tests.cases.case import Case, Inputs, draw, draw_ids


def far_cases() -> Iterator[Case]:
    """Yield cases whose inputs are views of memory that is mapped, not allocated."""

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
    yield case(
        "concat_attention",
        "samples far apart",
        merge_case(3, 2, 16, first=2, batch=2).make,
        lambda i: merge(i)[0],
        lambda i: merge_definition(i)[0],
        "qkv",
    )


def far_apart(tensor: Tensor, axis: int) -> Tensor:
    """Return a tensor of the same values whose neighbours along `axis` are 2^31 + 16 elements apart."""
    strides = list(tensor.contiguous().stride())
    strides[axis] = 2**31 + 16
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, (last + 1) * tensor.element_size(), flags=flags)
    view = torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides)
    return view.copy_(tensor.detach())


CASES = [*far_cases()]
