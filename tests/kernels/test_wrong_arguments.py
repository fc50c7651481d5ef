"""Each wrong argument of each op is a ValueError that names it and says what is expected."""

import pytest
import torch

from mmmae_kernels import (
    BlockWeights,
    add_layer_norm,
    attention,
    decoder_tokens,
    gelu_linear,
    masked_l2_loss,
    norm_linear,
    patch_embed,
    patch_l2_loss,
    patchify,
    transformer_block,
)

VOLUME, WEIGHT = torch.zeros(2, 1, 6, 32, 32), torch.zeros(4, 1, 3, 16, 16)
IDS = torch.zeros(2, 3, dtype=torch.int64)
ROWS = torch.zeros(2, 3)
BLOCK = BlockWeights(
    *(torch.zeros(4) for _ in range(2)),
    *(torch.zeros(12, 4), torch.zeros(12), torch.zeros(4, 4), torch.zeros(4)),
    *(torch.zeros(4) for _ in range(2)),
    *(torch.zeros(6, 4), torch.zeros(6), torch.zeros(4, 6)),
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patch_embed(VOLUME[0], WEIGHT), "volume has shape .*expected .B, C, T, H, W"),
        (lambda: patch_embed(VOLUME[:, :, :5], WEIGHT), "volume has T = 5, expected a multiple of the patch size 3"),
        (lambda: patch_embed(VOLUME, WEIGHT.expand(4, 2, 3, 16, 16)), "volume has 1 channels, expected 2"),
        (lambda: patch_embed(VOLUME, WEIGHT.int()), "weight has dtype torch.int32"),
        (lambda: patch_embed(VOLUME, WEIGHT, torch.zeros(5)), "bias has shape .5., expected .4."),
        (lambda: patch_embed(VOLUME, WEIGHT, None, IDS + 8), "ids contains 8, expected token numbers 0..7"),
        (lambda: patch_embed(VOLUME, WEIGHT, None, IDS - 1), "ids contains -1, expected token numbers 0..7"),
        (lambda: patch_embed(VOLUME, WEIGHT, None, IDS.int()), "ids has dtype torch.int32, expected torch.int64"),
        (lambda: patch_embed(VOLUME, WEIGHT, None, IDS[:1]), "ids has shape .1, 3., expected .2, 3."),
        (
            lambda: patch_embed(VOLUME, WEIGHT, None, IDS, torch.zeros(7, 4)),
            "position has shape .7, 4., expected .8, 4.",
        ),
        (lambda: patch_embed(VOLUME, WEIGHT.to("meta")), "weight is on meta, expected cpu"),
        (lambda: patch_embed(VOLUME, WEIGHT, torch.zeros(4, device="meta")), "bias is on meta, expected cpu"),
        (lambda: patch_embed(VOLUME, WEIGHT, None, IDS.to("meta")), "ids is on meta, expected cpu"),
        (lambda: masked_l2_loss(torch.zeros(2, 3, 4), torch.zeros(2, 9, 5), IDS), "prediction has shape"),
        (lambda: masked_l2_loss(torch.zeros(2, 3, 4), torch.zeros(2, 9, 4), IDS + 9), "ids contains 9"),
        (lambda: masked_l2_loss(IDS[..., None], IDS[..., None]), "prediction has dtype torch.int64"),
        (
            lambda: masked_l2_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), weights=torch.zeros(3)),
            "weights has shape",
        ),
        (lambda: patch_l2_loss(torch.zeros(2, 3, 5), VOLUME, WEIGHT, None, IDS), "prediction has shape"),
        (lambda: patch_l2_loss(torch.zeros(2, 2, 4), VOLUME, WEIGHT, None, IDS), r"expected \[2, 3, 4\]"),
        (lambda: patch_l2_loss(torch.zeros(2, 3, 4), VOLUME, WEIGHT, torch.zeros(5), IDS), "bias has shape"),
        (lambda: patch_l2_loss(torch.zeros(2, 3, 4), VOLUME, WEIGHT, None, IDS + 8), "ids contains 8"),
        (
            lambda: patch_l2_loss(torch.zeros(2, 3, 4, device="meta"), VOLUME, WEIGHT, None, IDS),
            "prediction is on meta, expected cpu",
        ),
        (lambda: decoder_tokens(torch.zeros(2, 4, 5), torch.zeros(5), IDS, torch.zeros(3, 5)), "visible has 4 tokens"),
        (lambda: decoder_tokens(torch.zeros(2, 2, 5), torch.zeros(4), IDS, torch.zeros(3, 5)), "mask_token has shape"),
        (
            lambda: add_layer_norm(torch.zeros(2, 3), torch.zeros(3), torch.zeros(3), torch.zeros(3)),
            "residual has shape",
        ),
        (
            lambda: add_layer_norm(torch.zeros(2, 3), torch.zeros(2, 3).int(), torch.zeros(3), torch.zeros(3)),
            "residual has dtype torch.int32",
        ),
        (
            lambda: add_layer_norm(torch.zeros(2, 3), None, torch.zeros(3).int(), torch.zeros(3)),
            "weight has dtype torch.int32",
        ),
        (lambda: gelu_linear(ROWS, torch.zeros(5, 4), None), r"hidden has shape .2, 3., expected .\.\.\., 4. as in"),
        (lambda: gelu_linear(ROWS.int(), torch.zeros(5, 3), None), "hidden has dtype torch.int32"),
        (lambda: gelu_linear(ROWS, torch.zeros(5, 3), torch.zeros(4)), "bias has shape .4., expected .5."),
        (
            lambda: gelu_linear(ROWS, torch.zeros(5, 3).double(), None),
            "weight has dtype torch.float64, expected torch",
        ),
        (lambda: gelu_linear(ROWS, torch.zeros(5, 3, device="meta"), None), "weight is on meta, expected cpu"),
        (
            lambda: norm_linear(ROWS, None, ROWS[0, :2], ROWS[0], ROWS, None),
            "norm_weight has shape .2., expected .3.",
        ),
        (
            lambda: norm_linear(ROWS, ROWS[:1], ROWS[0], ROWS[0], ROWS, None),
            "residual has shape .1, 3., expected .2, 3.",
        ),
        (lambda: norm_linear(ROWS, None, ROWS[0], ROWS[0], torch.zeros(5, 2), None), "x has shape"),
        (
            lambda: gelu_linear(ROWS, torch.zeros(5, 3), None, torch.zeros(5)),
            r"hidden_bias has shape .5., expected .3.",
        ),
        (lambda: gelu_linear(ROWS, torch.zeros(5, 3), None, ROWS[0].int()), "hidden_bias has dtype torch.int32"),
        (
            lambda: add_layer_norm(ROWS, ROWS, ROWS[0], ROWS[0], 1e-6, torch.zeros(2)),
            r"residual_bias has shape .2., expected .3.",
        ),
        (
            lambda: norm_linear(ROWS, None, ROWS[0], ROWS[0], torch.zeros(5, 3), None, 1e-6, ROWS[0]),
            "residual_bias is given without residual",
        ),
        (
            lambda: add_layer_norm(torch.zeros(()), None, ROWS[0], ROWS[0]),
            r"x has shape \[\], expected \[\.\.\., D\]",
        ),
        (lambda: patch_embed(None, WEIGHT), "volume is None, expected a Tensor"),
        (
            lambda: patch_embed(VOLUME.numpy(), WEIGHT),
            r"volume is a numpy.ndarray, expected a Tensor; torch.from_numpy",
        ),
        (lambda: patch_embed(VOLUME.to(torch.complex64), WEIGHT), "volume has dtype torch.complex64, expected a float"),
        (lambda: patch_embed(VOLUME, WEIGHT, [0.0] * 4), "bias is a list, expected a Tensor; torch.tensor converts it"),
        (lambda: patch_embed(VOLUME, WEIGHT, WEIGHT[:, 0, 0, 0, 0].double()), "bias has dtype torch.float64, expected"),
        (lambda: patch_embed(VOLUME, WEIGHT, None, IDS, IDS[0]), "position has shape"),
        (lambda: patch_embed(VOLUME, WEIGHT, None, 3), "ids is 3, expected a Tensor"),
        (
            lambda: patch_embed(VOLUME, WEIGHT, None, IDS.to_sparse()),
            "ids has layout torch.sparse_coo, expected torch.str",
        ),
        (lambda: patchify(VOLUME, 16), "patch is 16, expected three sizes"),
        (lambda: patchify(VOLUME, (16, 16)), "patch has 2 sizes, expected three"),
        (lambda: patchify(VOLUME, (3, 16.0, 16)), r"patch\[1\] is 16.0, expected a whole number"),
        (lambda: patch_l2_loss(torch.zeros(2, 3, 4), VOLUME, WEIGHT, None, None), "ids is None, expected a Tensor"),
        (lambda: masked_l2_loss(ROWS[None], ROWS[None], normalize=1), "normalize is 1, expected True or False"),
        (
            lambda: masked_l2_loss(ROWS[None], ROWS[None], None, ROWS[None, :, 0] * 1j),
            "weights has dtype torch.complex64",
        ),
        (lambda: decoder_tokens(torch.zeros(2, 2, 5), torch.zeros(5), IDS, IDS[0]), "position has shape"),
        (
            lambda: decoder_tokens(ROWS[None], ROWS[0].int(), IDS[:1], ROWS),
            "mask_token has dtype torch.int32, expected",
        ),
        (lambda: add_layer_norm(ROWS, None, ROWS[0], ROWS[0], True), "epsilon is True, expected a finite number >= 0"),
        (
            lambda: add_layer_norm(ROWS, None, ROWS[0], ROWS[0], float("nan")),
            "epsilon is nan, expected a finite number",
        ),
        (
            lambda: add_layer_norm(ROWS, None, ROWS[0].double(), ROWS[0]),
            "weight has dtype torch.float64, expected .* in x",
        ),
        (
            lambda: norm_linear(ROWS, ROWS.double(), ROWS[0].double(), ROWS[0].double(), ROWS, None),
            "weight has dtype torch.float32, expected torch.float64",
        ),
        (lambda: norm_linear(ROWS, None, None, ROWS[0], ROWS, None), "norm_weight is None, expected a Tensor"),
        (
            lambda: gelu_linear(ROWS, ROWS, ROWS[:, 0].bfloat16()),
            "bias has dtype torch.bfloat16, expected torch.float32",
        ),
        (lambda: patchify(VOLUME, (3, 0, 16)), r"patch\[1\] is 0, expected a whole number 1\.\."),
    ],
)
def test_a_wrong_argument_is_named_before_any_work(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": None}, "x is None, expected a Tensor"),
        ({"residual": [1.0]}, "residual is a list, expected a Tensor"),
        ({"residual_bias": torch.zeros(4)}, "residual_bias is given without residual"),
        ({"weights": None}, "weights is None, expected a BlockWeights"),
        ({"weights": tuple(BLOCK)}, "weights is a tuple, expected a BlockWeights"),
        ({"weights": BLOCK._replace(norm2_bias=None)}, "norm2_bias is None, expected a Tensor"),
        (
            {"weights": BLOCK._replace(qkv_weight=torch.zeros(12, 5))},
            r"qkv_weight has shape \[12, 5\], expected \[12, 4",
        ),
        ({"weights": BLOCK._replace(proj_bias=torch.zeros(4).double())}, "proj_bias has dtype torch.float64, expected"),
        ({"weights": BLOCK._replace(fc1_weight=BLOCK.fc1_weight.int())}, "fc1_weight has dtype torch.int32, expected"),
        (
            {"weights": BLOCK._replace(fc2_weight=torch.zeros(4, 7))},
            r"fc2_weight has shape \[4, 7\], expected \[4, 6\]",
        ),
        ({"heads": 3}, "heads is 3, expected a divisor of the width 4"),
        ({"heads": True}, "heads is True, expected a whole number"),
        ({"heads": 2.0}, r"heads is 2\.0, expected a whole number"),
        ({"ids": IDS[0]}, r"ids has shape \[3\], expected \[B, K\]"),
        ({"ids": IDS + 5}, r"ids contains 5, expected token numbers 0\.\.4"),
        ({"epsilon": "small"}, "epsilon is 'small', expected a finite number >= 0"),
        ({"attention": None}, "attention is None, must be one of auto"),
    ],
)
def test_a_wrong_argument_of_a_block_is_named_after_a_right_call_too(wrong, message):
    right = {"x": torch.zeros(2, 5, 4), "residual": None, "residual_bias": None, "weights": BLOCK, "heads": 2}
    transformer_block(**right)
    with pytest.raises(ValueError, match=message):
        transformer_block(**{**right, **wrong})


