"""Generated subjects are reproducible one by one, have the requested shape, and their images show the same eye."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader

from mmmae.data import collate
from mmmae.phantom import Phantom
from mmmae.phantom.retina import _absorption, _Eye


def equal(a, b):
    return (
        a.name == b.name
        and torch.equal(a.hsi, b.hsi)
        and torch.equal(a.valid, b.valid)
        and a.aux.keys() == b.aux.keys()
        and all(torch.equal(a.aux[name], b.aux[name]) for name in a.aux)
    )


def test_workers_give_the_samples_of_the_main_process():
    data = Phantom(6, image_size=48, seed=3, missing=0.4)
    make = partial(DataLoader, data, batch_size=2, collate_fn=partial(collate, modalities=data.modalities))
    for alone, worked in zip(make(), make(num_workers=2), strict=True):
        assert alone.names == worked.names
        assert torch.equal(alone.hsi, worked.hsi)
        assert torch.equal(alone.valid, worked.valid)
        for name in data.modalities:
            assert torch.equal(alone.present[name], worked.present[name])
        for name, image in alone.aux.items():
            assert torch.equal(image, worked.aux[name])


def test_a_subject_depends_on_seed_and_index_alone():
    data = Phantom(4, image_size=32, seed=1)
    first = [data[index] for index in range(4)]
    np.random.seed(7)
    torch.manual_seed(7)
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    again = [Phantom(9, image_size=32, seed=1)[index] for index in (3, 2, 1, 0)]
    assert all(equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert (np.random.get_state()[1] == state).all()
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_seeds_and_indices_give_different_subjects():
    subjects = [Phantom(3, image_size=32, seed=seed, missing=0)[index] for seed in range(3) for index in range(3)]
    sums = {float(subject.hsi.sum()) for subject in subjects}
    assert len(sums) == 9


def test_the_choice_of_modalities_changes_nothing_else():
    every = Phantom(8, image_size=32, missing=0.5)
    some = Phantom(8, image_size=32, missing=0.5, aux=["thickness", "ir"])
    assert some.modalities == {"thickness": 1, "ir": 1}
    for a, b in zip(every, some, strict=True):
        assert torch.equal(a.hsi, b.hsi)
        assert set(b.aux) == set(a.aux) - {"af"}
        assert all(torch.equal(a.aux[name], b.aux[name]) for name in b.aux)


@pytest.mark.parametrize("image_size", [1, 7, 64, (20, 33), (33, 20)])
@pytest.mark.parametrize("bands", [1, 3, 12])
def test_any_size_and_number_of_bands(image_size, bands):
    data = Phantom(2, image_size, bands, missing=0)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    sample = data[-1]
    assert sample.name == data.names[1]
    assert sample.hsi.shape == (1, bands, *size)
    assert sample.valid.shape == size
    assert {name: image.shape for name, image in sample.aux.items()} == dict.fromkeys(data.modalities, (1, *size))
    for image in (sample.hsi, *sample.aux.values()):
        assert image.dtype == torch.float32
        assert torch.isfinite(image).all()
    assert len(data.wavelengths) == data.bands == bands
    assert float(data.wavelengths[0]) == 450
    assert bands == 1 or float(data.wavelengths[-1]) == 900


def test_values_are_about_minus_one_to_one_and_zero_outside_the_field():
    for sample in Phantom(6, image_size=96, seed=5, missing=0):
        assert 0.4 < sample.valid.float().mean() < 0.8
        corners = sample.valid[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert not corners.any()
        assert sample.hsi[0, :, ~sample.valid].abs().max() == 0
        inside = sample.hsi[0, :, sample.valid]
        assert inside.quantile(0.02) > -3
        assert inside.quantile(0.98) < 3
        assert 0.2 < inside.std() < 1.5


def test_the_share_of_missing_images_is_the_probability():
    # 3 x 100 draws at 0.3: a standard error of 0.027, and 4 of them allowed.
    data = Phantom(100, image_size=1, bands=1, missing=0.3)
    missing = 1 - np.mean([[name in sample.aux for name in data.modalities] for sample in data])
    assert abs(missing - 0.3) < 0.107
    assert all(sample.aux == {} for sample in Phantom(5, image_size=1, bands=1, missing=1.0))


def correlation(a, b, where):
    return float(np.corrcoef(a[where].numpy(), b[where].numpy())[0, 1])


@pytest.fixture(scope="module")
def eyes():
    """Five subjects of 128 x 128 and the maps that they were drawn from."""
    maps = [_Eye(np.random.default_rng([0, index, 0]), (128, 128)) for index in range(5)]
    return list(zip(Phantom(5, image_size=128, missing=0), maps, strict=True))


@pytest.mark.parametrize("modality", ["hsi", "ir", "af"])
def test_the_images_of_a_subject_show_its_own_vessels_and_no_others(eyes, modality):
    def darkness(vessels, image, field):
        """Return by how many standard deviations the image is darker along vessels than around them."""
        detail = image - avg_pool2d(image[None, None], 17, 1, 8)[0, 0]
        inside = avg_pool2d(field.float()[None, None], 25, 1, 12)[0, 0] > 0.99
        along = torch.from_numpy(vessels.artery + vessels.vein > 0.6) & inside
        shifts = [(dy, dx) for dy in (-2, -1, 0, 1, 2) for dx in (-2, -1, 0, 1, 2)]
        return -min(float(detail.roll(shift, (0, 1))[along].mean()) for shift in shifts) / float(detail[inside].std())

    images = [sample.hsi[0, 2] if modality == "hsi" else sample.aux[modality][0] for sample, _ in eyes]
    table = np.array(
        [
            [darkness(vessels, image, a.valid & b.valid) for image, (b, _) in zip(images, eyes, strict=True)]
            for a, vessels in eyes
        ]
    )
    assert table.diagonal().min() > 1.4, table.round(2)
    assert table[~np.eye(5, dtype=bool)].max() < 1.0, table.round(2)


def test_each_image_has_a_shift_of_its_own(eyes):
    for sample, _ in eyes:
        own = [image[0] != 0 for image in sample.aux.values()]
        assert all((field != sample.valid).any() for field in own)
        assert (own[0] != own[1]).any()
        assert (own[1] != own[2]).any()
        assert all((field != sample.valid).float().mean() < 0.04 for field in own)


def test_the_fovea_is_thin_dark_in_autofluorescence_and_ringed_by_thick_tissue(eyes):
    for sample, maps in eyes:
        distance = torch.from_numpy(
            np.sqrt(np.maximum(0, -2 * np.log(maps.xanthophyll / maps.xanthophyll.max() + 1e-9)))
        )
        fovea, ring = distance * 0.11 < 0.04, (distance * 0.11 - 0.24).abs() < 0.03
        thickness, fluorescence = sample.aux["thickness"][0], sample.aux["af"][0]
        assert thickness[fovea].mean() < thickness[ring].mean() - 0.5
        assert fluorescence[fovea].mean() < fluorescence[ring].mean() - 0.3


def test_a_scene_does_not_change_with_the_image_size():
    small, large = (Phantom(1, size, missing=0)[0] for size in (64, 128))
    pooled = avg_pool2d(large.hsi[0], 2)
    where = small.valid & (avg_pool2d(large.valid.float()[None], 2)[0] == 1)
    assert correlation(pooled[3], small.hsi[0, 3], where) > 0.9


def test_blood_absorbs_green_and_passes_infrared():
    nm = np.array([545.0, 575.0, 660.0, 850.0], dtype=np.float32)
    artery, vein = _absorption("artery", nm), _absorption("vein", nm)
    assert artery[:2].min() > 4 * artery[2:].max()
    assert vein[2] > artery[2]


def test_the_amounts_of_pigment_are_those_that_absorb_the_light():
    eye, amounts = _Eye(np.random.default_rng([3, 1, 0]), (20, 32)), Phantom(2, (20, 32), seed=3).pigments(-1)
    nm = np.array([400, 415, 430, 450], dtype=np.float32)  # at all of which fibres and deposits scatter alike
    depth = sum(2 * _absorption(name, nm)[:, None, None] * amount.numpy() for name, amount in amounts.items())
    np.testing.assert_allclose(
        np.diff(np.log(eye.reflectance(nm)), axis=0), -np.diff(depth, axis=0), rtol=1e-3, atol=1e-5
    )
    assert min(float(amount.max()) for amount in amounts.values()) > 0.05
    with pytest.raises(IndexError, match="index 2 is out of range for 2 subjects"):
        Phantom(2).pigments(2)


def test_it_says_that_it_is_generated():
    assert "generated" in repr(Phantom())
    assert "no measurements" in Phantom.__doc__
    assert len(Phantom()) == 64
    with pytest.raises(IndexError, match="index 64 is out of range for 64 subjects"):
        Phantom()[64]


@pytest.mark.parametrize(
    "arguments",
    [{"aux": ["oct"]}, {"image_size": 0}, {"bands": 0}, {"length": -1}, {"missing": 1.5}, {"seed": -1}],
)
def test_arguments_without_meaning_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        Phantom(**arguments)
