"""TIFF files of several pages as tifffile reads them: all pages are bands, or the file is refused."""

import struct
import warnings

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image

from mmmae.data import read_cube
from mmmae.data.readers.cube import read_layout
from mmmae.data.readers.windows import Window


def stack(dtype="u2", shape=(11, 6, 7)):
    values = np.random.default_rng(0).uniform(0, 250, shape)
    return (values if dtype.startswith("f") else values.round()).astype(dtype)


def write_pil(path, values):
    first, *rest = (Image.fromarray(page) for page in values)
    first.save(path, save_all=True, append_images=rest)


def write_gdal(path, values):
    """Append one page after another, as GDAL's APPEND_SUBDATASET does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, page in enumerate(values):
            size = {"height": page.shape[0], "width": page.shape[1], "count": 1, "dtype": page.dtype}
            with rasterio.open(path, "w", driver="GTiff", APPEND_SUBDATASET=number > 0, **size) as target:
                target.write(page, 1)


WRITERS = {
    "tifffile": tifffile.imwrite,
    "compressed": lambda path, values: tifffile.imwrite(path, values, compression="zlib", tile=(16, 16)),
    "bigtiff": lambda path, values: tifffile.imwrite(path, values, bigtiff=True, byteorder=">", metadata=None),
    "ImageJ": lambda path, values: tifffile.imwrite(path, values, imagej=True),
    "OME": lambda path, values: tifffile.imwrite(path, values, ome=True, metadata={"axes": "CYX"}),
    "separate": lambda path, values: tifffile.imwrite(path, values, photometric="minisblack", planarconfig="separate"),
    "PIL": write_pil,
    "GDAL": write_gdal,
}


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("writer", WRITERS)
def test_all_pages_are_bands(tmp_path, writer, dtype):
    values = stack(dtype)
    if writer == "PIL" and dtype == "f4":
        values = values[:4]
    path = tmp_path / "a.tif"
    WRITERS[writer](path, values)
    expected = np.concatenate([np.atleast_3d(page.asarray().T).T for page in tifffile.TiffFile(path).pages])
    found = read_cube(path).values.numpy()
    np.testing.assert_array_equal(found, expected.reshape(values.shape).astype(np.float32))
    np.testing.assert_array_equal(found, values.astype(np.float32))
    assert read_layout(path).shape == values.shape
    np.testing.assert_array_equal(read_cube(path, window=Window(1, 2, 3, 4)).values.numpy(), found[:, 1:4, 2:6])


@pytest.mark.parametrize("order", ["<", ">"])
def test_plain_pages_are_read_without_opening_each_by_gdal(tmp_path, monkeypatch, order):
    values = stack("u2")
    tifffile.imwrite(tmp_path / "a.tif", values, byteorder=order, rowsperstrip=2)
    with monkeypatch.context() as patch:
        patch.setattr(rasterio, "open", lambda *_, **__: pytest.fail("GDAL was asked"))
        cube = read_cube(tmp_path / "a.tif", window=Window(1, 2, 3, 4))
    np.testing.assert_array_equal(cube.values.numpy(), values[:, 1:4, 2:6])


def test_pages_with_nodata_or_scale_are_read_by_gdal(tmp_path):
    values = stack("u2")
    write_pages(tmp_path / "a.tif", *values, extratags=[(42113, "s", 0, str(values[0, 0, 0]), True)])
    np.testing.assert_array_equal(read_cube(tmp_path / "a.tif").nodata.numpy(), values == values[0, 0, 0])


def test_one_page_is_read_by_its_number(tmp_path):
    values = stack()
    tifffile.imwrite(tmp_path / "a.tif", values)
    np.testing.assert_array_equal(read_cube(tmp_path / "a.tif", dataset="4").values.numpy(), values[4:5])
    with pytest.raises(ValueError, match=r"no page '11', expected a number from 0 to 10 \(dataset=, --dataset\)"):
        read_cube(tmp_path / "a.tif", dataset="11")


@pytest.mark.parametrize("axes", ["HWT", "HTW", "WHT"])
def test_pages_may_be_rows_or_columns(tmp_path, axes):
    values = stack()
    tifffile.imwrite(
        tmp_path / "a.tif", values.transpose(["THW".index(axis) for axis in axes]), photometric="minisblack"
    )
    nm = np.linspace(400, 900, 11)
    cube = read_cube(tmp_path / "a.tif", axes=axes, wavelengths=nm)
    np.testing.assert_array_equal(cube.values.numpy(), values)
    assert read_layout(tmp_path / "a.tif", axes=axes, wavelengths=nm).shape == (11, 6, 7)
    window = read_cube(tmp_path / "a.tif", axes=axes, window=Window(1, 2, 3, 4))
    np.testing.assert_array_equal(window.values.numpy(), values[:, 1:4, 2:6])


def test_wavelengths_are_in_the_names_of_pages(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as target:
        for number, page in enumerate(stack()):
            target.write(page, extratags=[(285, "s", 0, f"{450 + 10 * number} nm", True)], metadata=None)
    assert read_cube(tmp_path / "a.tif").wavelengths.tolist() == [450 + 10 * number for number in range(11)]


def test_reduced_copies_are_no_bands(tmp_path):
    values = stack(shape=(3, 64, 64))
    with tifffile.TiffWriter(tmp_path / "a.tif") as target:
        for page in values:
            target.write(page, metadata=None)
        target.write(values[0, ::2, ::2], subfiletype=1, metadata=None)
    np.testing.assert_array_equal(read_cube(tmp_path / "a.tif").values.numpy(), values)


def write_pages(path, *pages, **options):
    with tifffile.TiffWriter(path) as target:
        for page in pages:
            target.write(page, metadata=None, **options)


def refused_stacks():
    image = stack(shape=(6, 7))
    hyper = stack(shape=(3, 4, 6, 7))
    return {
        "sizes": (lambda path: write_pages(path, image, image[:5]), r"1 of 6 x 7 uint16, 1 of 5 x 7 uint16"),
        "types": (lambda path: write_pages(path, image, image.astype("f4")), r"1 of 6 x 7 uint16, 1 of 6 x 7 float32"),
        "colours": (
            lambda path: write_pages(path, *stack("u1", (2, 6, 7, 3)), photometric="rgb"),
            "2 of 3 bands of 6 x 7 uint8",
        ),
        "hyperstack": (lambda path: tifffile.imwrite(path, hyper, imagej=True), "4 channels x 3 slices"),
        "OME": (
            lambda path: tifffile.imwrite(path, hyper, ome=True, metadata={"axes": "ZCYX"}), "4 channels x 3 slices"
        ),
        "shaped": (lambda path: tifffile.imwrite(path, hyper, photometric="minisblack"), "3 axis 0 x 4 axis 1"),
        "one directory": (lambda path: tifffile.imwrite(path, stack(), truncate=True), "describes 11 axis 0 but has 1"),
        "ImageJ's own": (lambda path: tifffile.imwrite(path, stack(), imagej=True, truncate=True), "has 1 pages"),
        "rows first": (
            lambda path: tifffile.imwrite(path, stack(), metadata={"axes": "YXC"}),
            r"axes YXC, Y and X not last.*\(--axes\)",
        ),
        "masks": (
            lambda path: [
                write_pages(path, image, image), tifffile.imwrite(path, image > 9, append=True, subfiletype=4)
            ],
            "2 pages and masks beside them",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", refused_stacks())
def test_pages_that_are_no_stack_of_bands_are_refused(tmp_path, kind):
    write, message = refused_stacks()[kind]
    write(tmp_path / "a.tif")
    for read in (read_cube, read_layout):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.tif")


def directory(*entries, following=0):
    """Return a little-endian TIFF file of one directory at byte 8."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + packed + struct.pack("<I", following)


