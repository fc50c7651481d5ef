"""Tiles cover a scene, no read is larger than a tile, and put together they equal the scene."""

from functools import partial

import h5py
import numpy as np
import pytest
import rasterio
import torch
from torch.utils.data import DataLoader

from mmmae.data import Normalization, PairedFolder, Position, collate, image_files, read_cube, untile
from mmmae.data.readers.cube import read_layout
from mmmae.data.readers.windows import Window, tile_grid
from mmmae.data.tiles import window_weights

IDENTITY = Normalization({"hsi": ((-1.0, 0.0, 1.0),) * 3, "fine": ((-1.0, 0.0, 1.0),), "coarse": ((-1.0, 0.0, 1.0),)})


@pytest.fixture
def scene():
    """A cube [3, 24, 36], and auxiliary images of twice and half its size."""
    rng = np.random.default_rng(0)
    shapes = {"hsi": (3, 24, 36), "fine": (1, 48, 72), "coarse": (1, 12, 18)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def tree(tmp_path, scene, write_raster):
    for name, image in scene.items():
        (tmp_path / name).mkdir()
        write_raster(tmp_path / name / "a.tif", image)
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """Shapes of the cubes that `PairedFolder` reads, in order."""
    shapes = []

    def count(path, **options):
        cube = read_cube(path, **options)
        shapes.append((path.parent.name, *cube.values.shape[1:]))
        return cube

    monkeypatch.setattr(image_files, "read_cube", count)
    return shapes


def test_a_grid_covers_an_image_and_its_last_tiles_end_with_it():
    windows = tile_grid(24, 36, 16, 4)
    assert [(window.row, window.column) for window in windows] == [(0, 0), (0, 12), (0, 20), (8, 0), (8, 12), (8, 20)]
    assert tile_grid(16, 16, 16, 4) == [Window(0, 0, 16, 16)]
    for side in range(16, 60):
        covered = np.zeros((side, 16), bool)
        for window in tile_grid(side, 16, 16, 5):
            covered[window.slices] = True
        assert covered.all()


def test_a_grid_of_a_small_image_is_clipped_and_a_regular_grid_is_cut():
    assert tile_grid(10, 36, 16, 4, "clip") == [Window(0, column, 10, 16) for column in (0, 12, 20)]
    assert tile_grid(24, 36, 16, 4, "clip") == tile_grid(24, 36, 16, 4)
    assert tile_grid(10, 36, 16, 4, "cut") == [Window(0, 0, 10, 16), Window(0, 12, 10, 16), Window(0, 24, 10, 12)]
    assert tile_grid(16, 16, 16, 4, "cut") == [Window(0, 0, 16, 16)]
    for side in range(1, 60):
        covered = np.zeros((side, 16), bool)
        for window in tile_grid(side, 16, 16, 5, "cut"):
            assert window.row % 11 == 0
            assert 0 < window.height <= 16
            covered[window.slices] = True
        assert covered.all()


def test_scenes_smaller_than_a_tile_are_read_whole_if_tiles_may_be_clipped(tree, scene):
    subjects = PairedFolder(
        tree / "hsi", tile=30, edges="clip", normalization=Normalization({"hsi": IDENTITY.percentiles["hsi"]})
    )
    assert [position.window for position in subjects.positions] == [Window(0, 0, 24, 30), Window(0, 6, 24, 30)]
    assert np.array_equal(subjects[1].hsi[0].numpy(), scene["hsi"][:, :, 6:])
    with pytest.raises(ValueError, match="edges is 'cut', which is for cubes without auxiliary images"):
        PairedFolder(tree / "hsi", {"fine": tree / "fine"}, tile=12, edges="cut")


def test_tiles_are_named_by_scene_and_corner(tree):
    data = PairedFolder(tree / "hsi", tile=16, overlap=4, normalization=IDENTITY)
    assert data.names == ["a@r0c0", "a@r0c12", "a@r0c20", "a@r8c0", "a@r8c12", "a@r8c20"]
    assert data.positions[1] == Position("a", Window(0, 12, 16, 16))
    assert data[1].name == "a@r0c12"
    assert repr(data) == f"PairedFolder({tree / 'hsi'}: 6 tiles, {data.bands} bands, tile=16, overlap=4)"
    assert data.files(1) == {"hsi": tree / "hsi" / "a.tif"}


def test_tiles_put_together_are_the_scene(tree, scene):
    aux = {name: tree / name for name in ("fine", "coarse")}
    data = PairedFolder(tree / "hsi", aux, tile=16, overlap=4, normalization=IDENTITY)
    samples = [data[index] for index in range(len(data))]
    np.testing.assert_array_equal(untile([s.hsi[0] for s in samples], data.positions)["a"], scene["hsi"])
    for name, factor in (("fine", 2.0), ("coarse", 0.5)):
        assert samples[0].aux[name].shape == (1, int(16 * factor), int(16 * factor))
        places = [
            Position("a", Window(*(int(number * factor) for number in position.window))) for position in data.positions
        ]
        np.testing.assert_array_equal(untile([s.aux[name] for s in samples], places)["a"], scene[name])


def test_weighted_tiles_fade_into_each_other():
    places = [Position("a", Window(0, column, 6, 8)) for column in (0, 4)]
    (row,) = untile([torch.zeros(1, 6, 8), torch.ones(1, 6, 8)], places, weighted=True)["a"][:, 3]
    torch.testing.assert_close(row[:4], torch.zeros(4))
    torch.testing.assert_close(row[4:8], torch.tensor([1, 3, 5, 7]) / 8)
    torch.testing.assert_close(row[8:], torch.ones(4))
    for size in ((1, 1), (2, 1), (5, 6)):
        weights = window_weights(*size)
        assert (weights > 0).all()
        torch.testing.assert_close(weights, weights.flip(0, 1))


def test_no_read_is_larger_than_a_tile(tree, reads):
    aux = {name: tree / name for name in ("fine", "coarse")}
    data = PairedFolder(tree / "hsi", aux, tile=16, overlap=4)
    data.normalization  # noqa: B018
    for index in range(len(data)):
        data[index]
    assert set(reads) == {("hsi", 16, 16), ("fine", 32, 32), ("coarse", 8, 8)}


@pytest.mark.parametrize("name", ["a.npy", "a.h5", "a-v73.mat", "a.tif", "a.img", "a.npz", "a.mat"])
def test_a_window_of_every_format_is_that_part_of_the_whole(tmp_path, write_cube, values, name):
    path = write_cube(tmp_path / name, values)
    window = Window(2, 1, 3, 5)
    assert read_layout(path).shape == (5, 6, 7)
    np.testing.assert_array_equal(read_cube(path, window=window).values, values[:, 2:5, 1:6])
    with pytest.raises(ValueError, match=rf"{name}: .*3 x 5 pixels at row 4, column 1 is not within .* 6 x 7"):
        read_cube(path, window=Window(4, 1, 3, 5))


def test_a_window_of_another_axis_order_and_of_nodata(tmp_path, values, write_raster):
    np.save(tmp_path / "hwt.npy", values.transpose(1, 2, 0))
    window = Window(1, 2, 4, 3)
    np.testing.assert_array_equal(
        read_cube(tmp_path / "hwt.npy", axes="HWT", window=window).values, values[:, 1:5, 2:5]
    )
    assert read_layout(tmp_path / "hwt.npy", axes="HWT").shape == (5, 6, 7)
    values[1, 3, 3] = -9
    cube = read_cube(write_raster(tmp_path / "nodata.tif", values, nodata=-9), window=window)
    assert cube.nodata.nonzero().tolist() == [[1, 2, 1]]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("name", ["a.tif", "a.h5"])
def test_damage_outside_of_a_window_is_not_read(tmp_path, write_raster, name):
    path, values = tmp_path / name, np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    if name == "a.tif":
        write_raster(path, values, tiled=True, blockxsize=16, blockysize=16, compress="deflate")
        with rasterio.open(path) as source:
            last = int(source.get_tag_item("BLOCK_OFFSET_3_3", "TIFF", bidx=1))
    else:
        with h5py.File(path, "w") as file:
            cube = file.create_dataset("cube", data=values, chunks=(2, 16, 16), fletcher32=True)
            last = cube.id.get_chunk_info_by_coord((0, 48, 48)).byte_offset
    content = bytearray(path.read_bytes())
    content[last + 50 : last + 250] = bytes(200)
    path.write_bytes(content)
    np.testing.assert_array_equal(read_cube(path, window=Window(0, 16, 32, 16)).values, values[:, :32, 16:32])
    with pytest.raises(ValueError, match=name):
        read_cube(path)


def test_a_window_of_an_npy_file_does_not_load_the_file(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((3, 50, 50), np.float32))
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("read the whole file"))
    assert read_cube(tmp_path / "a.npy", window=Window(0, 0, 5, 5)).values.shape == (3, 5, 5)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [((1, 36, 36), 16, 4), ((1, 36, 54), 16, 4), ((1, 12, 18), 15, 5), ((1, 8, 12), 15, 4)]
)
def test_an_image_on_no_common_grid_is_misaligned(tree, write_raster, size, tile, overlap):
    write_raster(tree / "coarse" / "a.tif", np.ones(size, np.float32))
    with pytest.raises(ValueError, match=r"modality 'coarse', subject 'a': .*a\.tif: misaligned"):
        PairedFolder(tree / "hsi", {"coarse": tree / "coarse"}, tile=tile, overlap=overlap)


