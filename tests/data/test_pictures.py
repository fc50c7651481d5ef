"""PNG and JPEG files as PIL reads them: as auxiliary images, and as classes of pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmmae.data import PairedFolder, read_cube
from mmmae.data.readers.cube import read_layout
from mmmae.data.readers.windows import Window


def channels(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


@pytest.mark.parametrize(
    ("suffix", "image"),
    [
        (".png", channels(6, 7)),
        (".png", channels(6, 7, dtype=np.uint16)),
        (".png", channels(6, 7, 3)),
        (".png", channels(6, 7) > 100),
        (".jpg", channels(6, 7)),
        (".jpeg", channels(6, 7, 3)),
    ],
    ids=["8 bits", "16 bits", "RGB", "1 bit", "JPEG", "JPEG RGB"],
)
def test_values_are_those_that_pil_reads(tmp_path, suffix, image):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(image).save(path, **({} if suffix == ".png" else {"subsampling": 0}))
    expected = np.atleast_3d(np.asarray(Image.open(path))).transpose(2, 0, 1).astype(np.float32)
    cube = read_cube(path)
    np.testing.assert_array_equal(cube.values.numpy(), expected)
    assert not cube.nodata.any()
    assert read_layout(path).shape == expected.shape
    window = read_cube(path, window=Window(1, 2, 3, 4)).values.numpy()
    np.testing.assert_array_equal(window, expected[:, 1:4, 2:6])


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_no_band_and_transparent_pixels_are_nodata(tmp_path, mode):
    image = channels(6, 7, len(mode))
    image[..., -1] = 255
    image[2, 3, -1] = 0
    Image.fromarray(image, mode).save(tmp_path / "a.png")
    cube = read_cube(tmp_path / "a.png")
    assert cube.values.shape == (len(mode) - 1, 6, 7)
    shown = image[..., -1] > 0
    np.testing.assert_array_equal(cube.values.numpy()[:, shown], image[..., :-1].transpose(2, 0, 1)[:, shown])
    np.testing.assert_array_equal(cube.nodata.numpy(), np.broadcast_to(~shown, cube.nodata.shape))
    assert cube.notes == (f"band {len(mode) - 1} is tagged as alpha and is left out",)


def palette_image(*, grey):
    image = Image.fromarray(channels(6, 7) % 4, "P")
    colours = (
        np.repeat([[0], [90], [20], [255]], 3, axis=1)
        if grey
        else np.array([[0, 0, 0], [9, 0, 7], [1, 2, 3], [4, 5, 6]])
    )
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image


@pytest.mark.parametrize("grey", [True, False])
def test_a_palette_is_read_as_its_colours_or_as_classes(tmp_path, grey):
    image = palette_image(grey=grey)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)[: 1 if grey else 3]
    cube = read_cube(tmp_path / "a.png")
    np.testing.assert_array_equal(cube.values.numpy(), expected)
    assert read_layout(tmp_path / "a.png").shape == expected.shape
    classes = read_cube(tmp_path / "a.png", classes=True)
    np.testing.assert_array_equal(classes.values.numpy(), np.asarray(image)[None])
    assert not classes.nodata.any()


def test_a_transparent_colour_of_a_palette_is_nodata(tmp_path):
    image = palette_image(grey=False)
    image.save(tmp_path / "a.png", transparency=2)
    np.testing.assert_array_equal(read_cube(tmp_path / "a.png").nodata[0].numpy(), np.asarray(image) == 2)


def test_equal_channels_are_one_band_of_classes(tmp_path):
    image = channels(6, 7) % 3
    Image.fromarray(np.stack([image] * 3, -1)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_cube(tmp_path / "a.png", classes=True).values[0].numpy(), image)


def test_jpeg_is_refused_as_classes_and_a_turned_picture_at_all(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(channels(6, 7)).save(tmp_path / "a.jpg")
    Image.fromarray(channels(6, 7)).save(tmp_path / "turned.jpg", exif=exif)
    with pytest.raises(ValueError, match="can't hold numbers of classes"):
        read_cube(tmp_path / "a.jpg", classes=True)
    with pytest.raises(ValueError, match="EXIF orientation 6"):
        read_cube(tmp_path / "turned.jpg")


def test_a_damaged_or_renamed_picture_is_refused(tmp_path):
    Image.fromarray(channels(60, 70, 3)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bit.png").write_bytes(whole[:-90] + bytes([whole[-90] ^ 1]) + whole[-89:])
    (tmp_path / "renamed.jpg").write_bytes(whole)
    Image.fromarray(channels(60, 70, 3)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-500])
    for name, message in (
        ("cut.png", "a PNG file: truncated"),
        ("bit.png", "a PNG file: damaged"),
        ("renamed.jpg", "a JPEG file: is no JPEG file"),
        ("cut.jpg", "a JPEG file: truncated"),
    ):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as {message}"):
            read_cube(tmp_path / name)


def test_pictures_are_auxiliary_images(tmp_path):
    for folder in ("hsi", "ir"):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "hsi" / "a.npy", channels(4, 16, 16))
    Image.fromarray(channels(16, 16, dtype=np.uint16)).save(tmp_path / "ir" / "a.png")
    data = PairedFolder(tmp_path / "hsi", {"ir": tmp_path / "ir"})
    image = data.normalization.invert("ir", data[0].aux["ir"])
    torch.testing.assert_close(
        image[0], torch.from_numpy(channels(16, 16, dtype=np.uint16).astype(np.float32)), rtol=1e-5, atol=0
    )


def test_a_header_or_preview_beside_an_image_is_no_second_image(tmp_path, write_raster):
    values = channels(4, 16, 16)
    for name in ("a.tif", "b.img"):
        write_raster(tmp_path / name, values)
        Image.fromarray(values[0]).save((tmp_path / name).with_suffix(".png"))
    (tmp_path / "a.hdr").write_text("ENVI\nfile type = TIFF\n")
    data = PairedFolder(tmp_path)
    assert [data.files(number)["hsi"].name for number in range(len(data))] == ["a.tif", "b.hdr"]
    (tmp_path / "a.jpg").write_bytes(b"")
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match=r"subject 'a': two files, .*a\.npy and .*a\.tif"):
        PairedFolder(tmp_path)


def test_a_transparent_colour_of_a_palette_is_a_class(tmp_path):
    image = palette_image(grey=False)
    image.save(tmp_path / "a.png", transparency=0)
    classes = read_cube(tmp_path / "a.png", classes=True)
    assert not classes.nodata.any()
    np.testing.assert_array_equal(classes.values[0].numpy(), np.asarray(image))
