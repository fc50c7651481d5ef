"""Images and labels on other grids than their cube are resampled by position, exactly as rasterio does it."""

import pickle
from typing import NamedTuple

import numpy as np
import pytest
import rasterio
import torch
from rasterio.enums import Resampling
from rasterio.transform import Affine, from_origin
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject, transform

from mmmae.cli import main
from mmmae.data import Normalization, PairedFolder, untile
from mmmae.data.georeference import find_georeference
from mmmae.data.warp import find_warp
from mmmae.training.finetuning.labels import UNLABELLED, read_mask_labels

SIDE, PIXEL, LEFT, TOP = 48, 30, 366000, 5809000
PLACE = from_origin(LEFT, TOP, PIXEL, PIXEL)
UTM33, UTM32 = "EPSG:32633", "EPSG:32632"
AS_THEY_ARE = Normalization({"hsi": ((-1.0, 0.0, 1.0),) * 2, "ir": ((-1.0, 0.0, 1.0),) * 2})
pytestmark = pytest.mark.filterwarnings("ignore:.*is resampled by position")


class Grid(NamedTuple):
    """Another grid than the cube's, how it is named, and how many pixels of the cube one of its pixels is."""

    place: Affine
    height: int
    width: int
    differences: str
    crs: str = UTM33
    scale: float = 1.0


def moved(columns, rows, pixel=PIXEL):
    return from_origin(LEFT + columns * PIXEL, TOP - rows * PIXEL, pixel, pixel)


def in_zone_32(pixel, size):
    x, y = transform(UTM33, UTM32, [LEFT + SIDE * PIXEL / 2], [TOP - SIDE * PIXEL / 2])
    return from_origin(x[0] - size * pixel / 2, y[0] + size * pixel / 2, pixel, pixel)


SHIFTED = {
    "half a footprint off": Grid(moved(24, 24), 48, 48, "another extent"),
    "three times the footprint": Grid(moved(-48, -48), 144, 144, "another extent"),
    "another aspect": Grid(moved(-3, 7), 30, 77, "another extent"),
    "south up": Grid(Affine(PIXEL, 0, LEFT, 0, PIXEL, TOP - SIDE * PIXEL), 48, 48, "another orientation"),
}
OTHERS = {
    "six tenths of a pixel off": Grid(moved(0.6, 0.0), 48, 48, "another extent"),
    "finer": Grid(moved(-1, -1, 7.0), 300, 300, "another extent and resolution", scale=7 / 30),
    "coarser": Grid(moved(-1, -1, 100.0), 20, 20, "another extent and resolution"),
    "another zone": Grid(in_zone_32(30.0, 60), 60, 60, f"another CRS, {UTM32}", UTM32),
    "another zone and finer": Grid(in_zone_32(10.0, 200), 200, 200, f"another CRS, {UTM32}", UTM32, 1 / 3),
    "turned": Grid(moved(10, -10) @ Affine.rotation(-30), 70, 70, "another orientation"),
}


def write(path, values, place=PLACE, crs=UTM33, driver="GTiff", nodata=None):
    path.parent.mkdir(exist_ok=True)
    count, height, width = values.shape
    options = {"width": width, "height": height, "count": count, "dtype": values.dtype, "nodata": nodata}
    with rasterio.open(path, "w", driver=driver, crs=crs, transform=place, **options) as file:
        file.write(values)
    return path


@pytest.fixture
def cube(tmp_path):
    write(tmp_path / "hsi" / "a.tif", np.random.default_rng(0).normal(size=(2, SIDE, SIDE)).astype("f4"))
    return tmp_path / "hsi"


def image(grid, driver="GTiff"):
    """Return random values `[2, H, W]` with 5 % of nodata, -9, in one of the bands."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, grid.height, grid.width)).astype("f4")
    values[1][rng.random(values.shape[1:]) < 0.05] = -9
    return values


def by_rasterio(path, resampling, scale):
    """Return what rasterio makes of a whole file on the cube's grid; NaN where nodata."""
    options = {"tolerance": 1e-9, "XSCALE": repr(scale), "YSCALE": repr(scale), "UNIFIED_SRC_NODATA": "NO"}
    grid = {"crs": UTM33, "transform": PLACE, "height": SIDE, "width": SIDE}
    with rasterio.open(path) as file, WarpedVRT(file, **grid, resampling=resampling, nodata=-9, **options) as warped:
        found = warped.read()
    return np.where(found == -9, np.nan, found)


def read(cube, folder, **options):
    """Return the image `[2, H, W]` as read for training, 0 where nodata."""
    data = PairedFolder(cube, {"ir": folder}, normalization=AS_THEY_ARE, **options)
    if data.positions:
        return untile([data[index].aux["ir"] for index in range(len(data))], data.positions)["a"].numpy()
    return data[0].aux["ir"].numpy()


