"""Windows around pixels: squares cut out of an image, which is reflected at its borders."""

import torch
from torch import Tensor


def reflect_windows(image: Tensor, rows: Tensor, columns: Tensor, window: int) -> Tensor:
    """Cut the square around each pixel out of an image.

    Beyond the border lies the reflection of the image, without repeating the pixels at the border, as in
    `numpy.pad(mode="reflect")`. It may be reflected several times.

    Args:
        image: `[..., H, W]`, such as a cube `[C, T, H, W]`.
        rows, columns: int64 `[N]`, places of the pixels.
        window: side of the squares, an odd number of pixels.

    Returns:
        `[N, ..., window, window]`; the pixel is at `[window // 2, window // 2]`.

    Raises:
        ValueError: the window is not an odd number of pixels.

    Example:
        >>> import torch
        >>> from mmmae.data.windows import reflect_windows
        >>> image = torch.arange(12).view(3, 4)
        >>> reflect_windows(image, torch.tensor([0]), torch.tensor([0]), 3)
        tensor([[[5, 4, 5],
                 [1, 0, 1],
                 [5, 4, 5]]])
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}, expected an odd number of pixels, so that one of them is the centre")
    height, width = image.shape[-2:]
    offsets = torch.arange(-(window // 2), window // 2 + 1, device=image.device)
    down = reflect(rows.to(image.device)[:, None] + offsets, height)  # [N, window]
    across = reflect(columns.to(image.device)[:, None] + offsets, width)
    cut = image[..., down[:, :, None], across[:, None, :]]  # [..., N, window, window]
    return cut.movedim(-3, 0)


def reflect(places: Tensor, length: int) -> Tensor:
    """Return the pixels of an axis of `length` that lie at `places`, which may be beyond its ends."""
    period = max(1, 2 * (length - 1))
    inside = places.remainder(period)
    return torch.minimum(inside, period - inside) if length > 1 else torch.zeros_like(places)
