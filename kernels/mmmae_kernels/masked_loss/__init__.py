"""Mean squared error of masked tokens."""

from .op import masked_l2_loss, patch_l2_loss

__all__ = ["masked_l2_loss", "patch_l2_loss"]
