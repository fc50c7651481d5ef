"""Each op on each backend that serves here, against a float64 expression written out by hand, forward and gradients."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import mmmae_kernels
from mmmae_kernels import (
    add_layer_norm,
    decoder_tokens,
    masked_l2_loss,
    norm_linear,
    patch_embed,
    patch_l2_loss,
    patchify,
    random_masking,
    use_backend,
)

BACKENDS = [name for name, answer in mmmae_kernels.explain("patch_embed").items() if answer == "serves"]
PATCHES = [(3, 16, 16), (1, 8, 8), (5, 7, 7), (4, 14, 14), (1, 1, 1)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_close(value, expected, tolerance=1e-5):
    """Compare the norm of the difference with the norm: float32 sums of some thousand products err below 1e-6 of it.

    Gradients that cancel to 0 are held to the rounding of the terms that cancel, which are of order 1 here.
    """
    assert value.shape == expected.shape
    value, expected = value.detach().double(), expected.detach().double()
    assert (value - expected).norm() <= tolerance * expected.norm() + 1e-6 * value.numel() ** 0.5


def gradients(output, inputs, seed=9):
    """Return gradients of a fixed random combination of the output, so that none is trivially zero."""
    weights = draw(*output.shape, seed=seed, dtype=torch.float64).to(output.dtype)
    return torch.autograd.grad((output * weights).sum(), inputs)


def slow_patches(volume, patch, ids):
    """Cut the patches one by one, in loops."""
    batch, _, *size = volume.shape
    counts = [whole // part for whole, part in zip(size, patch, strict=True)]
    rows = []
    for sample in range(batch):
        for number in ids[sample].tolist():
            t, h, w = number // (counts[1] * counts[2]), number // counts[2] % counts[1], number % counts[2]
            box = [slice(i * part, (i + 1) * part) for i, part in zip((t, h, w), patch, strict=True)]
            rows.append(volume[sample, :, box[0], box[1], box[2]].flatten())
    return torch.stack(rows).view(batch, ids.shape[1], -1)


@pytest.mark.parametrize(("patch", "channels"), list(itertools.product(PATCHES, (1, 3))), ids=str)
def test_patch_embed_and_its_gradients(backend, patch, channels):
    grid = (2, 3, 2)
    shape = [count * part for count, part in zip(grid, patch, strict=True)]
    volume = draw(2, channels, *shape).requires_grad_()
    weight = draw(10, channels, *patch, seed=1).requires_grad_()
    bias = draw(10, seed=2).requires_grad_()
    position = draw(12, 10, seed=3).requires_grad_()
    ids = torch.tensor([[11, 0, 5], [3, 3, 7]])
    inputs = (volume, weight, bias, position)
    embedded = patch_embed(volume, weight, bias, ids, position)

    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    rows = slow_patches(doubles[0], patch, ids)
    expected = rows @ doubles[1].flatten(1).T + doubles[2] + doubles[3][ids]
    assert_close(embedded, expected)
    for gradient, wanted in zip(gradients(embedded, inputs), gradients(expected, doubles), strict=True):
        assert_close(gradient, wanted)


def test_patch_embed_without_ids_embeds_all_in_order(backend):
    volume, weight = draw(2, 1, 6, 32, 48), draw(5, 1, 3, 16, 16, seed=1)
    convolved = F.conv3d(volume.double(), weight.double(), stride=(3, 16, 16)).flatten(2).transpose(1, 2)
    assert_close(patch_embed(volume, weight), convolved)


@pytest.mark.parametrize(
    "view",
    [
        lambda v: v.permute(0, 1, 2, 4, 3),
        lambda v: v[:, :, 1:7, 16:48, ::2],
        lambda v: v[:1].expand(2, -1, -1, -1, -1),
        lambda v: v.contiguous(memory_format=torch.channels_last_3d),
    ],
    ids=["transposed", "sliced", "expanded", "channels last"],
)
def test_patch_embed_takes_any_strides(backend, view):
    volume = view(draw(2, 2, 9, 64, 64))
    ids = torch.tensor([[0, 3], [2, 1]])
    if volume.shape[2] == 9:
        volume = volume[:, :, :6]
    weight = draw(4, 2, 3, 16, 16, seed=1)
    expected = slow_patches(volume.double(), (3, 16, 16), ids) @ weight.double().flatten(1).T
    assert_close(patch_embed(volume, weight, None, ids), expected)


def test_patch_embed_takes_strided_incoming_gradients(backend):
    volume, ids = draw(2, 1, 3, 32, 32), torch.tensor([[0, 3], [2, 1]])
    weight = draw(4, 1, 3, 16, 16, seed=1).requires_grad_()
    rows = slow_patches(volume, (3, 16, 16), ids)
    for reduce in (torch.sum, lambda x: torch.cat([x, x], dim=2)[:, :, 2:6].square().sum(), lambda x: x.mean()):
        (gradient,) = torch.autograd.grad(reduce(patch_embed(volume, weight, None, ids)), weight)
        (expected,) = torch.autograd.grad(reduce(rows @ weight.flatten(1).T), weight)
        assert_close(gradient, expected)


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("batch", [0, 2])
def test_patch_embed_of_nothing_and_of_all(backend, batch, count):
    volume = draw(batch, 1, 3, 32, 32)
    ids = torch.arange(count).expand(batch, count)
    weight = draw(4, 1, 3, 16, 16, seed=1).requires_grad_()
    embedded = patch_embed(volume, weight, None, ids)
    assert embedded.shape == (batch, count, 4)
    embedded.sum().backward()
    assert weight.grad is not None


def test_patchify_has_one_order_on_all_backends(backend):
    volume = draw(2, 2, 6, 16, 24)
    ids = torch.tensor([[0, 11, 5], [7, 1, 2]])
    assert torch.equal(patchify(volume, (3, 8, 8), ids), slow_patches(volume, (3, 8, 8), ids))
    every = torch.arange(12).expand(2, 12)
    assert torch.equal(patchify(volume, (3, 8, 8)), slow_patches(volume, (3, 8, 8), every))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_patch_l2_loss_is_the_loss_against_the_embedding(backend, normalize, weighted):
    volume, weight, bias = draw(2, 1, 3, 32, 32), draw(8, 1, 3, 16, 16, seed=1), draw(8, seed=2)
    weight.requires_grad_()
    ids = torch.tensor([[0, 3, 1], [2, 1, 0]])
    weights = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]) if weighted else None
    prediction = draw(2, 3, 8, seed=4).requires_grad_()
    loss = patch_l2_loss(prediction, volume, weight, bias, ids, weights, normalize=normalize)
    target = slow_patches(volume.double(), (3, 16, 16), ids) @ weight.double().flatten(1).T + bias.double()
    expected = plain_loss(prediction.double(), target.detach(), weights, normalize)
    assert_close(loss, expected)
    gradient, of_weight = torch.autograd.grad(loss, (prediction, weight), allow_unused=True)
    assert_close(gradient, torch.autograd.grad(expected, prediction)[0])
    assert of_weight is None


def plain_loss(prediction, target, weights, normalize):
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = ((prediction - target) ** 2).mean(-1)
    if weights is None:
        return error.mean()
    return (error * weights).sum() / weights.sum()


@pytest.mark.parametrize("normalize", [False, True])
def test_masked_l2_loss_gathers_its_target_by_id(normalize):
    target, ids = draw(2, 9, 7), random_masking(2, 9, 4, seed=1).ids_masked
    prediction = draw(2, 5, 7, seed=1).requires_grad_()
    loss = masked_l2_loss(prediction, target, ids, normalize=normalize)
    rows = torch.stack([sample[numbers] for sample, numbers in zip(target, ids, strict=True)]).double()
    expected = plain_loss(prediction.double(), rows, None, normalize)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, prediction)[0], torch.autograd.grad(expected, prediction)[0])


def test_masked_l2_loss_takes_a_mask_as_weights():
    prediction, target = draw(2, 9, 7), draw(2, 9, 7, seed=1)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    expected = (((prediction - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    assert_close(masked_l2_loss(prediction, target, weights=mask), expected)


@pytest.mark.parametrize("rows", [0, 3])
def test_weights_that_are_all_zero_give_zero_loss_and_gradients(rows):
    prediction = draw(2, rows, 7).requires_grad_()
    loss = masked_l2_loss(prediction, draw(2, rows, 7, seed=1), weights=torch.zeros(2, rows))
    loss.backward()
    assert loss.item() == 0
    assert not prediction.grad.any()


@pytest.mark.parametrize(("tokens", "keep"), [(9, 4), (1, 1), (5, 0), (5, 5)])
def test_decoder_tokens_puts_each_token_in_its_place(tokens, keep):
    mask = random_masking(2, tokens, keep, seed=2)
    visible, mask_token = draw(2, keep, 6).requires_grad_(), draw(6, seed=1).requires_grad_()
    position = draw(tokens, 6, seed=3).requires_grad_()
    sequence = decoder_tokens(visible, mask_token, mask.ids_restore, position)
    for sample, number in itertools.product(range(2), range(tokens)):
        kept = mask.ids_keep[sample].tolist()
        source = visible[sample, kept.index(number)] if number in kept else mask_token
        assert torch.equal(sequence[sample, number], source + position[number])
    grads = gradients(sequence, (visible, mask_token, position))
    weights = draw(*sequence.shape, seed=9, dtype=torch.float64)
    rows = torch.arange(2)[:, None]
    assert_close(grads[0], weights[rows, mask.ids_keep])
    assert_close(grads[1], weights[rows, mask.ids_masked].sum((0, 1)))
    assert_close(grads[2], weights.sum(0))


@pytest.mark.parametrize("width", [3, 64, 111])
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_layer_norm_adds_and_normalises(width, with_residual):
    x, residual = draw(2, 5, width).requires_grad_(), draw(2, 5, width, seed=1).requires_grad_()
    weight, bias = draw(width, seed=2).requires_grad_(), draw(width, seed=3).requires_grad_()
    inputs = (x, residual, weight, bias) if with_residual else (x, weight, bias)
    epsilon = 1e-2
    total, norm = add_layer_norm(x, residual if with_residual else None, weight, bias, epsilon)
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    whole = doubles[0] + doubles[1] if with_residual else doubles[0]
    centred = whole - whole.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * doubles[-2] + doubles[-1]
    assert_close(total, whole)
    assert_close(norm, expected)
    given = gradients(torch.cat([total, norm]), inputs)
    wanted = gradients(torch.cat([whole, expected]), doubles)
    for gradient, want in zip(given, wanted, strict=True):
        assert_close(gradient, want)


def test_a_sum_whose_norm_nobody_reads_gives_each_summand_its_gradient():
    x, residual, grad = draw(3, 2, 3, 8)
    shift, weight = draw(2, 8)
    summands = [tensor.requires_grad_() for tensor in (x, residual, shift)]
    norm = add_layer_norm(x, residual, weight, weight, 1e-6, shift)
    linear = norm_linear(x, residual, weight, weight, draw(5, 8), None, 1e-6, shift)
    for total, _ in (norm, linear):
        by_x, by_residual, by_shift = torch.autograd.grad(total, summands, grad)
        assert torch.equal(by_x, grad)
        assert torch.equal(by_residual, grad)
        torch.testing.assert_close(by_shift, grad.sum((0, 1)))


VOLUME, WEIGHT = torch.zeros(2, 1, 6, 32, 32), torch.zeros(4, 1, 3, 16, 16)


def test_an_unknown_backend_lists_the_known():
    with (
        pytest.raises(ValueError, match="kernels is 'cuda', must be one of auto, triton, native, eager"),
        use_backend("cuda"),
    ):
        pass


def test_a_forced_backend_that_cannot_serve_says_why():
    with use_backend("native"), pytest.raises(ValueError, match=r"'native' does not support this call: .*float64"):
        patch_embed(VOLUME.double(), WEIGHT.double())


def test_the_environment_chooses_a_backend_and_use_backend_overrides_it(monkeypatch):
    monkeypatch.setenv("MMMAE_KERNELS", "triton")
    with pytest.raises(ValueError, match="'triton' does not support"):
        patch_embed(VOLUME, WEIGHT)
    with use_backend("eager"):
        patch_embed(VOLUME, WEIGHT)
    monkeypatch.setenv("MMMAE_KERNELS", "tritn")
    with pytest.raises(ValueError, match="must be one of auto, triton, native, eager"):
        patch_embed(VOLUME, WEIGHT)


def test_explain_gives_a_reason_for_each_that_does_not_serve():
    answers = mmmae_kernels.explain("patch_embed", VOLUME.double(), WEIGHT.double())
    assert list(answers) == ["triton", "native", "eager"]
    assert answers["eager"] == "serves"
    assert "serves" != answers["native"] != ""
    with pytest.raises(ValueError, match="op is 'conv', must be one of"):
        mmmae_kernels.explain("conv")


def test_patch_embed_converts_the_volume_to_the_weights_type():
    volume, weight = draw(2, 1, 3, 16, 16), draw(4, 1, 3, 8, 8, seed=1)
    for dtype in (torch.bfloat16, torch.float64):
        embedded = patch_embed(volume, weight.to(dtype))
        assert embedded.dtype == dtype
        assert_close(embedded, patch_embed(volume, weight), 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_second_derivative_of_the_losses_is_refused(backend):
    prediction = draw(1, 2, 4).requires_grad_()
    for loss in (
        masked_l2_loss(prediction, draw(1, 2, 4, seed=1)),
        patch_l2_loss(prediction, VOLUME[:1], draw(4, 1, 3, 16, 16), None, torch.zeros(1, 2, dtype=torch.int64)),
    ):
        if backend == "eager":
            (gradient,) = torch.autograd.grad(loss, prediction, create_graph=True)
            assert torch.autograd.grad(gradient.sum(), prediction)[0].any()
        else:
            with pytest.raises(RuntimeError, match=r"can't be differentiated again; use_backend\('eager'\)"):
                torch.autograd.grad(loss, prediction, create_graph=True)


def test_precision_follows_either_of_torchs_settings(monkeypatch):
    pytest.importorskip("triton", reason="needs triton")
    from mmmae_kernels.patch_embed import tiles

    cpu = torch.device("cpu")
    for precision, products in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert tiles.precision_of(torch.float32, cpu) == products
        assert tiles.precision_of(torch.bfloat16, cpu) == "tf32"

    def refuse():
        raise RuntimeError("both settings were made")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    for setting, products in (("ieee", "tf32x3"), ("tf32", "tf32")):
        monkeypatch.setattr(tiles, "_newer_setting", lambda setting=setting: setting)
        assert tiles.precision_of(torch.float32, cpu) == products
