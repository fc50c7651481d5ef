"""The former name of `mmmae.training.finetuning.labels`."""

from ..training.finetuning.labels import Labels, read_class_labels, read_mask_labels, split

__all__ = ["Labels", "read_class_labels", "read_mask_labels", "split"]
