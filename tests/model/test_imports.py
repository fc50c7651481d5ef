"""Import of other networks' checkpoints: the encoder computes what the networks do, and names what it leaves out."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import mmmae
from mmmae.cli import main
from mmmae.model.imports import import_encoder
from mmmae.model.layouts import resample_bands
from tests import permissions

DIM, HEADS, DEPTH, BANDS, SIZE, PATCH = 32, 2, 2, 3, 16, 4
TOKENS = (SIZE // PATCH) ** 2


class Block(nn.Module):
    """A block of timm's ViT, by its description."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x, scale1=1, scale2=1):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, D / H]
        shares = torch.softmax(q @ k.mT * (DIM / HEADS) ** -0.5, dim=-1)
        x = x + scale1 * self.attn.proj((shares @ v).transpose(1, 2).flatten(2))
        return x + scale2 * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM, eps=1e-6)
        for parameter in self.parameters():  # norms and biases too must matter
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x, scales=((1, 1),) * DEPTH):
        for block, (scale1, scale2) in zip(self.blocks, scales, strict=True):
            x = block(x, scale1, scale2)
        return self.norm(x)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def stack():
    return Stack()


def convolution(bands=BANDS, size=PATCH):
    layer = nn.Conv2d(bands, DIM, size, size)
    return layer, {"patch_embed.proj.weight": layer.weight.detach(), "patch_embed.proj.bias": layer.bias.detach()}


def tokens(layer, image):
    return layer(image).flatten(2).transpose(1, 2)


def imported(tmp_path, weights, **options):
    torch.save({"model": weights}, tmp_path / "c.pth")
    return import_encoder(tmp_path / "c.pth", **{"heads": HEADS, **options})


def check_same(encoder, image, expected):
    with torch.no_grad():
        found = encoder(image[:, None])
    assert (found - expected).norm() < 1e-5 * expected.norm()  # float32, another order of summation


def check_all_listed(entries, weights):
    assert sum(entry.weights for entry in entries if entry.outcome != "missing") == len(weights)


@torch.no_grad()
def test_a_vit_of_mae_computes_the_same_without_its_class_token(stack, tmp_path):
    layer, weights = convolution()
    position = torch.randn(1, 1 + TOKENS, DIM)
    weights |= {**stack.state_dict(), "cls_token": torch.randn(1, 1, DIM), "pos_embed": position}
    weights |= {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 1 + TOKENS, 8)}
    image = torch.randn(2, BANDS, SIZE, SIZE)
    encoder, entries = imported(tmp_path, weights)
    check_same(encoder, image, stack(tokens(layer, image) + position[:, 1:]))
    assert (encoder.config.bands, encoder.config.patch) == (BANDS, (BANDS, PATCH, PATCH))
    assert encoder.config.mlp_ratio == 4
    check_all_listed(entries, weights)
    found = {entry.name: entry for entry in entries}
    assert "class token" in found["cls_token"].reason
    assert found["pos_embed"].reason == "into pos_embed_spatial; without 1 of a class or register token"
    assert found["decoder_pos_embed"][2:] == ("left out", "of the decoder")
    assert found["pos_embed_spectral"][2:] == ("missing", "set to 0")


