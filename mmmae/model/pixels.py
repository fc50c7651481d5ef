"""Classification of the pixel at the centre of a window, by a segmentation of the window."""

from __future__ import annotations

from torch import Tensor

from .heads import SegmentationModel


class PixelClassifier(SegmentationModel):
    """An encoder with a head that classifies the pixel at the centre of each window.

    The window shows the neighbourhood of the pixel, and the head joins the features of its patches with the bands of
    the pixel itself. For the arguments see `SegmentationModel`.

    Example:
        >>> from mmmae.model.pixels import PixelClassifier
        >>> encoder = mmmae.HSIEncoder(mmmae.MMMAEConfig.preset("tiny", image_size=9, patch=(3, 3, 3), aux={}))
        >>> PixelClassifier(encoder, classes=5)(torch.randn(2, 1, 12, 9, 9)).shape
        torch.Size([2, 5])
    """

    def forward(self, hsi: Tensor) -> Tensor:
        """Classify the centres of windows `[B, C, T, H, W]`, resized to S = image_size; return `[B, classes]`.

        If S is even, the centre lies between four pixels, whose logits are averaged.
        """
        logits = super().forward(hsi)
        first, last = (self.encoder.config.image_size - 1) // 2, self.encoder.config.image_size // 2
        return logits[:, :, first : last + 1, first : last + 1].mean((2, 3))
