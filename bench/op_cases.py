"""The ops that are timed, at the shapes of `base`, and what one would write in PyTorch instead.

Ops with parameters run forward and backward. The first variant of an op is the baseline, which the others must equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.op_work import BACKENDS, CONFIG, ForwardBackward, OpWork, Place, Run, each_backend, patch_bytes, trained
from mmmae_kernels import (
    add_layer_norm,
    attention,
    concat_attention,
    decoder_tokens,
    gelu_linear,
    masked_l2_loss,
    norm_linear,
    patch_embed,
    patch_l2_loss,
    patchify,
)
from mmmae_kernels.attention.call import Call, target_of
from mmmae_kernels.attention.op import BACKENDS as ATTENTION
from mmmae_kernels.attention.op import explain_call
from mmmae_kernels.autocast import autocast_dtype

SDPA = "F.scaled_dot_product_attention"


def grid_of(volume: Tensor) -> Tensor:
    """Return a view of a volume `[B, 1, T, H, W]` whose axes are grid and patch in turn."""
    (groups, rows, columns), (pt, ph, pw) = CONFIG.grid, CONFIG.patch
    return volume.view(len(volume), groups, pt, rows, ph, columns, pw)


def gather_patches(volume: Tensor, ids: Tensor) -> Tensor:
    """Return the patches `[B, K, pt*ph*pw]` that `ids` names and no others, as one would write it in PyTorch."""
    _, rows, columns = CONFIG.grid
    sample = torch.arange(len(volume), device=volume.device)[:, None]
    return grid_of(volume)[sample, ids // (rows * columns), :, ids // columns % rows, :, ids % columns].flatten(2)


def patch_embed_of_visible_tokens(batch: int, place: Place) -> OpWork:
    """Set up the embedding of visible patches, which are gathered first or a convolution's result after."""
    volume = place.data(batch, 1, CONFIG.bands, CONFIG.image_size, CONFIG.image_size)
    ids = place.mask(batch).ids_keep
    weight, bias, position = (
        place.leaf(CONFIG.dim, 1, *CONFIG.patch),
        place.leaf(CONFIG.dim),
        place.leaf(CONFIG.tokens, CONFIG.dim),
    )

    def gather_then_linear() -> Tensor:
        return F.linear(gather_patches(volume, ids), weight.flatten(1), bias) + position[ids]

    def conv_then_gather() -> Tensor:
        tokens = F.conv3d(volume, weight, bias, stride=CONFIG.patch).flatten(2).transpose(1, 2) + position
        return tokens.gather(1, ids[:, :, None].expand(-1, -1, CONFIG.dim))

    def ours() -> Tensor:
        return patch_embed(volume, weight, bias, ids, position)

    inputs = (weight, bias, position)
    variants: dict[str, Run] = {
        "gather, F.linear": ForwardBackward(gather_then_linear, inputs),
        "Conv3d, gather": ForwardBackward(conv_then_gather, inputs),
        **each_backend("patch_embed", ForwardBackward(ours, inputs)),
    }
    return trained(variants, inputs, patch_bytes(volume, ids))


def patchify_of_visible_tokens(batch: int, place: Place) -> OpWork:
    """Set up the cutting of visible patches out of a volume."""
    volume = place.data(batch, 1, CONFIG.bands, CONFIG.image_size, CONFIG.image_size)
    ids = place.mask(batch).ids_keep

    def index_the_view() -> Sequence[Tensor]:
        return [gather_patches(volume, ids)]

    def cut_all_then_gather() -> Sequence[Tensor]:
        patches = grid_of(volume).permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, CONFIG.tokens, -1)
        return [patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[2]))]

    def ours() -> Sequence[Tensor]:
        return [patchify(volume, CONFIG.patch, ids)]

    variants = {"index the view": index_the_view, "cut all, gather": cut_all_then_gather}
    return OpWork({**variants, **each_backend("patchify", ours)}, 2 * patch_bytes(volume, ids))


def random_masking_of_all_tokens(batch: int, place: Place) -> OpWork:
    """Compare the sum of a table, which is cheap: no two variants draw the same mask."""

    def sums(keep: Tensor, masked: Tensor, restore: Tensor) -> Sequence[Tensor]:
        return [restore.sum()]

    def two_sorts() -> Sequence[Tensor]:
        shuffle = torch.rand(batch, CONFIG.tokens, device=place.device).argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        return sums(shuffle[:, : CONFIG.keep].contiguous(), shuffle[:, CONFIG.keep :].contiguous(), restore)

    def ours() -> Sequence[Tensor]:
        return sums(*place.mask(batch))

    tables = 8 * batch * (CONFIG.keep + (CONFIG.tokens - CONFIG.keep) + CONFIG.tokens)  # int64
    return OpWork({"torch.rand, two argsorts": two_sorts, **each_backend("random_masking", ours)}, tables)