@pytest.mark.parametrize("names", [("ls1.gamma", "ls2.gamma"), ("gamma_1", "gamma_2")], ids=["timm", "HyperSIGMA"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_factors_of_a_blocks_outputs_are_folded_into_its_layers(stack, tmp_path, names, bias):
    layer, weights = convolution()
    position = torch.randn(1, TOKENS, DIM)  # no rows of the five other tokens, as timm's no_embed_class
    weights |= {**stack.state_dict(), "pos_embed": position}
    weights |= {"cls_token": torch.randn(1, 1, DIM), "reg_token": torch.randn(1, 4, DIM)}
    if not bias:
        for block, row in enumerate(stack.blocks):
            row.attn.proj.bias.zero_()
            del weights[f"blocks.{block}.attn.proj.bias"]
    scales = torch.rand(DEPTH, 2, DIM)
    weights |= {f"blocks.{block}.{name}": scales[block, n] for block in range(DEPTH) for n, name in enumerate(names)}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "c.safetensors")
    encoder, entries = import_encoder(tmp_path / "c.safetensors", heads=HEADS)
    image = torch.randn(2, BANDS, SIZE, SIZE)
    check_same(encoder, image, stack(tokens(layer, image) + position, scales))
    check_all_listed(entries, weights)
    assert (f"blocks.*.{names[0]}", DEPTH, "adapted", "into attn.proj.weight; and its bias, as a factor") in entries


@torch.no_grad()
def test_positions_without_the_channels_that_encode_dates_are_filled_with_zeros(stack, tmp_path):
    layer, weights = convolution()
    position = torch.randn(1, 1 + TOKENS, DIM - 12)
    weights |= {**stack.state_dict(), "cls_token": torch.randn(1, 1, DIM), "pos_embed": position}
    image = torch.randn(2, BANDS, SIZE, SIZE)
    encoder, entries = imported(tmp_path, weights)
    check_same(encoder, image, stack(tokens(layer, image) + F.pad(position[:, 1:], (0, 12))))
    assert "0 in 12 channels, which encode dates" in {entry.name: entry for entry in entries}["pos_embed"].reason


@torch.no_grad()
def test_a_kernel_for_rgb_serves_cubes_of_any_band_count(stack, tmp_path):
    layer, weights = convolution()
    position = torch.randn(1, TOKENS, DIM)
    weights |= {**stack.state_dict(), "pos_embed": position}
    image = torch.randn(2, 4 * BANDS, SIZE, SIZE)
    encoder, _ = imported(tmp_path, weights, bands=4 * BANDS)  # a token for each three bands
    groups = torch.cat([tokens(layer, part) + position for part in image.split(BANDS, dim=1)], dim=1)
    check_same(encoder, image, stack(groups))
    encoder, entries = imported(tmp_path, weights, bands=4 * BANDS, patch_bands=4 * BANDS)  # one token for all
    means = image.unflatten(1, (BANDS, 4)).mean(dim=2)
    check_same(encoder, image, stack(tokens(layer, means) + position))
    assert ("patch_embed.proj.weight", 1, "adapted", "3 to 12 bands of a token") in entries


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 2), (3, 6), (4, 10), (5, 3), (1, 4)])
def test_a_resampled_kernel_answers_as_the_kernel_does_to_averages(old, new):
    kernel = torch.randn(5, 2, old, 3, 3, dtype=torch.float64)
    resampled = resample_bands(kernel, new)
    volume = torch.randn(2, new, 3, 3, dtype=torch.float64)
    averages = volume.repeat_interleave(old, dim=1).unflatten(1, (old, new)).mean(dim=2)
    torch.testing.assert_close(
        torch.einsum("dctyx,ctyx->d", resampled, volume), torch.einsum("dctyx,ctyx->d", kernel, averages)
    )
    torch.testing.assert_close(resampled.sum(dim=2), kernel.sum(dim=2))  # constant spectra


def satmae(stack, layers, channels=8):
    """Return the weights of a network with a kernel for each group of bands, and its position of each token."""
    position, channel = torch.randn(1, 1 + TOKENS, DIM - channels), torch.randn(1, len(layers), channels)
    weights = {**stack.state_dict(), "cls_token": torch.randn(1, 1, DIM), "pos_embed": position}
    weights |= {"channel_embed": channel, "channel_cls_embed": torch.zeros(1, 1, channels)}
    for group, layer in enumerate(layers):
        weights |= {f"patch_embed.{group}.proj.{name}": weight for name, weight in layer.state_dict().items()}
    tables = [torch.cat([position[0, 1:], row.expand(TOKENS, -1)], dim=1) for row in channel[0]]
    return weights, tables