def test_tensors_of_no_data_are_given_their_shapes():
    meta = {name: torch.zeros(shape, device="meta") for name, shape in {"x": (2, 5, 4), "qkv": (2, 5, 3, 2, 4)}.items()}
    weights = BlockWeights(*(weight.to("meta") for weight in BLOCK))
    assert transformer_block(meta["x"], None, None, weights, 2)[1].shape == (2, 5, 4)
    assert attention(meta["qkv"]).shape == (2, 5, 2, 4)
    assert gelu_linear(meta["x"], weights.proj_weight, weights.proj_bias).shape == (2, 5, 4)
    with pytest.raises(ValueError, match="key_present is on cpu, expected meta"):
        attention(meta["qkv"], key_present=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="norm1_weight is on cpu, expected meta"):
        transformer_block(meta["x"], None, None, BLOCK, 2)


def test_debug_mode_finds_a_restore_that_is_no_permutation(monkeypatch):
    arguments = (torch.zeros(2, 2, 5), torch.zeros(5), IDS, torch.zeros(3, 5))
    decoder_tokens(*arguments)
    monkeypatch.setenv("MMMAE_DEBUG", "1")
    with pytest.raises(ValueError, match="ids_restore contains a number twice"):
        decoder_tokens(*arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        {0: lambda x: x.int()},
        {0: lambda x: x[..., :3]},
        {0: lambda x: x.sum()},
        {0: lambda x: x.tolist()},
        {0: lambda x: x.to_sparse()},
        {1: lambda residual: residual[:1]},
        {1: lambda residual: residual.bool()},
        {1: lambda residual: residual.to("meta")},
        {1: lambda residual: None},
        {2: lambda weight: weight[:3]},
        {2: lambda weight: weight.double()},
        {3: lambda bias: bias[None]},
        {3: lambda bias: None},
        {5: lambda residual_bias: residual_bias.to_sparse()},
    ],
)
def test_a_call_that_differs_in_one_argument_from_one_that_was_right_is_refused(wrong):
    """Norms are checked only once for each combination of shapes, dtypes and devices."""
    x, vector = torch.randn(2, 3, 4), torch.randn(4)
    right = [x, x, vector, vector, 1e-6, vector]
    add_layer_norm(*right)
    for place, change in wrong.items():
        right[place] = change(right[place])
    with pytest.raises(ValueError, match="expected"):
        add_layer_norm(*right)
