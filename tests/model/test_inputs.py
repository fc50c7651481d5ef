"""Arguments that a model refuses: each raises a ValueError before any work, and never an internal error."""

import numpy
import pytest
import torch

import mmmae
from mmmae_kernels import TokenMask, dispatch, random_masking
from tests.model.test_model import batch_of

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hsi": HSI[0]}, r"hsi has shape \[1, 12, 224, 224\], expected \[B, C, T, H, W\]; .* needs hsi\[:, None\]"),
        ({"hsi": HSI.int()}, "hsi has dtype torch.int32"),
        ({"hsi": HSI.expand(2, 3, 12, 224, 224)}, r"hsi has 3 channels \(C\), expected in_channels = 1"),
        (
            {"hsi": HSI[:, :, :10]},
            r"hsi has 10 bands \(T\), expected bands = 12; 10 is not a multiple of the spectral patch 3",
        ),
        ({"hsi": HSI[:, :, :9]}, r"hsi has 9 bands \(T\), expected bands = 12$"),
        ({"hsi": HSI[:0]}, r"hsi has shape \[0, 1, 12, 224, 224\], expected no dimension of 0"),
        ({"aux": {"radar": IMAGE}}, "aux has an unknown modality 'radar', must be one of ir, af, thickness"),
        ({"present": {"radar": MASK}}, "present has an unknown modality 'radar'"),
        ({"aux": {"ir": IMAGE[0]}}, r"aux\['ir'\] has shape \[1, 8, 8\], expected \[B, C, H, W\]"),
        ({"aux": {"ir": IMAGE[:1]}}, r"aux\['ir'\] has shape \[1, 1, 8, 8\], expected \[2, 1, H, W\]"),
        (
            {"aux": {"ir": IMAGE}, "present": {"ir": torch.ones(3).bool()}},
            r"present\['ir'\] is .* of shape \[3\], expected .*\[2\]",
        ),
        ({"aux": {"ir": IMAGE}, "present": {"ir": torch.ones(2)}}, r"present\['ir'\] is a torch.float32 Tensor"),
        (
            {"present": {"ir": torch.ones(2).bool()}},
            r"present\['ir'\] is true for some samples, expected an image",
        ),
        ({"valid": torch.ones(2, 224, 224)}, "valid has dtype torch.float32, expected torch.bool"),
        ({"valid": torch.ones(2, 8, 8).bool()}, r"valid has shape \[2, 8, 8\], expected \[2, 224, 224\]"),
        ({"valid": torch.ones(2, 224, 224).bool().to("meta")}, "valid is on meta, expected cpu"),
        ({"aux": {"ir": IMAGE.to("meta")}}, r"aux\['ir'\] is on meta, expected cpu"),
        ({"mask": MASK._replace(ids_keep=MASK.ids_keep[:, :9])}, "mask has 9 visible and 588 masked tokens"),
        (
            {"mask": MASK._replace(ids_keep=MASK.ids_keep + 784)},
            r"mask.ids_keep contains \d+, expected token numbers 0..783",
        ),
        ({"mask": MASK._replace(ids_restore=MASK.ids_restore - 1)}, "mask.ids_restore contains -1"),
        ({"mask": TokenMask(*(ids[:1] for ids in MASK))}, r"mask.ids_keep has shape \[1, 196\]"),
        ({"seed": 2**70}, "seed is .*, expected a whole number"),
        ({"seed": 1.7}, "seed is 1.7, expected a whole number"),
        ({"mask": tuple(MASK)}, "mask is a tuple, expected a TokenMask"),
        (
            {"aux": {"ir": IMAGE}, "present": {"ir": [True, True]}},
            r"present\['ir'\] is a list, expected a torch.bool Tensor",
        ),
    ],
)
def test_a_bad_input_says_what_was_given_and_what_is_expected(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**{"hsi": HSI, **arguments})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_debug_mode_names_the_modality_and_sample_of_a_bad_number(model, monkeypatch, value):
    monkeypatch.setenv("MMMAE_DEBUG", "1")
    hsi, aux = batch_of(2)
    aux["af"][1, 0, 3, 3] = value
    with pytest.raises(ValueError, match=r"aux\['af'\] has NaN or infinity in sample 1 of the batch"):
        model(hsi, aux)
    model(hsi, aux, {"af": torch.tensor([True, False])})
    hsi[0, 0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="hsi has NaN or infinity in sample 0 of the batch"):
        model(hsi)