@pytest.mark.parametrize("driver", ["GTiff", "ENVI"])
@pytest.mark.parametrize("grid", SHIFTED.values(), ids=SHIFTED)
def test_an_image_whose_pixels_lie_on_those_of_the_cube_keeps_their_values(tmp_path, cube, grid, driver):
    values = image(grid)
    path = write(
        tmp_path / "ir" / ("a.tif" if driver == "GTiff" else "a.img"), values, grid.place, driver=driver, nodata=-9
    )
    column, row = round((grid.place.c - LEFT) / PIXEL), round((TOP - grid.place.f) / PIXEL)
    if grid.place.e > 0:
        values, row = values[:, ::-1], row - grid.height
    expected = np.zeros((2, SIDE, SIDE), "f4")
    rows, columns = slice(max(row, 0), row + grid.height), slice(max(column, 0), column + grid.width)
    part = values[:, max(-row, 0) :, max(-column, 0) :][:, :SIDE, :SIDE]
    part = part[:, : SIDE - rows.start, : SIDE - columns.start]
    expected[:, rows, columns] = np.where(part == -9, 0, part)
    np.testing.assert_array_equal(read(cube, tmp_path / "ir"), expected)
    assert find_warp(find_georeference(path), find_georeference(cube / "a.tif")).differences == grid.differences


@pytest.mark.parametrize("grid", [*SHIFTED.values(), *OTHERS.values()], ids=[*SHIFTED, *OTHERS])
def test_an_image_is_what_rasterio_makes_of_it(tmp_path, cube, grid):
    path = write(tmp_path / "ir" / "a.tif", image(grid), grid.place, grid.crs, nodata=-9)
    warp = find_warp(find_georeference(path), find_georeference(cube / "a.tif"))
    assert warp.differences == grid.differences
    assert warp.scale == pytest.approx((grid.scale, grid.scale), rel=1e-3)
    expected = by_rasterio(path, Resampling.bilinear, warp.scale[0])
    assert np.isnan(expected).mean() < 0.9
    found = read(cube, tmp_path / "ir")
    # Equal but for the rounding of positions, which count from the corner of the window that is read.
    np.testing.assert_allclose(found, np.nan_to_num(expected), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found != 0, ~np.isnan(expected))


def test_values_lie_where_the_reference_systems_say(tmp_path, cube):
    grid = OTHERS["another zone"]
    rows, columns = np.mgrid[: grid.height, : grid.width] + 0.5
    write(tmp_path / "ir" / "a.tif", np.stack([columns, rows]).astype("f4"), grid.place, grid.crs)
    here = np.mgrid[:SIDE, :SIDE].reshape(2, -1) + 0.5
    x, y = transform(UTM33, UTM32, LEFT + PIXEL * here[1], TOP - PIXEL * here[0])
    place = ~grid.place
    expected = [place.a * np.array(x) + place.c, place.e * np.array(y) + place.f]
    found = read(cube, tmp_path / "ir").reshape(2, -1)
    inside = (found > 0.6).all(0) & (found < grid.width - 0.6).all(0)  # the edge's pixels have no neighbour beyond
    assert inside.mean() > 0.95
    np.testing.assert_allclose(found[:, inside], np.array(expected)[:, inside], atol=1e-3)


@pytest.mark.parametrize("grid", [*SHIFTED.values(), *OTHERS.values()], ids=[*SHIFTED, *OTHERS])
def test_tiles_put_together_are_the_whole(tmp_path, cube, grid):
    write(tmp_path / "ir" / "a.tif", image(grid), grid.place, grid.crs, nodata=-9)
    data = PairedFolder(cube, {"ir": tmp_path / "ir"}, normalization=AS_THEY_ARE, tile=16)
    whole, made = read(cube, tmp_path / "ir"), np.zeros((2, SIDE, SIDE), "f4")
    for index, (_, window) in enumerate(data.positions):
        if (tile := data[index].aux.get("ir")) is not None:  # left out if the image does not reach the tile
            made[(slice(None), *window.slices)] = tile
    np.testing.assert_allclose(made, whole, rtol=0, atol=1e-6)


