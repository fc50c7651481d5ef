"""The former name of `mmmae.training.finetuning.labels` and `splits`."""

from collections.abc import Sequence

from ..data.subjects import Subjects
from ..training.finetuning.labels import Labels, read_class_labels, read_mask_labels
from ..training.finetuning.splits import divide

__all__ = ["Labels", "read_class_labels", "read_mask_labels", "split"]


def split(
    subjects: Subjects, labels: Labels, validation: Sequence[str] | float, seed: int
) -> tuple[list[int], list[int]]:
    """Return the numbers of the subjects to train with and those held out; see `divide`, which replaces it."""
    parts = divide(subjects, labels, "subjects", validation=validation, seed=seed)
    return list(parts.training.counts), list(parts.held_out.counts)
