"""Masks of whole spectra and of whole groups of bands: a model's config says what is masked together."""

import pytest
import torch

import mmmae
from mmmae.model.inputs import draw_mask

FIELDS = {"image_size": 64, "patch": (3, 16, 16)}  # 4 groups of 16 places


def drawn(masking, ratio=0.75, batch=8, seed=0):
    config = mmmae.MMMAEConfig.preset("tiny", **FIELDS, masking=masking, mask_ratio=ratio)
    return config, draw_mask(config, torch.zeros(batch, 1, 12, 64, 64), None, seed)


@pytest.mark.parametrize(("masking", "axis"), [("spectra", 0), ("bands", 1)])
@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.25])
def test_whole_spectra_or_groups_of_bands_are_masked(masking, axis, ratio):
    config, mask = drawn(masking, ratio)
    hidden = torch.zeros(8, 64, dtype=torch.bool).scatter(1, mask.ids_masked, True).unflatten(1, (4, 16))
    visible = torch.zeros(8, 64, dtype=torch.bool).scatter(1, mask.ids_keep, True).unflatten(1, (4, 16))
    assert torch.equal(hidden, ~visible)
    assert torch.equal(hidden.all(1 + axis), hidden.any(1 + axis))
    assert hidden.flatten(1).float().mean(1).tolist() == [ratio] * 8
    assert mask.ids_keep.shape[1] == config.keep
    assert len({tuple(row.tolist()) for row in hidden.flatten(1)}) > 1  # each sample has its own


@pytest.mark.parametrize("masking", ["spectra", "bands"])
def test_the_tables_of_such_a_mask_belong_together(masking):
    _, mask = drawn(masking)
    order = torch.cat([mask.ids_keep, mask.ids_masked], dim=1)
    assert torch.equal(order.gather(1, mask.ids_restore), torch.arange(64).expand(8, -1))


def test_a_sample_keeps_its_mask_in_another_batch():
    for masking in ("spectra", "bands"):
        assert torch.equal(drawn(masking, batch=3, seed=5)[1].ids_keep, drawn(masking, seed=5)[1].ids_keep[:3])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"masking": "band"}, "masking is 'band', expected 'tokens', 'spectra' or 'bands'"),
        ({"masking": "bands", "mask_ratio": 0.9}, "mask_ratio is 0.9, expected small enough to keep one of 4 groups"),
        ({"masking": "bands", "mask_ratio": 0.1}, "mask_ratio is 0.1, expected large enough to mask one of 4 groups"),
        ({"masking": "spectra", "mask_ratio": 0.99}, "mask_ratio is 0.99, expected small enough to keep one of 16 sp"),
    ],
)
def test_a_ratio_that_leaves_no_unit_is_refused(fields, expected):
    with pytest.raises(ValueError, match=expected):
        mmmae.MMMAEConfig.preset("tiny", **FIELDS, **fields)