@pytest.mark.parametrize(("tile", "overlap"), [(16, 16), (16, -1), (0, 0), (None, 4)])
def test_an_overlap_that_is_no_part_of_a_tile_is_refused(tree, tile, overlap):
    with pytest.raises(ValueError, match="expected 0 <= overlap < tile"):
        PairedFolder(tree / "hsi", tile=tile, overlap=overlap)


def test_a_scene_smaller_than_a_tile_is_refused(tree):
    with pytest.raises(ValueError, match=r"subject 'a': .*a\.tif: the image is 24 x 36, smaller than a tile of 32"):
        PairedFolder(tree / "hsi", tile=32)


def test_scenes_of_several_sizes_make_tiles_of_one(tree, write_raster):
    write_raster(tree / "hsi" / "b.tif", np.ones((3, 16, 17), np.float32))
    data = PairedFolder(tree / "hsi", tile=16, normalization=IDENTITY)
    assert [name for name in data.names if name.startswith("b")] == ["b@r0c0", "b@r0c1"]
    assert {data[index].hsi.shape for index in range(len(data))} == {(1, 3, 16, 16)}
    write_raster(tree / "fine" / "b.tif", np.ones((1, 16, 17), np.float32))
    with pytest.raises(ValueError, match=r"b\.tif has 1 pixels a pixel of its cube, others have 2; give an image_size"):
        PairedFolder(tree / "hsi", {"fine": tree / "fine"}, tile=16)
    both = PairedFolder(tree / "hsi", {"fine": tree / "fine"}, tile=16, image_size=8, normalization=IDENTITY)
    assert {tuple(sample.aux["fine"].shape) for sample in map(both.__getitem__, range(len(both)))} == {(1, 8, 8)}


