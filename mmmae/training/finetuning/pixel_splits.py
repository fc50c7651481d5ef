"""The role of each labelled pixel of scenes: pixels drawn class by class, or blocks with a gap around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .labels import UNLABELLED

NONE, TRAIN, TEST, GAP = range(4)  # roles of pixels; GAP: labelled, but too close to a test pixel to train with
DRAWS = 20  # of blocks, of which the best is taken


def draw_pixels(targets: Mapping[str, Tensor], classes: int, share: float, seed: int) -> dict[str, Tensor]:
    """Draw the pixels that train, class by class; all others test.

    At least one pixel of each class trains, and at least one tests if the class has two.

    Args:
        targets: scene -> int64 `[H, W]`, `UNLABELLED` where there is no label.
        classes: number of classes.
        share: of each class's pixels that trains.
        seed: seed of the draw.

    Returns:
        scene -> uint8 `[H, W]`, the roles.
    """
    flat = torch.cat([target.flatten() for target in targets.values()])
    roles = torch.full_like(flat, NONE, dtype=torch.uint8)
    generator = np.random.default_rng(seed)
    for number in range(classes):
        places = (flat == number).nonzero()[:, 0]
        places = places[torch.from_numpy(generator.permutation(len(places)))]
        count = min(max(1, round(share * len(places))), max(1, len(places) - 1))
        roles[places[:count]], roles[places[count:]] = TRAIN, TEST
    parts = torch.split(roles, [target.numel() for target in targets.values()])
    return {scene: part.view(target.shape) for (scene, target), part in zip(targets.items(), parts, strict=True)}


def draw_blocks(
    targets: Mapping[str, Tensor],
    classes: int,
    side: int,
    held: float | tuple[int, int],
    seed: int,
    windows: Mapping[str, Sequence[tuple[slice, slice]]] | int,
) -> tuple[dict[str, Tensor], str]:
    """Draw square blocks whose pixels test; a pixel trains if a window without test pixels shows it to the model.

    Of 20 draws the one is taken in which most classes both train and test; of several, the one that comes closest to
    training with half of each class's pixels and testing with a tenth of them, and then the one in which most train.

    Args:
        targets: scene -> int64 `[H, W]`, `UNLABELLED` where there is no label.
        classes: number of classes.
        side: side of a block in pixels.
        held: the share of the blocks with labels to hold out, or (K, N) for the K-th of N parts of them, K from 1.
        seed: seed of the draws.
        windows: scene -> what the model sees at a time, as slices of rows and columns; or the side of the square around
            each pixel.

    Returns:
        scene -> uint8 `[H, W]`, the roles; and a phrase that tells people what was held out.

    Raises:
        ValueError: there are fewer blocks with labels than two, or than parts.
    """
    blocks, known = _number_blocks(targets, side)
    least = held[1] if isinstance(held, tuple) else 2
    if len(known) < least:
        smaller = side // 2
        while smaller and len(_number_blocks(targets, smaller)[1]) < least:
            smaller //= 2
        raise ValueError(
            f"{len(known)} blocks of {side} x {side} pixels have labels, expected at least {least}; "
            + (f"give smaller blocks, as in --split blocks:{smaller}" if smaller else "there are too few labels")
        )
    count = max(int(numbers.max()) for numbers in blocks.values()) + 1

    def roles_of(chosen: np.ndarray) -> dict[str, Tensor]:
        is_chosen = torch.zeros(count, dtype=torch.bool)
        is_chosen[torch.from_numpy(chosen)] = True
        roles = {}
        for scene, target in targets.items():
            role = torch.where(is_chosen[blocks[scene]], TEST, TRAIN).to(torch.uint8)
            role[target == UNLABELLED] = NONE
            roles[scene] = with_gap(role, windows if isinstance(windows, int) else windows[scene])
        return roles

    generator = np.random.default_rng(seed)
    if isinstance(held, tuple):
        part, parts = held
        chosen = generator.permutation(known)[part - 1 :: parts]
        best = roles_of(chosen)
    else:
        size = min(max(1, round(held * len(known))), len(known) - 1)
        chosen = generator.permutation(known)[:size]
        best = roles_of(chosen)
        for _ in range(DRAWS - 1 if len(known) > 2 else 0):
            other = generator.permutation(known)[:size]
            roles = roles_of(other)
            if _quality(targets, roles, classes) > _quality(targets, best, classes):
                chosen, best = other, roles
    return best, f"{len(chosen)} of {len(known)} blocks of {side} x {side} pixels are held out"


def _number_blocks(targets: Mapping[str, Tensor], side: int) -> tuple[dict[str, Tensor], np.ndarray]:
    """Return scene -> the number of each pixel's block `[H, W]`, and the ascending numbers of blocks with labels."""
    blocks, count = {}, 0
    for scene, target in targets.items():
        rows, columns = (torch.arange(length) // side for length in target.shape)
        across = int(columns[-1]) + 1
        blocks[scene] = count + rows[:, None] * across + columns
        count += (int(rows[-1]) + 1) * across
    known = torch.cat([blocks[scene][target != UNLABELLED] for scene, target in targets.items()])
    return blocks, np.unique(known.numpy())


def with_gap(roles: Tensor, windows: Sequence[tuple[slice, slice]] | int) -> Tensor:
    """Return the roles `[H, W]` of a scene, with `GAP` for pixels to train with that no window may show to the model.

    A window may be shown if it has no pixel to test with. Its pixels beyond the border of the scene are reflections of
    those inside, and so are in the window as well.

    Args:
        roles: uint8 `[H, W]`.
        windows: slices of rows and columns of each window, or the side of the square around each pixel.
    """
    height, width = roles.shape
    sums = torch.zeros(height + 1, width + 1, dtype=torch.int64)  # number of test pixels above and to the left
    sums[1:, 1:] = (roles == TEST).long().cumsum(0).cumsum(1)
    if isinstance(windows, int):
        radius = windows // 2
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        top, bottom = (rows - radius).clamp(min=0), (rows + radius + 1).clamp(max=height)
        left, right = (columns - radius).clamp(min=0), (columns + radius + 1).clamp(max=width)
        shown = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left] == 0
    else:
        shown = torch.zeros(height, width, dtype=torch.bool)
        for window in windows:
            (up, low, _), (start, stop, _) = window[0].indices(height), window[1].indices(width)
            tested = sums[low, stop] - sums[up, stop] - sums[low, start] + sums[up, start]
            if tested == 0:
                shown[window] = True
    return roles.masked_fill((roles == TRAIN) & ~shown, GAP)


def _quality(targets: Mapping[str, Tensor], roles: Mapping[str, Tensor], classes: int) -> tuple[int, float, int]:
    """Return how many classes both train and test, how well the classes are shared out, and how many pixels train.

    A class is shared out well if at least half of its labelled pixels train and a tenth test.
    """
    counts = torch.zeros(4, classes, dtype=torch.int64)  # by role
    for scene, target in targets.items():
        known = target != UNLABELLED
        places = roles[scene][known].long() * classes + target[known]
        counts += torch.bincount(places, minlength=counts.numel()).view_as(counts)
    train, test = counts[TRAIN], counts[TEST]
    whole = counts.sum(0).clamp(min=1).double()
    shares = (train / whole).clamp(max=0.5) + (test / whole).clamp(max=0.1)
    return int(((train > 0) & (test > 0)).sum()), float(shares.sum()), int(train.sum())
