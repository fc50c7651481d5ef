"""`mmmae data check` names values that stand for nodata and are not declared, and is silent about clean files."""

import numpy as np
import pytest
import rasterio
import torch

from mmmae.data import Cube, PairedFolder, read_cube
from mmmae.data.check import Kind, check_files
from mmmae.data.fill_values import FillValues

SIZES = {"many bands": (6, 64, 64), "two bands": (2, 64, 64), "one band": (1, 64, 64)}


def check(folder, path, values, **options):
    np.save(path, values)
    _, findings = check_files(folder, **options)
    return [(finding.kind.value, finding.reason) for finding in findings]


def measured(rng, shape, dtype):
    """Return values of a reflectance, some hundred to some thousand, that vary from pixel to pixel and band to band."""
    values = rng.gamma(3, 500, (1, *shape[1:])) * rng.uniform(0.5, 1.5, (shape[0], 1, 1)) + rng.normal(800, 60, shape)
    return values.clip(200, 30000).astype(dtype)


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("share", [0.3, 0.02])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (-9999, "i2"), (-32768, "i2"), (0, "u2"), (0, "f4"), (65535, "u2"), (1e20, "f4"), (-3.4028235e38, "f4"),
        (-999, "f4"), (9.969209968386869e36, "f4"), (-9999, "f8"),
    ],
)  # fmt: skip
def test_a_fill_value_is_named_until_it_is_declared(tmp_path, shape, share, value, dtype):
    values = measured(np.random.default_rng(0), shape, dtype)
    values[:, : round(64 * share) or 1, :] = value
    ((kind, reason),) = check(tmp_path, tmp_path / "a.npy", values)
    assert kind == "undeclared-nodata"
    assert reason.startswith(f"{np.float32(value):.9g} in ")
    assert "--nodata" in reason
    assert check_files(tmp_path, reading={"hsi": {"nodata": value}}) == (1, [])
    cube = read_cube(tmp_path / "a.npy", nodata=value)
    assert cube.nodata[:, 0].all()
    assert cube.values.max() < 1e5


def test_a_value_declared_by_an_option_is_left_out_of_statistics(tmp_path):
    for name in "ab":
        values = measured(np.random.default_rng(ord(name)), (3, 64, 64), "i2")
        values[:, :20] = -9999
        np.save(tmp_path / f"{name}.npy", values)
    low = [
        PairedFolder(tmp_path, **options).normalization.percentiles["hsi"][0][0] for options in ({}, {"nodata": -9999})
    ]
    assert low[0] == -9999
    assert low[1] >= 200


def test_a_few_values_are_named_where_no_measurement_lies(tmp_path):
    values = measured(np.random.default_rng(0), (6, 300, 300), "i2")
    values[:, 7, 9] = -9999
    ((kind, reason),) = check(tmp_path, tmp_path / "a.npy", values)
    assert (kind, reason[:15]) == ("undeclared-nodata", "-9999 in 6 valu")


def test_two_values_are_both_named(tmp_path):
    values = measured(np.random.default_rng(0), (6, 64, 64), "i2")
    values[:, :9], values[:, -9:] = -9999, 0
    findings = check(tmp_path, tmp_path / "a.npy", values)
    assert sorted(reason.split(" in ")[0] for _, reason in findings) == ["-9999", "0"]


def test_a_value_in_whole_spectra_is_named_whatever_it_is(tmp_path):
    values = measured(np.random.default_rng(0), (6, 64, 64), "f4")
    values[:, 20:30, 20:30] = -1
    ((kind, reason),) = check(tmp_path, tmp_path / "a.npy", values)
    assert (kind, reason[:6]) == ("undeclared-nodata", "-1 in ")


def test_zeros_in_whole_spectra_are_named_where_values_begin_at_0(tmp_path):
    values = np.random.default_rng(0).uniform(0, 0.6, (6, 64, 64)).astype("f4")
    values[:, :20] = 0
    ((kind, reason),) = check(tmp_path, tmp_path / "a.npy", values)
    assert (kind, reason[:5]) == ("undeclared-nodata", "0 in ")


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_the_stored_value_is_named_and_not_the_scaled_one(tmp_path):
    values = measured(np.random.default_rng(0), (6, 64, 64), "i2")
    values[:, :20] = -9999
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", height=64, width=64, count=6, dtype="int16") as target:
        target.write(values)
        target.scales = [1e-4] * 6
    note, finding = check_files(tmp_path)[1]
    assert (note.kind, finding.kind) == (Kind.NOTE, Kind.UNDECLARED_NODATA)
    assert finding.reason.startswith("-9999 in 31.2% of the values")


def clean_images():
    """Yield images without fill values that have spikes, ends, zeros or few values."""
    rng = np.random.default_rng(0)
    yield "normal", rng.normal(0, 1, (4, 64, 64)).astype("f4")
    yield "uniform bytes", rng.integers(0, 256, (3, 64, 64)).astype("u1")
    yield "one band of bytes", rng.integers(0, 256, (64, 64)).astype("u1")
    yield "saturated", (rng.gamma(2, 90, (4, 64, 64))).clip(0, 255).astype("u1")
    yield "saturated in all bands", (rng.gamma(2, 20000, (1, 64, 64)) * rng.uniform(0.9, 1, (4, 1, 1))).clip(0, 65535)
    yield "shadows", rng.poisson(2, (6, 64, 64)).astype("u2")
    yield "a sea at height 0", rng.normal(0, 50, (64, 64)).clip(0).astype("f4")
    yield "clipped at 0", rng.normal(30, 30, (6, 64, 64)).clip(0).astype("f4")
    yield "decibel", rng.normal(-12, 3, (2, 64, 64)).astype("f4")
    yield "classes", rng.integers(0, 5, (64, 64)).astype("u1")
    yield "a mask", rng.integers(0, 2, (64, 64)).astype("u1") * 255
    yield "coarse steps", (rng.integers(0, 40, (5, 64, 64)) * 100).astype("i2")
    yield "a range through -9999", rng.integers(-20000, 20000, (4, 64, 64)).astype("i2")
    yield "heavy tails", rng.standard_cauchy((4, 64, 64)).astype("f4")
    yield (
        "one outlier",
        np.where(np.arange(4096).reshape(64, 64) == 77, -9999, rng.normal(50, 9, (64, 64))).astype("f4"),
    )
    yield "grey", np.repeat(rng.gamma(3, 500, (1, 64, 64)), 4, 0).astype("f4")  # each spectrum has one value


@pytest.mark.parametrize(
    ("name", "values"), list(clean_images()), ids=lambda part: part if isinstance(part, str) else ""
)
def test_clean_images_give_no_finding(tmp_path, name, values):
    assert check(tmp_path, tmp_path / "a.npy", values) == []


def test_the_sample_does_not_depend_on_the_strips():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 200, 90)).astype("f4"))
    cube = Cube(values, None, torch.zeros(values.shape, dtype=torch.bool))
    samples = []
    for rows in (200, 64, 7, 1):
        fill = FillValues(200 * 90, 3)
        for row in range(0, 200, rows):
            part = values[:, row : row + rows]
            fill.add(Cube(part, None, cube.nodata[:, row : row + rows]), part.amin((1, 2)), part.amax((1, 2)))
        samples.append(fill.sample)
    assert samples[0].shape == (3, 8192)
    assert all(np.array_equal(samples[0], other) for other in samples[1:])