SIZES = ((256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (273, 4, 1, 8), (279, 4, 1, 16))
HOSTILE = {
    "more bands than bytes": (directory(*SIZES, (277, 3, 1, 65_535)), "declares 1048560 bytes"),
    "the same, compressed": (
        directory((256, 4, 1, 4096), (257, 4, 1, 4096), *SIZES[2:], (277, 3, 1, 65_535), (259, 3, 1, 8)),
        "declares 1099494850560 bytes",
    ),
    "nothing but blocks that are not there": (
        directory((256, 4, 1, 65_536), (257, 4, 1, 65_536), *SIZES[2:4], (279, 4, 1, 0)),
        "declares 4294967296 bytes",
    ),
    "a size of 2^32": (directory((256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1), *SIZES[2:]), "declares"),
    "no place of values": (directory(*SIZES[:3], (277, 3, 1, 65_535)), "says not where"),
    "a chain that loops": (directory(*SIZES, following=8), "the chain of pages does not end"),
    "a chain that leaves the file": (directory(*SIZES, following=10**6), "is beyond the end"),
    "a text of 4 GB": (directory(*SIZES, (270, 2, 2**32 - 1, 8)), "tag 270 of a page is beyond the end"),
    "scales that are cut off": (directory(*SIZES, (42112, 2, 99, 80)), "tag 42112 of a page is beyond the end"),
    "counts of a strange type": (directory(*SIZES[:4], (279, 12, 2, 8)), "no whole number"),
    "no directory": (b"II*\0" + bytes(4), "no page of full size"),
    "another format": (b"\x89PNG\r\n\x1a\n" + bytes(20), "does not begin with II or MM"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_by_its_directories(tmp_path, monkeypatch, kind):
    content, message = HOSTILE[kind]
    (tmp_path / "a.tif").write_bytes(content)
    monkeypatch.setattr(rasterio, "open", lambda *_, **__: pytest.fail("GDAL was asked"))
    for read in (read_cube, read_layout):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.tif")


def test_units_of_band_tags_are_not_guessed_one_by_one(tmp_path, write_raster):
    values = stack("f4", (3, 6, 7))

    def tagged(name, *pairs):
        tags = {
            band: dict(zip(("wavelength", "wavelength_units"), pair, strict=False))
            for band, pair in enumerate(pairs, 1)
        }
        return read_cube(write_raster(tmp_path / name, values, tags=tags))

    assert tagged("a.tif", ["90"], ["500"], ["1000"]).wavelengths.tolist() == [90, 500, 1000]
    assert tagged("b.tif", ["0.5"], ["1"], ["2"]).wavelengths.tolist() == [500, 1000, 2000]
    assert tagged("c.tif", ["0.5", "um"], ["600", "nm"], ["2", "um"]).wavelengths.tolist() == [500, 600, 2000]
    index = tagged("d.tif", ["1", "Index"], ["2", "Index"], ["150", "Index"])
    assert index.wavelengths is None
    assert "'index'" in index.notes[0]
    assert tagged("e.tif", ["500"], ["600"]).notes == ("only 2 of 3 bands tell their wavelength, so none is used",)


def test_a_turned_page_is_noted(tmp_path):
    write_pages(tmp_path / "a.tif", stack(shape=(6, 7)), extratags=[(274, "H", 1, 6, True)])
    assert read_cube(tmp_path / "a.tif").notes == ("the file's orientation, 6, is not applied",)


def test_alpha_is_no_band_unless_it_is_any_fourth_band(tmp_path):
    values = stack("u2", (6, 7, 2))
    values[0, 0, 1] = 0
    tifffile.imwrite(
        tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]
    )
    cube = read_cube(tmp_path / "a.tif")
    np.testing.assert_array_equal(cube.values.numpy()[0][values[..., 1] > 0], values[..., 0][values[..., 1] > 0])
    np.testing.assert_array_equal(cube.nodata.numpy()[0], values[..., 1] == 0)
    assert cube.notes == ("band 1 is tagged as alpha and is left out",)
    for dtype in ("u1", "u2"):
        tifffile.imwrite(tmp_path / "b.tif", stack(dtype, (6, 7, 4)), photometric="rgb", extrasamples=["unassalpha"])
        cube = read_cube(tmp_path / "b.tif")
        assert cube.values.shape == (4, 6, 7)
        assert cube.notes == ("band 3 is tagged as alpha and is read as a band",)


def test_the_nodata_value_of_the_first_page_is_that_of_all(tmp_path):
    values = stack("u2")
    values[:, 0, 0] = 999
    for compression in (None, "zlib"):
        with tifffile.TiffWriter(tmp_path / "a.tif") as target:
            for number, page in enumerate(values):
                tags = [] if number else [(42113, "s", 0, "999", True)]
                target.write(page, metadata=None, extratags=tags, compression=compression)
        np.testing.assert_array_equal(read_cube(tmp_path / "a.tif").nodata.numpy(), values == 999)


def scaled(scale, offset):
    items = (
        f'<Item name="S" sample="0" role="scale">{scale}</Item><Item name="O" sample="0" role="offset">{offset}</Item>'
    )
    return [(42112, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>", True)]


@pytest.mark.parametrize("axes", ["THW", "TWH", "HTW", "WHT"])
def test_scale_and_offset_are_kept_where_pages_are_rows(tmp_path, axes):
    values = stack("u2")
    stored = values.transpose(["THW".index(axis) for axis in axes])
    write_pages(tmp_path / "a.tif", *stored, extratags=scaled(0.5, 3))
    np.testing.assert_array_equal(read_cube(tmp_path / "a.tif", axes=axes).values.numpy(), values * 0.5 + 3)
    with tifffile.TiffWriter(tmp_path / "b.tif") as target:
        for number, page in enumerate(stored):
            target.write(page, metadata=None, extratags=scaled(number + 1, 3))
    if axes[0] == "T":
        factors = np.arange(1, 12)[:, None, None]
        np.testing.assert_array_equal(read_cube(tmp_path / "b.tif", axes=axes).values.numpy(), values * factors + 3)
    else:
        with pytest.raises(ValueError, match="pages have several scales or offsets"):
            read_cube(tmp_path / "b.tif", axes=axes)


@pytest.mark.parametrize("shape", [(60, 70, 9), (40, 50, 200)])
def test_an_array_that_tifffile_wrote_without_axes_is_no_stack_against_its_sizes(tmp_path, shape):
    values = stack(shape=shape)
    tifffile.imwrite(tmp_path / "a.tif", values)
    for read in (read_cube, read_layout):
        with pytest.raises(ValueError, match=r"by axes= \(--axes\)"):
            read(tmp_path / "a.tif")
    found = read_cube(tmp_path / "a.tif", axes="HWT").values.numpy()
    np.testing.assert_array_equal(found, values.transpose(2, 0, 1))
    np.testing.assert_array_equal(read_cube(tmp_path / "a.tif", axes="THW").values.numpy(), values)
    tifffile.imwrite(tmp_path / "a.tif", values, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(read_cube(tmp_path / "a.tif").values.numpy(), values)


def test_what_any_page_notes_is_noted(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as target:
        for page, orientation in zip(stack("u2", (3, 6, 7)), (6, 1, 1), strict=True):
            tags = [(274, "H", 1, orientation, True)]
            target.write(page, metadata=None, extratags=tags, compression="zlib")
    expected = ("the file's orientation, 6, is not applied",)
    assert read_cube(tmp_path / "a.tif").notes == read_layout(tmp_path / "a.tif").notes == expected


def test_what_zstd_compresses_to_almost_nothing_is_read(tmp_path, write_raster):
    ones = np.ones((1, 2048, 2048), np.uint8)
    path = write_raster(tmp_path / "a.tif", ones, compress="zstd", tiled=True, blockxsize=2048, blockysize=2048)
    with tifffile.TiffFile(path) as file:
        assert sum(file.pages[0].databytecounts) * 10_000 < ones.size
    assert (read_cube(path).values == 1).all()
