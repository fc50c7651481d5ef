"""Arguments that a model refuses: each raises a ValueError before any work, and never an internal error."""

import numpy
import pytest
import torch

import mmmae
from mmmae_kernels import TokenMask, dispatch, random_masking

HSI, IMAGE = torch.zeros(2, 1, 12, 224, 224), torch.zeros(2, 1, 8, 8)
MASK = random_masking(2, 784, 196, seed=1)
HAS = torch.ones(2, dtype=torch.bool)


@pytest.fixture(scope="module", params=[mmmae.reference_model, mmmae.fast_model], ids=["reference", "fast"])
def model(request):
    torch.manual_seed(0)
    return request.param("tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hsi": None}, r"^hsi is None, expected a Tensor$"),
        ({"hsi": HSI.numpy()}, r"^hsi is a numpy\.ndarray, expected a Tensor; torch\.from_numpy converts it$"),
        ({"hsi": [1.0]}, r"^hsi is a list, expected a Tensor; torch\.tensor converts it$"),
        ({"hsi": "cube.npz"}, r"^hsi is 'cube\.npz', expected a Tensor$"),
        ({"hsi": HSI[:, 0]}, r"^hsi has shape \[2, 12, 224, 224\], expected \[B, C, T, H, W\]; .*hsi\[:, None\]$"),
        ({"hsi": HSI[0, 0]}, r"^hsi has shape \[12, 224, 224\], expected \[B, C, T, H, W\]$"),
        ({"hsi": HSI.short()}, r"^hsi has dtype torch\.int16, expected a floating point type$"),
        ({"hsi": HSI.to(torch.complex64)}, r"^hsi has dtype torch\.complex64"),
        ({"hsi": HSI[:1].to_sparse()}, r"^hsi has layout torch\.sparse_coo, expected torch\.strided"),
        ({"hsi": HSI.to("meta")}, r"^hsi is on meta, expected cpu like the model's parameters"),
        ({"aux": [IMAGE]}, r"^aux is a list, expected a dict of modality name to Tensor$"),
        ({"aux": IMAGE}, r"^aux is a torch\.float32 Tensor of shape \[2, 1, 8, 8\], expected a dict"),
        ({"aux": "ir"}, r"^aux is 'ir', expected a dict"),
        ({"aux": {"ir": IMAGE.numpy()}}, r"^aux\['ir'\] is a numpy\.ndarray, expected a Tensor; torch\.from_numpy"),
        ({"aux": {"ir": [IMAGE]}}, r"^aux\['ir'\] is a list, expected a Tensor"),
        ({"aux": {"ir": False}}, r"^aux\['ir'\] is False, expected a Tensor"),
        ({"aux": {"ir": IMAGE.byte()}}, r"^aux\['ir'\] has dtype torch\.uint8"),
        ({"aux": {1: IMAGE}}, r"^aux has an unknown modality 1"),
        ({"present": [True, True]}, r"^present is a list, expected a dict"),
        ({"present": HAS}, r"^present is a torch\.bool Tensor of shape \[2\], expected a dict"),
        ({"aux": {"ir": IMAGE}, "present": {"ir": None}}, r"^present\['ir'\] is None, expected a torch\.bool Tensor"),
        ({"aux": {"ir": IMAGE}, "present": {"ir": HAS.numpy()}}, r"^present\['ir'\] is a numpy\.ndarray, expected"),
        ({"aux": {"ir": IMAGE}, "present": {"ir": HAS.int()}}, r"^present\['ir'\] is a torch\.int32 Tensor"),
        ({"valid": HAS.numpy()}, r"^valid is a numpy\.ndarray, expected a Tensor"),
        ({"valid": True}, r"^valid is True, expected a Tensor"),
        ({"valid": torch.ones(2, 12, 224, 224).bool()}, r"^valid has shape \[2, 12, 224, 224\], expected"),
        ({"mask": MASK.ids_keep}, r"^mask is a torch\.int64 Tensor of shape \[2, 196\], expected a TokenMask"),
        ({"mask": 0.75}, r"^mask is 0\.75, expected a TokenMask"),
        ({"mask": MASK._replace(ids_masked=None)}, r"^mask\.ids_masked is None, expected a Tensor"),
        ({"mask": TokenMask(*(ids.numpy() for ids in MASK))}, r"^mask\.ids_keep is a numpy\.ndarray, expected"),
        ({"mask": MASK._replace(ids_keep=MASK.ids_keep[0])}, r"^mask\.ids_keep has shape \[196\], expected"),
        ({"mask": TokenMask(*(ids.int() for ids in MASK))}, r"^mask\.ids_keep has dtype torch\.int32, expected"),
        ({"seed": "1"}, r"^seed is '1', expected a whole number"),
        ({"seed": True}, r"^seed is True, expected a whole number"),
        ({"seed": 1.0}, r"^seed is 1\.0, expected a whole number"),
        ({"seed": numpy.zeros(2)}, r"^seed is a numpy\.ndarray, expected a whole number"),
        ({"seed": torch.tensor(1.5)}, r"^seed is a torch\.float32 Tensor of shape \[\], expected"),
        ({"seed": "1", "mask": MASK}, r"^seed is '1', expected a whole number"),
    ],
)
def test_what_is_no_argument_is_named_with_what_is_expected(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**{"hsi": HSI, **arguments})


@pytest.mark.parametrize("hsi", [None, HSI.numpy(), HSI[:, 0], HSI.int(), HSI.to("meta")])
def test_an_encoder_names_its_argument_too(model, hsi):
    with pytest.raises(ValueError, match=r"^hsi .*expected"):
        model.hsi_encoder()(hsi)


def test_numbers_of_numpy_and_tensors_are_seeds(model):
    expected = model(HSI, seed=3).mask
    for seed in (numpy.int64(3), numpy.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)):
        assert torch.equal(model(HSI, seed=seed).mask.ids_restore, expected.ids_restore)


def test_debug_mode_changes_neither_training_nor_the_counts_of_a_profile(monkeypatch):
    found = {}
    for debug in ("0", "1"):
        monkeypatch.setenv("MMMAE_DEBUG", debug)
        assert dispatch.in_debug_mode() == (debug == "1")
        torch.manual_seed(0)
        model = mmmae.fast_model("tiny", image_size=32, patch=(3, 8, 8), aux_patch=16)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        step = mmmae.TrainingStep(model, optimizer)
        for number in range(2):
            step(torch.randn(2, 1, 12, 32, 32, generator=torch.Generator().manual_seed(number)))
        losses = [figures.loss for figures in step.read()]
        found[debug] = losses, mmmae.profile(model.config).to_json()
    assert found["1"] == found["0"]
