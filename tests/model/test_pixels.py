"""A classifier of pixels gives the logits of a segmentation at the centre, and comes back from its folder."""

import pytest
import torch

import mmmae
from mmmae.model.finetuned import build, load_finetuned, read_finetuned, save_finetuned
from mmmae.model.heads import SegmentationModel
from mmmae.model.pixels import PixelClassifier


@pytest.mark.parametrize("size", [9, 12])
def test_the_logits_are_those_at_the_centre_of_the_window(size):
    encoder = mmmae.HSIEncoder(mmmae.MMMAEConfig.preset("tiny", image_size=size, patch=(3, 3, 3), aux={}))
    model = build("pixels", encoder, 4).eval()
    hsi = torch.randn(2, 1, 12, 9, 9)
    with torch.no_grad():
        whole = SegmentationModel.forward(model, hsi)
        expected = whole[:, :, 4, 4] if size == 9 else whole[:, :, 5:7, 5:7].flatten(2).mean(2)
        torch.testing.assert_close(model(hsi), expected)


def test_a_saved_classifier_of_pixels_comes_back(tmp_path):
    encoder = mmmae.HSIEncoder(mmmae.MMMAEConfig.preset("tiny", image_size=9, patch=(3, 3, 3), aux={}))
    model = build("pixels", encoder, 3).eval()
    save_finetuned(tmp_path, model, ["a", "b", "c"], numbers=[1, 2, 5], window=9)
    found, classes = load_finetuned(tmp_path)
    assert isinstance(found, PixelClassifier)
    assert classes == ["a", "b", "c"]
    assert (read_finetuned(tmp_path).task, read_finetuned(tmp_path).window) == ("pixels", 9)
    hsi = torch.randn(2, 1, 12, 9, 9)
    with torch.no_grad():
        assert torch.equal(found(hsi), model(hsi))
