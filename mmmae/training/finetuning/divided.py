"""Labels that are divided into those that train and those that are held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ...data.subjects import Subjects
from ...data.tiles import Position
from .labels import UNLABELLED, Labels, scene_names, scene_targets
from .pixel_splits import GAP, NONE, TEST, TRAIN


@dataclasses.dataclass(frozen=True)
class Split:
    """The labels to train with and those to score with, which may be pixels of the same scenes.

    Attributes:
        training: labels of the subjects to train with; pixels of the other side are unlabelled.
        held_out: labels of the subjects to score.
        text: a phrase that tells people how they were divided.
        roles: scene -> uint8 `[H, W]`, the role of each pixel (`NONE`, `TRAIN`, `TEST`, `GAP`); empty if whole subjects
            are held out.
        neighbours: whether pixels of both sides lie next to each other.
    """

    training: Labels
    held_out: Labels
    text: str
    roles: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    neighbours: bool = False

    def pixels(self) -> dict[str, int]:
        """Return how many labelled pixels train, test, and are used by neither because they lie in the gap."""
        roles = {"training": TRAIN, "test": TEST, "gap": GAP}
        return {name: sum(int((scene == role).sum()) for scene in self.roles.values()) for name, role in roles.items()}


def divide_by_role(
    subjects: Subjects,
    labels: Labels,
    roles: Mapping[str, Tensor],
    text: str,
    window: int | None,
    *,
    apart: bool = False,
) -> Split:
    """Divide labels by the roles of pixels: scene -> uint8 `[H, W]`.

    Args:
        subjects, labels: the subjects and their labels.
        roles: of each pixel of each scene.
        text: a phrase on how roles were given, to which the numbers of pixels are added.
        window: the side of the square around each pixel that the model sees; None: it sees whole subjects.
        apart: no subject to train with may have a pixel to test with, where the model sees whole subjects.

    Raises:
        ValueError: no pixel is left to train or to test with.
    """
    training, held_out = (_of_role(subjects, labels, roles, role) for role in (TRAIN, TEST))
    if apart and window is None:
        training = training.only([index for index in training.counts if index not in held_out.counts])
    if not training.counts:
        reason = ""
        if apart and window is not None:
            reason = ": each window has a pixel to test with; expected larger blocks, or a smaller window (--window)"
        elif apart and subjects.positions:
            reason = (
                ": each tile has a pixel to test with; expected blocks that are multiples of the tiles' side, smaller "
                "tiles (--tile), or tiles with more overlap (--overlap)"
            )
        elif apart:
            reason = ": the model sees each scene whole, with a pixel to test with; cut scenes into tiles with --tile"
        raise ValueError(f"the split leaves no pixel to train with{reason}")
    if not held_out.counts:
        raise ValueError("the split leaves no pixel to test with")
    split = Split(training, held_out, text, roles)
    pixels = split.pixels()
    lost = f", {pixels['gap']:,} are lost in the gap between them" if apart else ""
    return dataclasses.replace(
        split, text=f"{text}: {pixels['training']:,} pixels train, {pixels['test']:,} test{lost}"
    )


def without_shared_pixels(subjects: Subjects, split: Split) -> Split:
    """Return a split of tiles in which pixels of tiles to test with are unlabelled in tiles to train with.

    It is the same if tiles of both sides share no labelled pixel. Tiles with one class each are kept; the text says how
    many overlap.

    Raises:
        ValueError: no pixel is left to train with.
    """
    if not subjects.positions:
        return split
    if split.training.task != "segmentation":
        places = [[subjects.positions[index] for index in side.counts] for side in (split.training, split.held_out)]
        both = sum(any(_overlap(place, other) for other in places[1]) for place in places[0])
        note = f"; {both} tiles that train overlap with tiles that are held out" if both else ""
        return dataclasses.replace(split, text=split.text + note)
    train, test = (scene_targets(subjects, side) for side in (split.training, split.held_out))
    shared = {scene: (train[scene] != UNLABELLED) & (test[scene] != UNLABELLED) for scene in train if scene in test}
    both = sum(int(pixels.sum()) for pixels in shared.values())
    if not both:
        return split
    roles: dict[str, Tensor] = {}
    for role, targets in ((TRAIN, train), (TEST, test)):
        for scene, target in targets.items():
            known = roles.setdefault(scene, torch.full(target.shape, NONE, dtype=torch.uint8))
            known[target != UNLABELLED] = role
    training = _of_role(subjects, split.training, roles, TRAIN)
    if not training.counts:
        raise ValueError(
            "tiles to test with show all pixels of those to train with; expected other scenes to train with"
        )
    text = f"{split.text}; {both:,} labelled pixels that tiles of both sides share do not train"
    return Split(training, split.held_out, text, roles)


def _overlap(place: Position, other: Position) -> bool:
    one, two = place.window, other.window
    return (
        place.scene == other.scene
        and one.row < two.row + two.height
        and two.row < one.row + one.height
        and one.column < two.column + two.width
        and two.column < one.column + one.width
    )


def _of_role(subjects: Subjects, labels: Labels, roles: Mapping[str, Tensor], role: int) -> Labels:
    """Return the labels of the pixels with a role, of the subjects that have any."""
    side, counts = _Side(subjects, labels, roles, role), {}
    for index in labels.counts:
        found = side(index)
        known = found[found != UNLABELLED]
        if len(known):
            counts[index] = torch.bincount(known, minlength=len(labels.classes))
    return Labels(labels.task, labels.classes, counts, side, labels.numbers)


class _Side:
    """Reads the targets of subjects with the labels of one role only."""

    def __init__(self, subjects: Subjects, labels: Labels, roles: Mapping[str, Tensor], role: int) -> None:
        self.labels, self.roles, self.role = labels, roles, role
        self.scenes, self.positions = scene_names(subjects), subjects.positions

    def __call__(self, index: int) -> Tensor:
        target, roles = self.labels.target(index), self.roles[self.scenes[index]]
        if self.positions:
            roles = roles[self.positions[index].window.slices]
        return target.masked_fill(roles != self.role, UNLABELLED)
