"""A branching tree of retinal vessels for generated subjects, drawn at any resolution."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

AVASCULAR_RADIUS = 0.11
SPACING = 0.75

STEPS = 64


class Vessels(NamedTuple):
    """One generation of N vessels; lengths are in half the shorter image side from the centre, and y points down.

    Attributes:
        points: `[N, STEPS, 2]` (x, y) along each vessel.
        radii: `[N, STEPS]`, 0 where the vessel has ended.
        vein: `[N]` bool, True for veins and False for arteries.
    """

    points: Array
    radii: Array
    vein: npt.NDArray[np.bool_]


def grow_vessels(rng: np.random.Generator, disc: Array, fovea: Array) -> list[Vessels]:
    """Draw trunks and three generations of branches, which leave the optic disc and avoid the fovea.

    Args:
        rng: the only source of randomness; the number of draws does not depend on a resolution.
        disc: (x, y) of the optic disc.
        fovea: (x, y) of the fovea; vessels end before they reach it.
    """
    generations = [_trunks(rng, disc, fovea)]
    for per_vessel, length, shrink in ((5, 0.55, 0.62), (3, 0.32, 0.6), (2, 0.16, 0.65)):
        generations.append(_branches(rng, generations[-1], per_vessel, length, shrink, disc))
    result = []
    for points, radii, vein in generations:
        distance = np.hypot(points[..., 0] - fovea[0], points[..., 1] - fovea[1])
        reached = np.minimum.accumulate(distance, axis=1) < AVASCULAR_RADIUS
        result.append(Vessels(points, np.where(reached, 0.0, radii), vein))
    return result


def draw_vessels(generations: list[Vessels], vein: bool, height: int, width: int) -> npt.NDArray[np.float32]:
    """Draw the veins or the arteries: return their coverage `[H, W]` in 0..1, with edges that are one pixel wide."""
    canvas = np.zeros(height * width, dtype=np.float32)
    scale = min(height, width) / 2
    for generation in generations:
        points, radii = generation.points[generation.vein == vein], generation.radii[generation.vein == vein]
        steps = np.hypot(*np.diff(points, axis=1).transpose(2, 0, 1))
        samples = max(2, int(np.ceil(steps.sum(1).max() * scale / SPACING)))
        position = np.linspace(0, STEPS - 1.001, samples)
        before, share = position.astype(np.int64), position % 1
        points = points[:, before] * (1 - share[:, None]) + points[:, before + 1] * share[:, None]
        radii = radii[:, before] * (1 - share) + radii[:, before + 1] * share
        drawn = radii > 0
        _stamp(canvas.reshape(height, width), points[drawn] * scale, (radii[drawn] * scale).astype(np.float32))
    return canvas.reshape(height, width)


def _stamp(canvas: npt.NDArray[np.float32], centres: Array, radius: npt.NDArray[np.float32]) -> None:
    """Draw discs of `radius [M]` at `centres [M, 2]`, in pixels from the middle, into the coverage `canvas`."""
    height, width = canvas.shape
    column, row = centres[:, 0] + (width - 1) / 2, centres[:, 1] + (height - 1) / 2
    nearest_column, nearest_row = np.rint(column).astype(np.int64), np.rint(row).astype(np.int64)
    reach = np.ceil(radius).astype(np.int64)
    for size in np.unique(reach):
        chosen = np.flatnonzero(
            (reach == size)
            & (nearest_column >= size) & (nearest_column < width - size)
            & (nearest_row >= size) & (nearest_row < height - size)
        )  # fmt: skip
        y, x = np.mgrid[-size : size + 1, -size : size + 1].reshape(2, -1, 1)
        dy = (y + (nearest_row - row)[chosen]).astype(np.float32)  # [window, M]
        dx = (x + (nearest_column - column)[chosen]).astype(np.float32)
        cover = np.clip(radius[chosen] + 0.5 - np.sqrt(dx * dx + dy * dy), 0, 1)
        cover *= np.minimum(1, 2 * radius[chosen])  # a vessel thinner than a pixel is faint
        index = (nearest_row * width + nearest_column)[chosen] + y * width + x
        seen = cover > 0
        np.maximum.at(canvas.reshape(-1), index[seen], cover[seen])


def _trunks(rng: np.random.Generator, disc: Array, fovea: Array) -> Vessels:
    temporal = np.sign(fovea[0] - disc[0])
    t = np.linspace(0, 1, STEPS)
    points, radii, vein = [], [], []
    for up in (-1, 1):
        for is_vein in (False, True):
            for toward_fovea in (True, False):
                spread, bend, start = rng.uniform(0.9, 1.1), rng.normal(0, 0.05), rng.normal(0, 0.02, 2)
                if toward_fovea:  # a parabola around the macula that closes again far behind it
                    along = temporal * 1.45 * t**1.3
                    across = up * (0.62 + 0.09 * is_vein) * spread * (np.sqrt(t) - 0.28 * t**2.5)
                else:
                    along = -temporal * (0.55 + 0.1 * is_vein) * t * spread
                    across = up * (0.85 + bend) * t**0.8 * (0.9 - 0.15 * is_vein)
                wiggle = _smooth(rng, 2, 0.018) * np.minimum(1, 6 * t)
                points.append(np.stack([disc[0] + start[0] + along, disc[1] + start[1] + across], -1) + wiggle.T)
                radii.append((0.0125 + 0.005 * is_vein) * (1 if toward_fovea else 0.75) * (1 - 0.6 * t) * spread)
                vein.append(is_vein)
    return Vessels(np.array(points), np.array(radii), np.array(vein))


def _branches(
    rng: np.random.Generator, parents: Vessels, per_vessel: int, length: float, shrink: float, disc: Array
) -> Vessels:
    count = len(parents.points) * per_vessel
    parent = np.repeat(np.arange(len(parents.points)), per_vessel)
    stratum = np.tile(np.arange(per_vessel), len(parents.points))
    start = ((0.12 + 0.83 * (stratum + rng.uniform(0, 1, count)) / per_vessel) * (STEPS - 2)).astype(np.int64)
    origin = parents.points[parent, start]
    forward = parents.points[parent, start + 1] - origin
    side = rng.choice([-1.0, 1.0], count)
    angle = np.arctan2(forward[:, 1], forward[:, 0]) + side * rng.uniform(0.45, 1.05, count)
    curvature = -side * rng.uniform(0.1, 0.9, count)  # branches bend back to their parent's course
    t = np.linspace(0, 1, STEPS)
    heading = angle[:, None] + curvature[:, None] * t + _smooth(rng, count, 0.35)
    step = length * rng.uniform(0.5, 1.2, (count, 1)) / STEPS
    path = np.stack([np.cumsum(np.cos(heading) * step, 1), np.cumsum(np.sin(heading) * step, 1)], axis=-1)
    radii = parents.radii[parent, start][:, None] * shrink * (1 - 0.65 * t) * rng.uniform(0.75, 1.1, (count, 1))
    radii[np.hypot(origin[:, 0] - disc[0], origin[:, 1] - disc[1]) < 0.17] = 0
    return Vessels(origin[:, None] + path, radii, parents.vein[parent])


def _smooth(rng: np.random.Generator, count: int, amplitude: float) -> Array:
    """Draw `[count, STEPS]` smooth random curves that start at 0, sums of three sine waves of falling amplitude."""
    t = np.linspace(0, 1, STEPS)
    waves = np.array([1.5, 3.5, 7.0])
    phase, strength = rng.uniform(0, 2 * np.pi, (count, 3, 1)), rng.normal(0, 1, (count, 3, 1)) / waves[:, None] ** 0.7
    curves = (strength * (np.sin(2 * np.pi * waves[:, None] * t + phase) - np.sin(phase))).sum(1)
    return np.asarray(amplitude * curves)
