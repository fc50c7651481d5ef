"""Labels that are divided into those that train and those that are held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ...data.subjects import Subjects
from .labels import UNLABELLED, Labels, scene_names
from .pixel_splits import GAP, TEST, TRAIN


@dataclasses.dataclass(frozen=True)
class Split:
    """The labels to train with and those to score with, which may be pixels of the same scenes.

    Attributes:
        training: labels of the subjects to train with; pixels of the other side are unlabelled.
        held_out: labels of the subjects to score.
        text: a phrase that tells people how they were divided.
        roles: scene -> uint8 `[H, W]`, the role of each pixel (`NONE`, `TRAIN`, `TEST`, `GAP`); empty if whole subjects
            are held out.
    """

    training: Labels
    held_out: Labels
    text: str
    roles: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

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
    sides = {TRAIN: _Side(subjects, labels, roles, TRAIN), TEST: _Side(subjects, labels, roles, TEST)}
    counts: dict[int, dict[int, Tensor]] = {TRAIN: {}, TEST: {}}
    for index in labels.counts:
        for role, side in sides.items():
            found = side(index)
            if bool((found != UNLABELLED).any()):
                known = found[found != UNLABELLED]
                counts[role][index] = torch.bincount(known, minlength=len(labels.classes))
    if apart and window is None:
        counts[TRAIN] = {index: count for index, count in counts[TRAIN].items() if index not in counts[TEST]}
    for role, what in ((TRAIN, "train"), (TEST, "test")):
        if not counts[role]:
            raise ValueError(
                f"the split leaves no pixel to {what} with"
                + (
                    ": each subject or tile has a pixel to test with; expected blocks that are multiples of the tiles' "
                    "side, smaller tiles (--tile), or tiles with more overlap (--overlap)"
                    if apart and role == TRAIN
                    else ""
                )
            )
    made = {
        role: Labels(labels.task, labels.classes, counts[role], side, labels.numbers) for role, side in sides.items()
    }
    split = Split(made[TRAIN], made[TEST], text, roles)
    pixels = split.pixels()
    lost = f", {pixels['gap']:,} are lost in the gap between them" if apart else ""
    return dataclasses.replace(
        split, text=f"{text}: {pixels['training']:,} pixels train, {pixels['test']:,} test{lost}"
    )


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