def decoder_tokens_of_all_tokens(batch: int, place: Place) -> OpWork:
    """Set up the decoder's input: visible tokens and mask tokens in order, with positions."""
    width = CONFIG.decoder_dim
    mask = place.mask(batch)
    visible, mask_token, position = (
        place.leaf(batch, CONFIG.keep, width),
        place.leaf(width),
        place.leaf(CONFIG.tokens, width),
    )

    def cat_then_gather() -> Tensor:
        masked = mask_token.expand(batch, CONFIG.tokens - CONFIG.keep, width)
        shuffled = torch.cat([visible, masked], dim=1)
        return shuffled.gather(1, mask.ids_restore[:, :, None].expand(-1, -1, width)) + position

    def ours() -> Tensor:
        return decoder_tokens(visible, mask_token, mask.ids_restore, position)

    inputs = (visible, mask_token, position)
    variants: dict[str, Run] = {
        "cat, gather, add": ForwardBackward(cat_then_gather, inputs),
        **each_backend("decoder_tokens", ForwardBackward(ours, inputs)),
    }
    return trained(variants, inputs, mask.ids_restore.nbytes)


def masked_l2_loss_of_masked_tokens(batch: int, place: Place) -> OpWork:
    """Set up the loss against a given target."""
    ids = place.mask(batch).ids_masked
    prediction, target = place.leaf(batch, ids.shape[1], CONFIG.dim), place.data(batch, CONFIG.tokens, CONFIG.dim)

    def gather_then_mse() -> Tensor:
        return F.mse_loss(prediction, target.gather(1, ids[:, :, None].expand(-1, -1, CONFIG.dim)))

    def ours() -> Tensor:
        return masked_l2_loss(prediction, target, ids)

    variants: dict[str, Run] = {
        "gather, F.mse_loss": ForwardBackward(gather_then_mse, (prediction,)),
        **each_backend("masked_l2_loss", ForwardBackward(ours, (prediction,))),
    }
    return trained(variants, (prediction,), prediction.nbytes)  # as much of the target is read


def patch_l2_loss_of_masked_tokens(batch: int, place: Place) -> OpWork:
    """Set up the loss against embedded patches, which the native kernel never writes to memory."""
    volume = place.data(batch, 1, CONFIG.bands, CONFIG.image_size, CONFIG.image_size)
    ids = place.mask(batch).ids_masked
    weight, bias = place.data(CONFIG.dim, 1, *CONFIG.patch) / 28, place.data(CONFIG.dim)
    prediction = place.leaf(batch, ids.shape[1], CONFIG.dim)

    def embed_then_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                target = F.linear(gather_patches(volume, ids), weight.flatten(1), bias)
            return loss(prediction, target)

        return run

    def plain(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().mean(-1).mean()

    def ours() -> Tensor:
        return patch_l2_loss(prediction, volume, weight, bias, ids)

    variants: dict[str, Run] = {
        "embed, F.mse_loss": ForwardBackward(embed_then_loss(F.mse_loss), (prediction,)),
        "embed, plain loss": ForwardBackward(embed_then_loss(plain), (prediction,)),
        **each_backend("patch_l2_loss", ForwardBackward(ours, (prediction,))),
    }
    return trained(variants, (prediction,), patch_bytes(volume, ids) + weight.nbytes)


def norm_linear_of_visible_tokens(batch: int, place: Place) -> OpWork:
    """Set up residual addition, layer norm and the projection to q, k and v."""
    x, residual = place.leaf(batch, CONFIG.keep, CONFIG.dim), place.leaf(batch, CONFIG.keep, CONFIG.dim)
    norm_weight, norm_bias = place.leaf(CONFIG.dim), place.leaf(CONFIG.dim)
    weight, bias = place.leaf(3 * CONFIG.dim, CONFIG.dim), place.leaf(3 * CONFIG.dim)

    def one_by_one() -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, F.linear(F.layer_norm(total, (CONFIG.dim,), norm_weight, norm_bias, 1e-6), weight, bias)

    def ours() -> tuple[Tensor, Tensor]:
        return norm_linear(x, residual, norm_weight, norm_bias, weight, bias)

    inputs = (x, residual, norm_weight, norm_bias, weight, bias)
    variants: dict[str, Run] = {
        "add, F.layer_norm, F.linear": ForwardBackward(one_by_one, inputs),
        **each_backend("norm_linear", ForwardBackward(ours, inputs)),
    }
    return trained(variants, inputs)


def gelu_linear_of_visible_tokens(batch: int, place: Place) -> OpWork:
    """Set up a GELU and the linear layer after it."""
    hidden, weight, bias = (
        place.leaf(batch, CONFIG.keep, CONFIG.dim),
        place.leaf(CONFIG.dim, CONFIG.dim),
        place.leaf(CONFIG.dim),
    )

    def one_by_one() -> Tensor:
        return F.linear(F.gelu(hidden), weight, bias)

    def ours() -> Tensor:
        return gelu_linear(hidden, weight, bias)

    inputs = (hidden, weight, bias)
    variants: dict[str, Run] = {
        "F.gelu, F.linear": ForwardBackward(one_by_one, inputs),
        **each_backend("gelu_linear", ForwardBackward(ours, inputs)),
    }
    return trained(variants, inputs)


def add_layer_norm_of_visible_tokens(batch: int, place: Place) -> OpWork:
    """Set up residual addition and layer norm."""
    x, residual = place.leaf(batch, CONFIG.keep, CONFIG.dim), place.leaf(batch, CONFIG.keep, CONFIG.dim)
    weight, bias = place.leaf(CONFIG.dim), place.leaf(CONFIG.dim)

    def add_then_norm() -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, F.layer_norm(total, (CONFIG.dim,), weight, bias, 1e-6)

    def ours() -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, weight, bias)

    inputs = (x, residual, weight, bias)
    variants: dict[str, Run] = {
        "add, F.layer_norm": ForwardBackward(add_then_norm, inputs),
        **each_backend("add_layer_norm", ForwardBackward(ours, inputs)),
    }
    return trained(variants, inputs)


