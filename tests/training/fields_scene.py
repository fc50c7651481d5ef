"""A generated scene of Indian Pines' kind: fields of similar crops in 200 bands, with few labels of rare classes."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

SIZE, BANDS = 145, 200
COUNTS = (46, 1428, 830, 237, 483, 730, 28, 478, 20, 972, 2455, 593, 205, 1265, 386, 93)  # labelled pixels of a class
GROUPS = (3, 0, 0, 0, 2, 2, 2, 3, 3, 1, 1, 1, 3, 4, 4, 5)  # classes of one group have almost the same spectrum
NOISY = (*range(0, 3), *range(103, 110), *range(146, 156), *range(196, 200))  # water vapour and the ends of the sensor
TEXTURES = np.linspace(0.04, 0.12, len(COUNTS))  # spread of the cover within a field, by class


def fields_scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the cube `[200, 145, 145]`, int16, and the labels `[145, 145]`, uint8: 0 is no label, classes are 1..16.

    A pixel mixes the plants and the soil of its surroundings: the maps of both are blurred by the sensor, so that the
    borders of fields are mixed. Cover varies by field, and within a field smoothly and by rows; light varies slowly.
    """
    draw = np.random.default_rng(seed)
    fields = _fields(draw)
    owners, labels = _assign(fields, draw)
    plants, soil = _spectra(draw)
    cover = np.empty((SIZE, SIZE))
    tints = np.empty((SIZE, SIZE))
    smooth, rows = _noise(draw, 1.5), np.sin(np.arange(SIZE) * 2.1)[:, None]
    for (top, left, bottom, right), owner in zip(fields, owners, strict=True):
        window = slice(top, bottom), slice(left, right)
        level = draw.uniform(0.55, 0.8)
        cover[window] = level + TEXTURES[owner] * (1.5 * smooth[window] + 0.5 * rows[window[0]])
        tints[window] = draw.normal(0, 0.02)
    classes = np.empty((SIZE, SIZE), int)
    for (top, left, bottom, right), owner in zip(fields, owners, strict=True):
        classes[top:bottom, left:right] = owner
    cover = np.clip(cover, 0, 1)
    shares = np.stack([gaussian_filter(cover * (classes == number), 0.6) for number in range(len(COUNTS))])
    bare = np.clip(1 - shares.sum(0), 0, 1)
    light = 1 + tints + 0.06 * _noise(draw, 12) + 0.03 * _noise(draw, 0.7)
    cube = np.tensordot(plants, shares, (0, 0)) + soil[:, None, None] * bare
    cube = cube * light
    spread = np.full(BANDS, 0.02)
    spread[list(NOISY)] = 0.2
    cube += spread[:, None, None] * draw.standard_normal(cube.shape)
    return np.clip(np.round(1000 + 8000 * cube), 0, 32767).astype(np.int16), labels


def _fields(draw: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Return rectangles (top, left, bottom, right) that cover the scene."""
    whole, fields = [(0, 0, SIZE, SIZE)], []
    while whole:
        top, left, bottom, right = whole.pop()
        height, width = bottom - top, right - left
        if max(height, width) < 15 or (height * width < 500 and draw.random() < 0.5):
            fields.append((top, left, bottom, right))
        elif height >= width:
            cut = top + int(height * draw.uniform(0.35, 0.65))
            whole += [(top, left, cut, right), (cut, left, bottom, right)]
        else:
            cut = left + int(width * draw.uniform(0.35, 0.65))
            whole += [(top, left, bottom, cut), (top, cut, bottom, right)]
    return fields


def _assign(fields: list[tuple[int, int, int, int]], draw: np.random.Generator) -> tuple[list[int], np.ndarray]:
    """Return the class of each field, and labels inside the fields until each class has its number of them."""
    labels = np.zeros((SIZE, SIZE), np.uint8)
    left, owners = np.array(COUNTS), [int(draw.integers(len(COUNTS))) for _ in fields]
    order = draw.permutation(len(fields))
    for place in order:
        top, start, bottom, right = fields[place]
        inside = labels[top:bottom, start + 1 : right]  # a view
        owner = int(left.argmax())
        count = min(int(left[owner]), inside.size)
        if count == 0:
            continue
        owners[place] = owner
        flat = inside.reshape(-1).copy()
        flat[:count] = owner + 1
        labels[top:bottom, start + 1 : right] = flat.reshape(inside.shape)
        left[owner] -= count
    if left.any():
        raise ValueError(f"{left.sum()} labels do not fit into the fields")
    return owners, labels


def _spectra(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the spectra of the plants `[16, 200]`, alike within a group, and that of the soil `[200]`."""
    bands = np.linspace(0, 1, BANDS)
    leaf = 0.08 + 0.04 * np.exp(-(((bands - 0.08) / 0.03) ** 2)) + 0.4 / (1 + np.exp(-(bands - 0.16) / 0.012))
    leaf = leaf * (1 - 0.5 * bands) - 0.15 * np.exp(-(((bands - 0.5) / 0.04) ** 2))
    soil = 0.12 + 0.25 * bands**0.5

    def wave(scale: float, width: float) -> np.ndarray:
        smooth: np.ndarray = gaussian_filter(draw.standard_normal(BANDS), width)
        smooth *= scale * (2 * width * np.pi**0.5) ** 0.5
        return smooth

    groups = np.stack([leaf * draw.uniform(0.85, 1.15) + wave(0.02, 8) for _ in range(max(GROUPS) + 1)])
    return np.stack([groups[group] + wave(0.006, 5) for group in GROUPS]), soil


def _noise(draw: np.random.Generator, width: float) -> np.ndarray:
    """Return smooth noise `[145, 145]` of mean 0 and deviation 1."""
    noise: np.ndarray = gaussian_filter(draw.standard_normal((SIZE, SIZE)), width)
    noise -= noise.mean()
    noise /= noise.std()
    return noise
