"""One subject, a batch of subjects, and the function that stacks the one into the other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sample:
    """One subject.

    Attributes:
        name: the subject's name.
        hsi: `[1, T, H, W]` float32, normalised.
        aux: modality -> `[C, H, W]` float32, normalised; only for the modalities that the subject has.
        valid: `[H, W]` bool, False outside the measured area.
    """

    name: str
    hsi: Tensor
    aux: dict[str, Tensor]
    valid: Tensor


@dataclass
class Batch:
    """B subjects, in the shapes that the model expects.

    Attributes:
        names: the subjects' names.
        hsi: `[B, 1, T, H, W]`.
        aux: modality -> `[B, C, H, W]`, zeros for subjects without it; a modality that no subject has is left out.
        present: modality -> `[B]` bool, True for the subjects that have it; every modality of the data set.
        valid: `[B, H, W]` bool.
    """

    names: list[str]
    hsi: Tensor
    aux: dict[str, Tensor]
    present: dict[str, Tensor]
    valid: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy the batch to `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return Batch(
            self.names,
            move(self.hsi),
            {name: move(image) for name, image in self.aux.items()},
            {name: move(flags) for name, flags in self.present.items()},
            move(self.valid),
        )

    def pin_memory(self) -> "Batch":
        """Copy the batch to page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        return Batch(
            self.names,
            self.hsi.pin_memory(),
            {name: image.pin_memory() for name, image in self.aux.items()},
            {name: flags.pin_memory() for name, flags in self.present.items()},
            self.valid.pin_memory(),
        )


def collate(samples: Sequence[Sample], modalities: Iterable[str]) -> Batch:
    """Stack samples into a batch.

    Args:
        samples: at least one.
        modalities: the modalities to keep; images of others are dropped.

    Raises:
        ValueError: there is no sample, or the shapes of two samples differ; the message names both.

    Example:
        >>> from functools import partial
        >>> from torch.utils.data import DataLoader
        >>> from mmmae.data import collate
        >>> from mmmae.phantom import Phantom
        >>> data = Phantom(6, image_size=32, aux=["ir", "af"], missing=0.4)
        >>> loader = DataLoader(data, batch_size=3, collate_fn=partial(collate, modalities=data.modalities))
        >>> batch = next(iter(loader))
        >>> batch.hsi.shape, batch.aux["ir"].shape
        (torch.Size([3, 1, 12, 32, 32]), torch.Size([3, 1, 32, 32]))
        >>> batch.present["ir"]  # which of the three have an infrared image
        tensor([ True,  True, False])
    """
    if not samples:
        raise ValueError("no samples, expected at least one")
    hsi = _stack("hsi", [(sample.name, sample.hsi) for sample in samples])
    valid = _stack("valid", [(sample.name, sample.valid) for sample in samples])
    aux: dict[str, Tensor] = {}
    present: dict[str, Tensor] = {}
    for modality in modalities:
        present[modality] = torch.tensor([modality in sample.aux for sample in samples])
        images = [(sample.name, sample.aux[modality]) for sample in samples if modality in sample.aux]
        if images:
            stacked = _stack(modality, images)
            aux[modality] = stacked.new_zeros((len(samples), *stacked.shape[1:]))
            aux[modality][present[modality]] = stacked
    return Batch([sample.name for sample in samples], hsi, aux, present, valid)


def _stack(what: str, tensors: list[tuple[str, Tensor]]) -> Tensor:
    first_name, first = tensors[0]
    for name, tensor in tensors:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{what} of {name!r} has shape {list(tensor.shape)}, of {first_name!r} {list(first.shape)}; "
                "give the data set an image_size"
            )
    return torch.stack([tensor for _, tensor in tensors])
