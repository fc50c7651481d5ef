"""Windows around pixels are those of an image that is reflected at its borders."""

import numpy as np
import pytest
import torch

from mmmae.data.windows import reflect_windows


@pytest.mark.parametrize("window", [1, 3, 11])
@pytest.mark.parametrize("size", [(7, 13), (2, 3), (1, 5)], ids=str)  # smaller than the window: reflected repeatedly
def test_windows_are_those_of_the_reflected_image(size, window):
    image = torch.arange(2 * 3 * size[0] * size[1]).view(2, 3, *size)
    rows, columns = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1])).unbind(1)
    found = reflect_windows(image, rows, columns, window)
    margin = window // 2
    padded = np.pad(image.numpy(), [(0, 0), (0, 0), (margin, margin), (margin, margin)], mode="reflect")
    assert found.shape == (size[0] * size[1], 2, 3, window, window)
    for cut, row, column in zip(found, rows.tolist(), columns.tolist(), strict=True):
        np.testing.assert_array_equal(cut, padded[..., row : row + window, column : column + window])
        assert torch.equal(cut[..., margin, margin], image[..., row, column])


def test_a_window_without_a_centre_is_refused():
    with pytest.raises(ValueError, match="window is 8, expected an odd number"):
        reflect_windows(torch.zeros(9, 9), torch.tensor([0]), torch.tensor([0]), 8)