@torch.no_grad()
def test_groups_of_bands_with_one_kernel_compute_the_same(stack, tmp_path):
    layers = [convolution(4)[0] for _ in range(3)]  # their biases are different
    for layer in layers[1:]:
        layer.weight.copy_(layers[0].weight)
    weights, tables = satmae(stack, layers)
    image = torch.randn(2, 12, SIZE, SIZE)
    groups = zip(layers, image.split(4, dim=1), tables, strict=True)
    encoder, entries = imported(tmp_path, weights)
    check_same(encoder, image, stack(torch.cat([tokens(layer, part) + table for layer, part, table in groups], dim=1)))
    check_all_listed(entries, weights)
    found = {entry.name: entry for entry in entries}
    assert found["patch_embed.*.proj.weight"][1:3] == (3, "adapted")
    assert found["channel_cls_embed"].outcome == "left out"


@torch.no_grad()
def test_groups_of_bands_with_kernels_of_their_own_share_the_mean(stack, tmp_path):
    layers = [convolution(bands)[0] for bands in (4, 4, 2)]
    encoder, _ = imported(tmp_path, satmae(stack, layers)[0])
    assert (encoder.config.bands, encoder.config.patch) == (12, (4, PATCH, PATCH))
    expected = layers[0].weight + layers[1].weight + layers[2].weight.repeat_interleave(2, dim=1) / 2
    torch.testing.assert_close(encoder.patch_embed.proj.weight, expected[:, None] / 3)


@torch.no_grad()
def test_a_network_whose_tokens_are_bands_has_patches_of_a_whole_image(stack, tmp_path):
    count, side = 5, 8
    layer, position = nn.Linear(side**2, DIM), torch.randn(1, count, DIM)
    weights = {**stack.state_dict(), "pos_embed": position, "l1.weight": torch.zeros(4, DIM)}
    weights |= {"spat_map.weight": layer.weight, "spat_map.bias": layer.bias}
    weights |= {f"blocks.0.attn.sampling_offsets.{name}": torch.zeros(16) for name in ("weight", "bias")}
    image = torch.randn(2, 3 * count, side, side)
    encoder, entries = imported(tmp_path, weights, bands=3 * count, patch_bands=3)
    pooled = nn.AdaptiveAvgPool1d(count)(image.flatten(2).transpose(1, 2)).transpose(1, 2)  # [B, count, pixels]
    check_same(encoder, image, stack(layer(pooled) + position))
    check_all_listed(entries, weights)
    reasons = {entry.name: entry.reason for entry in entries}
    assert reasons["blocks.*.attn.sampling_offsets.weight"].startswith("its blocks attend to sampled points")
    assert reasons["l1.weight"] == "of another task"


class Adapter(nn.Sequential):
    """The spectral adapter of SpectralEarth, by its description, with fewer features."""

    def __init__(self):
        layers = []
        for inner, outer, size, stride in ((1, 4, 7, 5), (4, 6, 7, 5), (6, 8, 5, 3)):
            convolution = nn.Conv3d(inner, outer, (size, 1, 1), (stride, 1, 1), (1, 0, 0))
            convolution.weight.data *= 10  # a spectrum of ones opens and closes ReLUs, and must not matter
            layers += [convolution, nn.BatchNorm3d(outer), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool3d((1, None, None)))
        for norm in (self[1], self[4], self[7]):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_()

    def forward(self, image):
        return super().forward(image[:, None]).squeeze(2)