def test_the_statistics_of_tiles_are_those_of_the_scene(tree):
    # They are taken of tiles without overlap: 24 x 36 pixels are 2 x 3 tiles of 12, and each pixel counts once.
    whole = PairedFolder(tree / "hsi").normalization
    exact = PairedFolder(tree / "hsi", tile=12, overlap=6).normalization
    np.testing.assert_allclose(exact.percentiles["hsi"], whole.percentiles["hsi"], rtol=1e-6)
    assert exact.selection == whole.selection


def test_two_workers_give_the_tiles_that_the_main_process_gives(tree):
    data = PairedFolder(tree / "hsi", {"fine": tree / "fine"}, tile=16, overlap=4, normalization=IDENTITY)
    load = partial(DataLoader, data, batch_size=2, collate_fn=partial(collate, modalities=data.modalities))
    for alone, worked in zip(load(), load(num_workers=2), strict=True):
        assert alone.names == worked.names
        assert torch.equal(alone.hsi, worked.hsi)
        assert torch.equal(alone.aux["fine"], worked.aux["fine"])


def test_overlapping_tiles_are_averaged_and_resized_to_their_windows():
    positions = [
        Position("a", Window(0, 0, 4, 4)),
        Position("a", Window(0, 2, 4, 4)),
        Position("b", Window(0, 0, 4, 4)),
    ]
    maps = untile([torch.ones(2, 4, 4), torch.full((2, 2, 2), 3.0), torch.zeros(2, 4, 4)], positions)
    assert maps["a"].shape == (2, 4, 6)
    assert maps["a"][0, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert maps["b"].shape == (2, 4, 4)
    with pytest.raises(ValueError, match="2 tiles for 3 positions"):
        untile([torch.ones(2, 4, 4)] * 2, positions)
    with pytest.raises(ValueError, match="more tiles than the 3 positions"):
        untile([torch.ones(2, 4, 4)] * 4, positions)
    with pytest.raises(ValueError, match=r"shape \[4, 4\], expected \[C, H, W\]"):
        untile([torch.ones(4, 4)], positions)


def test_tiles_of_the_real_scenes_are_the_scenes(scenes):
    data = PairedFolder(scenes / "S2L2A", {"VV": f"{scenes}/S1RTC:0"}, tile=64, overlap=16)
    tiles = [index for index, position in enumerate(data.positions) if position.scene == data.positions[0].scene]
    places = [data.positions[index] for index in tiles]
    scene = places[0].scene
    made = untile([data[index].hsi[0] for index in tiles], places)[scene]
    whole = data.normalization.apply("hsi", read_cube(scenes / "S2L2A" / f"{scene}.tif").values)
    assert torch.equal(made, whole) or torch.allclose(made, whole, rtol=1e-6, atol=0)  # a mean of up to four equals
