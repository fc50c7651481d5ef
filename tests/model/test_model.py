"""Properties of a model that do not depend on its weights: independence, presence, masks, messages for bad input."""

import pytest
import torch

import mmmae
from mmmae.model.inputs import decoded_ids
from mmmae.model.reference import ReferenceEncoder
from mmmae_kernels import TokenMask, random_masking

BUILDERS = [mmmae.reference_model, mmmae.fast_model]


def build(builder, **fields):
    torch.manual_seed(0)
    return builder("tiny", **fields)


def batch_of(size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hsi = torch.randn(size, 1, 12, 224, 224, generator=generator)
    aux = {name: torch.randn(size, 1, 64, 64, generator=generator) for name in ("ir", "af", "thickness")}
    return hsi, aux


@pytest.fixture(params=BUILDERS, ids=["reference", "fast"])
def model(request):
    return build(request.param)


def test_a_sample_does_not_depend_on_its_batch_mates(model):
    hsi, aux = batch_of(3)
    present = {"ir": torch.tensor([True, False, True]), "af": torch.tensor([False, False, True])}
    mask = random_masking(3, 784, 196, seed=2)
    whole = model(hsi, aux, present, mask=mask)
    for number in range(3):
        row = slice(number, number + 1)
        alone = model(
            hsi[row],
            {name: image[row] for name, image in aux.items()},
            {name: flags[row] for name, flags in present.items()},
            mask=TokenMask(*(ids[row] for ids in mask)),
        )
        for name in ("latent", "prediction"):
            given, expected = getattr(alone, name)[0], getattr(whole, name)[number]
            assert (given - expected).norm() < 1e-5 * expected.norm(), (name, number)


def test_features_of_the_encoder_do_not_depend_on_batch_mates(model):
    encoder = model.hsi_encoder()
    hsi, _ = batch_of(2)
    alone, together = encoder(hsi[1:]), encoder(hsi)[1:]
    assert (alone - together).norm() < 1e-5 * together.norm()


def test_what_stands_in_an_absent_image_is_never_looked_at(model):
    hsi, aux = batch_of(2)
    present = {"ir": torch.tensor([True, False])}
    results = []
    for filler in (0.0, 1e6, float("nan")):
        aux["ir"][1] = filler
        model.zero_grad()
        output = model(hsi, aux, present, seed=3)
        output.loss.backward()
        results.append((output.loss.item(), model.aux_encoders.ir.norm.weight.grad.clone()))
    for loss, gradient in results:
        assert loss == results[0][0]
        assert torch.equal(gradient, results[0][1])


def test_absent_images_equal_images_not_given(model):
    hsi, aux = batch_of(2)
    never = {name: torch.zeros(2, dtype=torch.bool) for name in aux}
    hidden, without = model(hsi, aux, never, seed=3), model(hsi, seed=3)
    assert torch.equal(hidden.latent, without.latent)
    assert hidden.loss_contrastive == without.loss_contrastive == 0


def test_images_guide_the_latent(model):
    hsi, aux = batch_of(1)
    guided, without = model(hsi, aux, seed=3), model(hsi, seed=3)
    assert (guided.latent - without.latent).norm() > 1e-3 * without.latent.norm()


def test_the_order_in_which_images_are_given_does_not_matter(model):
    hsi, aux = batch_of(2)
    backwards = dict(reversed(aux.items()))
    assert torch.equal(model(hsi, aux, seed=3).loss, model(hsi, backwards, seed=3).loss)


def test_the_seed_decides_the_mask_and_torch_decides_the_seed(model):
    hsi, _ = batch_of(2)
    first, again, other = (model(hsi, seed=seed).mask for seed in (5, 5, 6))
    assert torch.equal(first.ids_keep, again.ids_keep)
    assert not torch.equal(first.ids_keep, other.ids_keep)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model(hsi).mask.ids_keep)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_given_mask_is_used(model):
    hsi, _ = batch_of(2)
    mask = random_masking(2, 784, 50, seed=11)
    output = model(hsi, mask=mask)
    assert output.mask is mask
    assert output.latent.shape == (2, 50, 64)
    assert output.prediction.shape == (2, 734, 64)


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_share_of_a_given_masks_tokens_is_predicted(builder):
    model = build(builder, decode_fraction=0.25)
    hsi, _ = batch_of(2)
    mask = random_masking(2, 784, 50, seed=11)
    output = model(hsi, mask=mask)
    assert output.mask is mask
    assert output.prediction.shape == (2, 184, 64)  # round(734 / 4)
    few = random_masking(2, 784, 782, seed=11)
    with pytest.raises(ValueError, match=r"mask has 2 masked tokens, expected .* decode_fraction = 0\.25 to leave one"):
        model(hsi, mask=few)


