"""The losses of a model: their parts, the tokens that count, and where no gradient flows."""

import pytest
import torch

from tests.model.test_model import BUILDERS, batch_of, build, changed_at


@pytest.fixture(params=BUILDERS, ids=["reference", "fast"])
def model(request):
    return build(request.param)


def test_the_reconstruction_target_gets_no_gradient(model):
    # With the decoder cut off, only a target with gradient could change the patch embedding.
    hsi, _ = batch_of(1)
    for name, parameter in model.named_parameters():
        if name.startswith("decoder_embed"):
            torch.nn.init.zeros_(parameter)
    output = model(hsi, seed=1)
    output.loss_reconstruction.backward()
    assert not model.patch_embed.proj.weight.grad.any()


def test_tokens_outside_valid_pixels_do_not_count(model):
    hsi, _ = batch_of(1)
    valid = torch.zeros(1, 224, 224, dtype=torch.bool)
    valid[:, :112] = True
    before = model(hsi, valid=valid, seed=1)
    hidden = before.mask.ids_masked[0]
    broken = changed_at(hidden[(hidden % 196) // 14 >= 7], hsi)
    after = model(broken, valid=valid, seed=1)
    assert after.loss_reconstruction.item() == pytest.approx(before.loss_reconstruction.item(), rel=1e-6)
    assert model(broken, seed=1).loss_reconstruction > 2 * before.loss_reconstruction


@pytest.mark.parametrize(("rows", "counts"), [(4, False), (5, True)])
def test_a_token_counts_from_three_tenths_of_valid_pixels(model, rows, counts):
    hsi, _ = batch_of(1)
    valid = torch.zeros(1, 224, 224, dtype=torch.bool)
    valid[:, ::16] = True
    for row in range(1, rows):
        valid[:, row::16] = True
    assert bool(model(hsi, valid=valid, seed=1).loss_reconstruction > 0) is counts


def test_no_valid_pixel_gives_no_loss_and_no_gradient(model):
    hsi, _ = batch_of(1)
    output = model(hsi, valid=torch.zeros(1, 224, 224, dtype=torch.bool), seed=1)
    output.loss.backward()
    assert output.loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_is_made_of_its_parts_and_infonce_is_what_it_says(symmetric):
    for builder in BUILDERS:
        model = build(builder, symmetric=symmetric, temperature=0.2, contrastive_weight=0.7)
        hsi, aux = batch_of(3)
        output = model(hsi, {"ir": aux["ir"]}, seed=3)
        query = model.contrastive_head(output.latent.mean(1))
        seen = []
        hook = model.aux_encoders.ir.register_forward_hook(lambda module, inputs, vector: seen.append(vector))  # noqa: B023
        model(hsi, {"ir": aux["ir"]}, seed=3)
        hook.remove()
        cosine = torch.nn.functional.cosine_similarity(query[:, None], seen[0][None], dim=-1)
        shares = (cosine / 0.2).exp()
        expected = -(shares.diag() / shares.sum(1)).log().mean()
        if symmetric:
            expected = (expected - (shares.diag() / shares.sum(0)).log().mean()) / 2
        assert output.loss_contrastive.item() == pytest.approx(expected.item(), rel=1e-5)
        total = output.loss_reconstruction.item() + 0.7 * expected.item()
        assert output.loss.item() == pytest.approx(total, rel=1e-5)
