"""Data sets of dicts as subjects: keys, missing images, masks, statistics."""

import numpy as np
import pytest
import torch

from mmmae.data import DictSubjects, Normalization


class Fields(torch.utils.data.Dataset):
    """Items as torchgeo's: image and mask tensors, other keys beside them."""

    def __init__(self, change=None):
        generator = np.random.default_rng(0)
        self.items = []
        for number in range(4):
            cube = torch.from_numpy(generator.normal(1000, 100, (6, 16, 16 + 4 * number)))
            item = {"image": cube, "inside": torch.ones(cube.shape[1:]), "crs": "EPSG:32632"}
            if number % 2:
                item["height"] = generator.normal(50, 5, (8, 8)).astype(np.float32)
            self.items.append(item)
        if change:
            change(self.items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


KEYS = {"aux": {"dem": "height"}, "mask": "inside", "image_size": 16}


def test_items_become_normalised_samples():
    data = DictSubjects(Fields(), **KEYS)
    assert (len(data), data.bands, data.modalities) == (4, 6, {"dem": 1})
    assert data.names == ["0", "1", "2", "3"]
    first, second = data[0], data[1]
    assert (first.aux, first.valid.all().item()) == ({}, True)
    assert second.hsi.shape == (1, 6, 16, 16)
    assert second.aux["dem"].shape == (1, 16, 16)
    expected = data.normalization.apply("hsi", data.dataset[0]["image"])
    torch.testing.assert_close(first.hsi[0], expected)
    low, middle, high = data.normalization.percentiles["hsi"][2]
    values = torch.cat([item["image"][2].flatten() for item in data.dataset.items]).numpy()
    assert [low, middle, high] == pytest.approx(np.percentile(values, (2, 50, 98)), rel=1e-6)


def test_what_was_not_measured_is_outside_and_not_in_the_statistics():
    def change(items):
        items[0]["image"][3, 2, 5] = torch.nan
        items[0]["image"][:, 8:] = 1e9
        items[0]["inside"][8:] = 0

    data = DictSubjects(Fields(change), **KEYS)
    sample = data[0]
    assert not sample.valid[2, 5]
    assert not sample.valid[8:].any()
    assert sample.valid.sum() == 8 * 16 - 1
    assert not sample.hsi[0, :, ~sample.valid].any()
    assert max(high for _, _, high in data.normalization.percentiles["hsi"]) < 2000


def test_statistics_are_kept_in_a_file_or_given(tmp_path):
    path = tmp_path / "normalization.json"
    data = DictSubjects(Fields(), **KEYS, normalization=path)
    assert data.normalization == Normalization.load(path)
    given = Normalization.identity({"hsi": 6, "dem": 1})
    torch.testing.assert_close(
        DictSubjects(Fields(), **KEYS, normalization=given)[0].hsi[0], Fields()[0]["image"].float()
    )


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda items: items.clear(), {}, "the data set is empty"),
        (None, {"image": "cube"}, "no item has 'cube', the key of modality 'hsi'"),
        (None, {"aux": {"hsi": "height"}}, '"hsi" is the name of the cubes'),
        (None, {"names": ["a", "b", "a", "c"]}, "names has 3 different names, expected one for each of 4"),
        (None, {"wavelengths": [500, 600]}, "wavelengths has 2 numbers, expected one for each of 6 bands"),
        (lambda items: items[0].update(image=torch.ones(4, 4)), {}, r"'image' of subject '0' has shape \[4, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, options, message):
    with pytest.raises(ValueError, match=message):
        DictSubjects(Fields(change), **options)


def test_an_item_that_differs_from_the_first_is_named():
    identity = Normalization.identity({"hsi": 6})
    data = DictSubjects(Fields(lambda items: items[2].update(image=torch.ones(5, 16, 16))), normalization=identity)
    with pytest.raises(ValueError, match=r"'image' of subject '2' has 5 bands, expected 6 as of the first"):
        data[2]
    data = DictSubjects(Fields(lambda items: items[3].pop("image")), normalization=identity)
    with pytest.raises(ValueError, match=r"subject '3' has no 'image', expected it in \['inside', 'crs', 'height'\]"):
        data[3]


def test_a_mask_that_is_missing_or_does_not_fit_is_named():
    def change(items):
        items[0]["inside"] = torch.ones(16, 16)[None]
        items[0]["inside"][0, 3] = 0
        items[1].pop("inside")
        items[2]["inside"] = torch.ones(16, 23)

    data = DictSubjects(Fields(change), mask="inside", normalization=Normalization.identity({"hsi": 6}))
    assert (~data[0].valid).nonzero().tolist() == [[3, column] for column in range(16)]
    with pytest.raises(ValueError, match=r"subject '1' has no mask 'inside', expected it in \['image', 'crs'"):
        data[1]
    with pytest.raises(ValueError, match=r"'inside' of subject '2' has shape \[16, 23\], expected \[16, 24\] or"):
        data[2]