def attention_of_visible_tokens(batch: int, place: Place) -> OpWork:
    """Set up self-attention of the encoder."""
    heads = CONFIG.heads
    qkv = place.leaf(batch, CONFIG.keep, 3, heads, CONFIG.dim // heads)

    def plain() -> Tensor:
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attention_variants(plain, lambda backend: attention(qkv, backend=backend), [qkv])


def attention_of_masked_tokens_to_all(batch: int, place: Place) -> OpWork:
    """Set up attention as in the last block of the decoder."""
    heads, head = CONFIG.decoder_heads, CONFIG.decoder_dim // CONFIG.decoder_heads
    masked = CONFIG.tokens - CONFIG.keep
    q, kv = place.leaf(batch, masked, heads, head), place.leaf(batch, CONFIG.tokens, 2, heads, head)

    def plain() -> Tensor:
        k, v = kv.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)

    return attention_variants(plain, lambda backend: attention(q, kv, backend=backend), [q, kv])


def concat_attention_of_visible_tokens(batch: int, place: Place) -> OpWork:
    """Set up attention to three vectors more, of which every second sample lacks one."""
    heads, head = CONFIG.heads, CONFIG.dim // CONFIG.heads
    qkv, vectors = place.leaf(batch, CONFIG.keep, 3, heads, head), place.leaf(batch, 3, 2, heads, head)
    present = torch.ones(batch, 3, dtype=torch.bool, device=place.device)
    present[::2, 1] = False
    mask = torch.cat([present.new_ones(batch, CONFIG.keep), present], dim=1)[:, None, None]

    def plain() -> Tensor:
        q, k, v = qkv.unbind(2)
        keys, values = (torch.cat([part, more], dim=1) for part, more in zip((k, v), vectors.unbind(2), strict=True))
        q, keys, values = (part.transpose(1, 2) for part in (q, keys, values))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2)

    return attention_variants(
        plain, lambda backend: concat_attention(qkv, vectors, present, backend=backend), [qkv, vectors]
    )


def attention_variants(plain: Callable[[], Tensor], by: Callable[[str], Tensor], inputs: Sequence[Tensor]) -> OpWork:
    """Return the work of PyTorch's function as one would call it, and of each backend that serves the call here."""
    device = inputs[0].device.type
    dtype = autocast_dtype(device) or inputs[0].dtype
    reasons = explain_call(Call(target_of(device, None), dtype, CONFIG.dim // CONFIG.heads), here=True)
    runs = {SDPA: ForwardBackward(plain, inputs)}
    for backend, reason in reasons.items():
        if reason is None:
            runs[backend] = ForwardBackward(functools.partial(by, backend), inputs)
    return trained(runs, inputs)


CASES: dict[str, tuple[Callable[[int, Place], OpWork], tuple[str, ...]]] = {
    "attention": (attention_of_visible_tokens, (SDPA, *ATTENTION)),
    "attention to all": (attention_of_masked_tokens_to_all, (SDPA, *ATTENTION)),
    "concat_attention": (concat_attention_of_visible_tokens, (SDPA, *ATTENTION)),
    "patchify": (patchify_of_visible_tokens, ("index the view", "cut all, gather", *BACKENDS)),
    "patch_embed": (patch_embed_of_visible_tokens, ("gather, F.linear", "Conv3d, gather", *BACKENDS)),
    "random_masking": (random_masking_of_all_tokens, ("torch.rand, two argsorts", *BACKENDS)),
    "decoder_tokens": (decoder_tokens_of_all_tokens, ("cat, gather, add", *BACKENDS)),
    "masked_l2_loss": (masked_l2_loss_of_masked_tokens, ("gather, F.mse_loss", *BACKENDS)),
    "patch_l2_loss": (patch_l2_loss_of_masked_tokens, ("embed, F.mse_loss", "embed, plain loss", *BACKENDS)),
    "add_layer_norm": (add_layer_norm_of_visible_tokens, ("add, F.layer_norm", *BACKENDS)),
    "norm_linear": (norm_linear_of_visible_tokens, ("add, F.layer_norm, F.linear", *BACKENDS)),
    "gelu_linear": (gelu_linear_of_visible_tokens, ("F.gelu, F.linear", *BACKENDS)),
}