def test_a_size_that_tiles_can_not_cut_is_resampled(tmp_path, cube):
    path = write(tmp_path / "ir" / "a.tif", image(Grid(PLACE, 20, 20, "")), from_origin(LEFT, TOP, 72, 72), nodata=-9)
    assert PairedFolder(cube, {"ir": tmp_path / "ir"}, normalization=AS_THEY_ARE)[0].aux["ir"].shape == (2, 20, 20)
    with pytest.warns(
        UserWarning, match=r"modality 'ir': .*a.tif is resampled by position .* it has another resolution"
    ):
        found = read(cube, tmp_path / "ir", tile=16)
    expected = np.nan_to_num(by_rasterio(path, Resampling.bilinear, 1.0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("grid", [*SHIFTED.values(), *OTHERS.values()], ids=[*SHIFTED, *OTHERS])
def test_labels_are_those_of_the_nearest_pixel(tmp_path, cube, grid, tile):
    values = np.random.default_rng(2).integers(0, 60000, (1, grid.height, grid.width)).astype("u2")
    values[0, ::7] = 255
    path = write(tmp_path / "labels" / "a.tif", values, grid.place, grid.crs)
    with (
        rasterio.open(path) as file,
        WarpedVRT(
            file, crs=UTM33, transform=PLACE, height=SIDE, width=SIDE, tolerance=1e-9, nodata=65535, dtype="uint16"
        ) as warped,
    ):
        expected = warped.read(1).astype(int)
    unknown = (expected == 65535) | (expected == 255)
    subjects = PairedFolder(cube, tile=tile, normalization=AS_THEY_ARE, image_size=tile or SIDE)
    labels = pickle.loads(pickle.dumps(read_mask_labels(tmp_path / "labels", subjects)))
    assert [int(name) for name in labels.classes] == sorted(set(expected[~unknown]))
    numbers = np.array([int(name) for name in labels.classes])
    for index in labels.counts:
        window = subjects.positions[index].window if tile else None
        part = (slice(None), slice(None)) if window is None else window.slices
        target = labels.target(index, (tile or SIDE,) * 2).numpy()
        np.testing.assert_array_equal(target == UNLABELLED, unknown[part])
        np.testing.assert_array_equal(numbers[target][~unknown[part]], expected[part][~unknown[part]])


@pytest.mark.parametrize("place", ["with", "without"])
def test_labels_of_twice_the_resolution_are_exact_in_tiles(tmp_path, place, cube):
    values = np.random.default_rng(2).integers(0, 9, (1, 2 * SIDE, 2 * SIDE)).astype("u1")
    where = from_origin(LEFT, TOP, PIXEL / 2, PIXEL / 2)
    if place == "with":
        write(tmp_path / "labels" / "a.tif", values, where)
    else:
        (tmp_path / "labels").mkdir()
        np.save(tmp_path / "labels" / "a.npy", values[0])
    expected = np.zeros((SIDE, SIDE), "u1")
    reproject(values[0], expected, src_transform=where, src_crs=UTM33, dst_transform=PLACE, dst_crs=UTM33)
    subjects = PairedFolder(cube, tile=16, overlap=4)
    labels = read_mask_labels(tmp_path / "labels", subjects)
    assert labels.classes == [str(number) for number in range(9)]
    for index, (_, window) in enumerate(subjects.positions):
        np.testing.assert_array_equal(labels.target(index, (16, 16)), expected[window.slices])


def test_an_image_that_does_not_reach_a_tile_is_missing_there(tmp_path, cube):
    write(tmp_path / "ir" / "a.tif", np.ones((2, 24, 24), "f4"), moved(24, 24))
    data = PairedFolder(cube, {"ir": tmp_path / "ir"}, tile=24, normalization=AS_THEY_ARE)
    assert [sorted(data[index].aux) for index in range(4)] == [[], [], [], ["ir"]]
    assert torch.equal(data[3].aux["ir"], torch.ones(2, 24, 24))


def test_statistics_are_those_of_the_part_that_is_read(tmp_path, cube):
    values = np.full((2, 96, 96), 1000, "f4")
    values[:, :48, :48] = np.random.default_rng(1).uniform(0, 1, (2, 48, 48))
    write(tmp_path / "ir" / "a.tif", values)
    data = PairedFolder(cube, {"ir": tmp_path / "ir"})
    assert max(map(max, data.normalization.percentiles["ir"])) <= 1


def test_only_the_part_that_lies_in_a_tile_is_read(tmp_path, cube, monkeypatch):
    from mmmae.data import image_files

    windows = []
    read_cube = image_files.read_cube

    def watch(path, **options):
        windows.append((path.parent.name, *(options["window"] or (0, 0, 0, 0))[2:]))
        return read_cube(path, **options)

    write(tmp_path / "ir" / "a.tif", image(Grid(PLACE, 144, 144, "")), moved(-48, -48))
    data = PairedFolder(cube, {"ir": tmp_path / "ir"}, tile=16, normalization=AS_THEY_ARE)
    monkeypatch.setattr(image_files, "read_cube", watch)
    data[4]
    assert windows == [("hsi", 16, 16), ("ir", 22, 22)]


def test_check_says_how_images_are_resampled_in_one_line_a_kind(tmp_path, capsys):
    places = [
        PLACE,
        moved(24, 24),
        moved(-7, 3),
        SHIFTED["south up"].place,
        from_origin(LEFT, TOP, 15, 15),
        moved(480, 0),
    ]
    for number, place in enumerate(places):
        values = np.random.default_rng(number).normal(size=(2, SIDE, SIDE)).astype("f4")
        write(tmp_path / "hsi" / f"s{number}.tif", values)
        write(tmp_path / "ir" / f"s{number}.tif", values + 7, place)
    assert main(["data", "check", "--hsi", str(tmp_path / "hsi"), "--aux", f"ir={tmp_path / 'ir'}"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "resampled" in line or "misaligned" in line]
    assert len(lines) == 4
    assert "s5.tif" in lines[0]
    assert "does not overlap its cube: its centre is at column 504, row 24 of the cube" in lines[0]
    assert "2 of 6 files, such as s1.tif, have another extent: resampled by position" in lines[1]
    assert "1 of 6 files, such as s3.tif, have another orientation: " in lines[2]
    assert "1 of 6 files, such as s4.tif, have another extent and resolution: " in lines[3]