@pytest.mark.parametrize("target", ["embedding", "pixels"])
@pytest.mark.parametrize("builder", BUILDERS)
def test_the_first_masked_tokens_are_predicted_and_the_rest_does_not_count(builder, target):
    model = build(builder, decode_fraction=0.5, target=target)
    hsi, _ = batch_of(1)
    before = model(hsi, seed=1)
    chosen, rest = before.mask.ids_masked[0].split(294)
    assert before.prediction.shape[1] == len(chosen) == len(rest) == 294
    without_rest = model(changed_at(rest, hsi), seed=1)
    assert torch.equal(without_rest.prediction, before.prediction)
    assert torch.equal(without_rest.loss, before.loss)
    one = model(changed_at(chosen[-1:], hsi), seed=1)
    assert torch.equal(one.prediction, before.prediction)
    assert one.loss_reconstruction > 1.1 * before.loss_reconstruction


def changed_at(tokens, hsi):
    """Return the volume of one sample with other pixels in some tokens."""
    changed = hsi.clone()
    for number in tokens.tolist():
        t, h, w = number // 196, number // 14 % 14, number % 14
        changed[0, 0, 3 * t : 3 * t + 3, 16 * h : 16 * h + 16, 16 * w : 16 * w + 16] = 100.0
    return changed


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_prediction_follows_the_order_of_the_mask(builder):
    model = build(builder, decode_fraction=0.5)
    hsi, _ = batch_of(1)
    mask = random_masking(1, 784, 196, seed=2)
    order = torch.cat([torch.arange(293, -1, -1), torch.arange(294, 588)])
    shuffled = torch.cat([mask.ids_keep, mask.ids_masked[:, order]], dim=1)
    other = TokenMask(mask.ids_keep, shuffled[:, 196:], shuffled.argsort(dim=1))
    given, expected = (model(hsi, mask=each).prediction for each in (other, mask))
    assert (given - expected.flip(1)).norm() < 1e-5 * expected.norm()


def test_each_token_is_as_often_predicted_as_any():
    config = mmmae.MMMAEConfig.preset("tiny", decode_fraction=0.5)
    ids = decoded_ids(config, random_masking(4000, 784, 196, seed=5))
    shares = ids.flatten().bincount(minlength=784) / 4000
    # Five deviations of sqrt(0.375 * 0.625 / 4000) around three eighths.
    assert (shares - 0.375).abs().max() < 0.039


@pytest.mark.parametrize(
    ("builder", "kernels"),
    [(mmmae.reference_model, {}), (mmmae.fast_model, {}), (mmmae.fast_model, {"kernels": "eager"})],
)
def test_recomputed_blocks_give_the_same_numbers(builder, kernels):
    hsi, aux = batch_of(2)
    outputs, models = [], []
    for recompute in (False, True):
        models.append(build(builder, activation_checkpointing=recompute, decoder_depth=2, **kernels))
        outputs.append(models[-1](hsi, aux, seed=3))
        outputs[-1].loss.backward()
    for name in ("loss", "prediction", "latent"):
        assert torch.equal(getattr(outputs[1], name), getattr(outputs[0], name)), name
    for (name, parameter), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if builder is mmmae.reference_model:
            assert torch.equal(other.grad, parameter.grad), name
        else:  # the gradient of a block's input is added up in another order: a few roundings of 2^-24
            assert (other.grad - parameter.grad).norm() <= 2e-6 * parameter.grad.norm(), name


def test_blocks_are_recomputed_in_training_alone_and_keep_their_input(model):
    builder = mmmae.reference_model if isinstance(model, mmmae.ReferenceModel) else mmmae.fast_model
    recomputing = build(builder, activation_checkpointing=True)
    hsi, _ = batch_of(1)
    for make in (lambda model: model, lambda model: model.hsi_encoder()):
        plain, lean = make(model), make(recomputing)
        assert saved_bytes(lean, hsi) < 0.8 * saved_bytes(plain, hsi)
        assert saved_bytes(lean.eval(), hsi) == saved_bytes(plain.eval(), hsi)
        plain.train(), lean.train()