@torch.no_grad()
def test_around_the_mean_spectrum_a_spectral_adapter_is_a_patch_kernel(stack, tmp_path):
    adapter = Adapter().eval()
    layer, weights = convolution(8)
    position = torch.randn(1, 1 + TOKENS, DIM)
    weights |= {**stack.state_dict(), "cls_token": torch.randn(1, 1, DIM), "pos_embed": position}
    weights = {f"vit_core.{name}": weight for name, weight in weights.items()}
    weights |= {f"spectral_adapter.{name}": weight for name, weight in adapter.state_dict().items()}
    encoder, entries = imported(tmp_path, weights, bands=90)
    assert encoder.config.patch == (90, PATCH, PATCH)
    check_all_listed(entries, weights)
    image = 1e-5 * torch.randn(2, 90, SIZE, SIZE)
    check_same(encoder, image, stack(tokens(layer, adapter(image)) + position[:, 1:]))
    with torch.enable_grad():  # in float32 the numbers above hide the derivative behind the features at zero
        slope = torch.autograd.functional.jacobian(
            lambda x: adapter(x[None, :, None, None])[0, :, 0, 0], torch.zeros(90)
        )
    expected = torch.einsum("dfyx,ft->dtyx", layer.weight, slope)
    torch.testing.assert_close(encoder.patch_embed.proj.weight[:, 0], expected)
    assert expected.abs().max() > 1e-3


def test_heads_of_large_vits_have_their_own_width(tmp_path):
    rows = {"norm1.weight": (1280,), "norm2.weight": (1280,), "attn.qkv.weight": (3 * 1280, 1280)}
    rows |= {"attn.proj.weight": (1280, 1280), "mlp.fc1.weight": (8, 1280), "mlp.fc2.weight": (1280, 8)}
    weights = {f"blocks.0.{name}": torch.zeros(shape) for name, shape in rows.items()}
    weights |= {"patch_embed.proj.weight": torch.zeros(1280, 3, 2, 2), "pos_embed": torch.zeros(1, 4, 1280)}
    encoder, _ = imported(tmp_path, weights, heads=None)
    assert encoder.config.heads == 16


