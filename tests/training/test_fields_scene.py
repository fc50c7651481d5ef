"""The generated scene of fields has the traits that make Indian Pines hard."""

import numpy as np
import pytest

from tests.training.fields_scene import BANDS, COUNTS, GROUPS, NOISY, SIZE, fields_scene


@pytest.fixture(scope="module")
def scene():
    return fields_scene()


def test_labels_are_as_few_and_as_unequal_as_there(scene):
    cube, labels = scene
    assert cube.shape == (BANDS, SIZE, SIZE)
    assert tuple(np.bincount(labels.ravel())[1:]) == COUNTS
    assert sum(COUNTS) == 10_249
    assert all(np.array_equal(first, second) for first, second in zip(scene, fields_scene(), strict=True))
    assert not np.array_equal(cube, fields_scene(seed=1)[0])


def test_bands_of_water_are_noise(scene):
    cube, _ = scene
    steps = np.abs(np.diff(cube.astype(float), axis=2)).mean((1, 2))
    clear = np.setdiff1d(range(BANDS), NOISY)
    assert steps[list(NOISY)].min() > 4 * np.median(steps[clear])


def test_classes_of_a_group_are_more_alike_than_they_vary(scene):
    cube, labels = scene
    clear = np.setdiff1d(range(BANDS), NOISY)
    spectra = {number: cube[clear][:, labels == number + 1].astype(float) for number in range(len(COUNTS))}
    means, spreads = ({n: f(s, axis=1) for n, s in spectra.items()} for f in (np.mean, np.std))
    apart = {
        (a, b): np.abs(means[a] - means[b]).mean()
        for a in means
        for b in means
        if a < b and GROUPS[a] == GROUPS[b] and min(COUNTS[a], COUNTS[b]) > 200
    }
    assert len(apart) >= 8
    assert all(distance < min(spreads[a].mean(), spreads[b].mean()) for (a, b), distance in apart.items())