def saved_bytes(model, hsi):
    """Return the bytes kept for backward, with those of parameters."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        model(hsi) if isinstance(model, (mmmae.HSIEncoder, ReferenceEncoder)) else model(hsi, seed=1)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_conditioning_dropout_acts_in_training_alone_and_leaves_the_contrast(model):
    builder = mmmae.reference_model if isinstance(model, mmmae.ReferenceModel) else mmmae.fast_model
    model = build(builder, conditioning_dropout=0.9999)
    hsi, aux = batch_of(2)
    trained = model(hsi, aux, seed=3)
    assert torch.equal(trained.latent, model(hsi, seed=3).latent)
    assert trained.loss_contrastive > 0
    model.eval()
    assert not torch.equal(model(hsi, aux, seed=3).latent, trained.latent)


def test_conditioning_dropout_drops_its_share():
    from mmmae.model.inputs import draw_conditioning

    config = mmmae.MMMAEConfig.preset("tiny", conditioning_dropout=0.25)
    presence = {name: torch.ones(4000, dtype=torch.bool) for name in config.aux}
    guides = draw_conditioning(config, presence, 7, training=True)
    # Five deviations of sqrt(0.25 * 0.75 / 4000) around three quarters.
    assert (guides.double().mean(0) - 0.75).abs().max() < 0.035
    part = draw_conditioning(config, {"thickness": presence["thickness"]}, 7, training=True)
    assert torch.equal(part[:, 0], guides[:, 2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_of_any_float_type_go_through_weights_of_another(model, dtype):
    hsi, aux = batch_of(2)
    expected = model(hsi, aux, seed=3).loss.item()
    given = model(hsi.to(dtype), {name: image.to(dtype) for name, image in aux.items()}, seed=3).loss.item()
    assert given == pytest.approx(expected, rel=1e-6 if dtype == torch.float64 else 2**-7)
    model.to(dtype)
    assert model(hsi, aux, seed=3).loss.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float64 else 0.1)
    assert model.hsi_encoder()(hsi).dtype == dtype


def test_autocast_keeps_to_the_error_of_the_reference_under_autocast():
    hsi, aux = batch_of(2)
    exact = build(mmmae.reference_model).double()(hsi.double(), aux, seed=3)
    errors = {}
    for builder in BUILDERS:
        with torch.autocast("cpu", torch.bfloat16):
            output = build(builder)(hsi, aux, seed=3)
        output.loss.backward()
        for name in ("latent", "prediction"):
            wanted = getattr(exact, name).detach()
            errors[builder, name] = (getattr(output, name).detach() - wanted).norm() / wanted.norm()
    for name in ("latent", "prediction"):
        assert errors[mmmae.fast_model, name] <= 2 * errors[mmmae.reference_model, name]


@pytest.mark.parametrize("cls", [mmmae.FastModel, mmmae.HSIEncoder])
def test_a_model_made_from_a_config_is_initialised(cls):
    torch.manual_seed(0)
    for name, parameter in cls(mmmae.MMMAEConfig.preset("tiny")).named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() <= 3, name
        assert parameter.any() or name.endswith("bias"), name


def test_first_weights_are_xavier_s_and_positions_small():
    torch.manual_seed(0)
    for name, parameter in mmmae.fast_model("tiny").named_parameters():
        spread, count = parameter.std().item(), parameter.numel()
        if "pos_embed" in name or name == "mask_token":
            # Five deviations of a standard deviation of so many normal numbers.
            assert spread == pytest.approx(0.02, rel=5 / (2 * count) ** 0.5), name
        elif parameter.dim() > 1:  # a patch embedding is a linear layer from the pixels of a patch
            outputs, inputs = parameter.flatten(1).shape
            bound = (6 / (inputs + outputs)) ** 0.5
            assert parameter.abs().max() <= bound, name
            assert spread == pytest.approx(bound / 3**0.5, rel=5 * (0.2 / count) ** 0.5), name  # the same, uniform
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name and "weight" in name))), name


def test_compile_hands_the_forward_pass_to_torch_compile(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    model = build(mmmae.fast_model, compile=True)
    assert compiled == [model]
    build(mmmae.fast_model)
    assert compiled == [model]


def test_fast_model_has_the_weights_of_the_reference_under_one_seed():
    reference, fast = build(mmmae.reference_model), build(mmmae.fast_model)
    for name, weight in reference.state_dict().items():
        assert torch.equal(fast.state_dict()[name], weight), name


def test_a_fast_model_of_a_model_shares_its_parameters():
    reference = build(mmmae.reference_model)
    fast = mmmae.fast_model(reference)
    assert all(a is b for a, b in zip(reference.parameters(), fast.parameters(), strict=True))


def test_state_dicts_fit_both_ways_and_a_third_model_refuses():
    reference, fast = build(mmmae.reference_model), build(mmmae.fast_model)
    fast.load_state_dict(reference.state_dict(), strict=True)
    reference.load_state_dict(fast.state_dict(), strict=True)
    with pytest.raises(RuntimeError):
        build(mmmae.fast_model, dim=32).load_state_dict(reference.state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmmae.fast_model("huge"), "preset is 'huge', must be one of base, vit, tiny"),
        (
            lambda: mmmae.fast_model("tiny", kernels="cuda"),
            "kernels is 'cuda', must be one of auto, triton, native, eager",
        ),
        (lambda: mmmae.fast_model("tiny", attention="flash9"), "attention is 'flash9', must be one of auto"),
        (lambda: mmmae.fast_model(torch.nn.Linear(2, 2)), "config is a Linear, expected .* a model of"),
        (
            lambda: mmmae.fast_model(build(mmmae.reference_model), depth=3),
            "depth can't be changed in an existing",
        ),
        (lambda: mmmae.fast_model("tiny", compile="fast"), "compile is 'fast', must be False, True or one of default"),
        (lambda: mmmae.fast_model(3), "config is 3, expected a config or a preset's name"),
        (
            lambda: mmmae.reference_model("tiny", attention="flash"),
            "attention is 'flash', must be one of eager, sdpa",
        ),
    ],
)
def test_a_model_that_cannot_be_made_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()