def test_the_command_writes_a_folder_and_lists(stack, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    weights = {**convolution()[1], **stack.state_dict(), "cls_token": torch.zeros(1, 1, DIM)}
    weights["pos_embed"] = torch.randn(1, 1 + TOKENS, DIM)
    torch.save({"model": weights | {"blocks.0.attn.q_norm.weight": torch.ones(16)}}, tmp_path / "c.pth")
    options = ["--heads", str(HEADS), "--bands", "8", "--patch-bands", "4", "--image-size", "24"]
    assert main(["import", str(tmp_path / "c.pth"), "--out", str(tmp_path / "encoder"), *options]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "queries and keys are not normalised here",
        "3 to 4 bands of a token",
        "1 x 4 x 4 to 2 x 6 x 6 tokens",
        "wrote",
        "8 bands of 24 x 24 pixels in patches of 4 x 4 x 4",
    ):
        assert expected in printed
    encoder = mmmae.HSIEncoder.from_pretrained(tmp_path / "encoder")
    assert encoder(torch.zeros(1, 1, 8, 24, 24)).shape == (1, 72, DIM)


def vit(stack):
    return {**convolution()[1], **stack.state_dict(), "pos_embed": torch.zeros(1, TOKENS, DIM)}


def groups(stack):
    return satmae(stack, [convolution(4)[0], convolution(4)[0]])[0]


def spectral(stack):
    weights = {"spat_map.weight": torch.zeros(DIM, 64), "pos_embed": torch.zeros(1, 5, DIM)}
    return {**weights, **stack.state_dict()}


def adapted(stack):
    weights = {f"spectral_adapter.{name}": weight for name, weight in Adapter().state_dict().items()}
    return {**weights, **vit(stack), **convolution(8)[1]}


@pytest.mark.parametrize(
    ("make", "name", "value", "message"),
    [
        (vit, "pos_embed", None, r"not an encoder of a known layout: it holds .*, expected one of pos_embed_spatial"),
        (
            vit,
            "blocks.0.mlp.fc1.weight",
            None,
            "not an encoder of a ViT: it has no blocks.0.mlp.fc1",
        ),
        (vit, "blocks.1.attn.qkv.weight", None, "it has no blocks.1.attn.q.weight"),
        (vit, "pos_embed", torch.zeros(1, 15, DIM), "pos_embed has 15 rows, expected as many as patches of 4 x 4"),
        (vit, "pos_embed", torch.zeros(TOKENS, DIM), r"pos_embed has shape .16, 32., expected .1, tokens, 32."),
        (vit, "patch_embed.proj.weight", torch.zeros(DIM, 3, 1, 4, 4), "expected .D, bands, rows, columns"),
        (vit, "blocks.0.gamma_1", torch.zeros(5), r"blocks.0.gamma_1 has shape .5., expected .32."),
        (groups, "patch_embed.1.proj.weight", torch.zeros(DIM, 4, 8, 8), "expected one for each group of bands"),
        (groups, "patch_embed.1.proj.weight", None, "it has no patch_embed.1.proj.weight"),
        (groups, "channel_embed", torch.zeros(8), "its patch kernels are no weights"),
        (groups, "pos_embed", torch.zeros(1, 17, DIM), r"pos_embed has shape .1, 17, 32., expected .1, tokens, 24."),
        (spectral, "spat_map.weight", torch.zeros(DIM, 63), "expected .D, pixels of a square"),
        (spectral, "pos_embed", torch.zeros(1, 5, 8), r"expected .1, tokens, 32."),
        (adapted, "spectral_adapter.4.running_mean", None, "it has no spectral_adapter.4.running_mean"),
        (adapted, "spectral_adapter.3.weight", torch.zeros(6, 5, 7, 1, 1), "expected .features, 4, bands, 1, 1"),
        (adapted, "patch_embed.proj.weight", torch.zeros(DIM, 9, 4, 4), "has 9 channels, expected 8"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_weights_name(stack, tmp_path, make, name, value, message):
    weights = make(stack)
    weights.pop(name, None)
    weights |= {} if value is None else {name: value}
    with pytest.raises(ValueError, match=rf"c\.pth: .*{message}"):
        imported(tmp_path, weights)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (vit, {"patch_bands": 0}, "patch_bands is 0, expected a whole number >= 1"),
        (vit, {"patch_bands": 2}, "bands is 3, expected a multiple of the spectral patch 2"),
        (adapted, {"bands": 74}, "bands is 74, expected enough for the three convolutions"),
    ],
)
def test_options_that_do_not_fit_are_refused(stack, tmp_path, make, options, message):
    with pytest.raises(ValueError, match=message):
        imported(tmp_path, make(stack), **options)


def test_a_weight_saved_under_two_names_is_read_once(stack, tmp_path):
    weights = vit(stack)
    weights |= {f"spec_vit.vit_core.{name}": weight.clone() for name, weight in weights.items()}
    encoder, _ = imported(tmp_path, weights)
    assert encoder.config.depth == DEPTH
    weights["vit_core.norm.weight"] = torch.zeros(DIM)
    with pytest.raises(ValueError, match=r"two entries are named norm\.weight without their prefixes"):
        imported(tmp_path, weights)


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint.safetensors"])
def test_a_checkpoint_that_may_not_be_read_is_not_called_broken(tmp_path, name):
    path = tmp_path / name
    path.touch(0)
    with permissions.obeyed(), pytest.raises(PermissionError, match=name):
        import_encoder(path)


def test_the_names_of_weights_are_shown_as_they_are(stack, tmp_path, capsys):
    """Rich would take square brackets for markup, and terminals control characters for commands."""
    weights = {"pos_embed": torch.zeros(1, TOKENS, DIM), **stack.state_dict(), **convolution()[1]}
    weights |= {"head[/bold]": torch.zeros(1), "head\x1b[2J": torch.zeros(1)}
    torch.save(weights, tmp_path / "checkpoint.pth")
    command = ["import", str(tmp_path / "checkpoint.pth"), "--heads", str(HEADS), "--out", str(tmp_path / "encoder")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "head[/bold]" in shown
    assert "\x1b" not in shown
