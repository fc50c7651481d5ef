"""Random ENVI and TIFF files with what they hold, to be read exactly or refused."""

import warnings
from typing import NamedTuple

import numpy as np
import rasterio
import tifffile

from mmmae.data import read_cube
from mmmae.data.readers.cube import read_layout
from mmmae.data.readers.windows import Window

ENVI_TYPES = {"u1": 1, "i2": 2, "i4": 3, "f4": 4, "f8": 5, "u2": 12, "u4": 13, "i8": 14, "u8": 15}
ENVI_ORDERS = {"bsq": (0, 1, 2), "bil": (1, 0, 2), "bip": (1, 2, 0)}
UNITS = {"Nanometers": 1, "nm": 1, "Micrometers": 1000, "um": 1000, None: 1, "Index": None, "Unknown": 1}


class Drawn(NamedTuple):
    """A file and what it holds: values `[T, H, W]` as measured, nodata, and wavelengths in nm or None."""

    path: object
    data: object  # the file with the values
    values: np.ndarray
    nodata: np.ndarray
    wavelengths: np.ndarray | None


def draw_numbers(rng, dtypes, most_bands=9, least_width=1):
    """Return `[T, H, W]` of a random type and size, and a nodata value that some of them have, or None."""
    dtype = np.dtype(rng.choice(dtypes))
    shape = rng.integers(1, most_bands), rng.integers(1, 20), rng.integers(least_width, 20)
    values = rng.uniform(0, 250, shape).astype(dtype)
    if rng.random() < 0.5:
        return values, None
    choices = [0, 255, 65535, -9999, -32768, 1e20, float(np.float32(-3.4e38)), np.nan]
    nodata = choices[rng.integers(len(choices))]
    held = np.isnan(nodata) or abs(nodata) > 1e9 if dtype.kind != "f" else False
    if held or (dtype.kind != "f" and not np.iinfo(dtype).min <= nodata <= np.iinfo(dtype).max):
        return values, None
    values[rng.random(values.shape) < 0.2] = nodata
    return values, nodata


def equals(values, nodata):
    if nodata is None:
        return np.zeros(values.shape, dtype=bool)
    return np.isnan(values) if np.isnan(nodata) else values == values.dtype.type(nodata)


def draw_envi(rng, folder):
    """Write a random ENVI pair."""
    stored, nodata = draw_numbers(rng, list(ENVI_TYPES))
    bands, lines, samples = stored.shape
    interleave, order, offset = rng.choice(list(ENVI_ORDERS)), rng.choice(["<", ">"]), int(rng.choice([0, 0, 1, 512]))
    fields = {
        "description": "{ a = 1\n bands = 99, {nested} }", "samples": samples, "lines": lines, "bands": bands,
        "header offset": offset, "file type": "ENVI Standard", "data type": ENVI_TYPES[stored.dtype.str[1:]],
        "interleave": rng.choice([interleave, interleave.upper()]), "byte order": int(order == ">"),
    }  # fmt: skip
    values, hidden, nm = stored.astype(np.float64), equals(stored, nodata), None
    if nodata is not None:
        fields["data ignore value"] = repr(float(nodata))
    if rng.random() < 0.5:
        nm = np.sort(rng.uniform(350, 2500, bands)).astype(np.float32)
        unit = rng.choice(list(UNITS))
        written = np.arange(1, bands + 1) if UNITS[unit] is None else nm.astype(np.float64) / UNITS[unit]
        fields["wavelength"] = "{" + rng.choice([", ", ",\n  ", " , "]).join(map(repr, written.tolist())) + "}"
        if unit is not None:
            fields["wavelength units"] = unit
        nm = None if UNITS[unit] is None else nm
    kind = rng.integers(4)
    if kind == 1:
        fields["reflectance scale factor"] = factor = float(rng.choice([100, 255, 10000]))
        values = values * (1 / factor)
    elif kind == 2:
        gains, offsets = rng.uniform(0.1, 2, bands).round(3), rng.uniform(-1, 1, bands).round(3)
        prefix = rng.choice(["data", "data reflectance"])
        for name, numbers in (("gain", gains), ("offset", offsets)):
            fields[f"{prefix} {name} values"] = "{" + ", ".join(map(repr, numbers.tolist())) + "}"
        values = values * gains[:, None, None] + offsets[:, None, None]
    if bands > 1 and rng.random() < 0.3:
        bad = rng.permutation(bands)[: rng.integers(1, bands)]
        fields["bbl"] = "{" + ", ".join("0" if band in bad else "1" for band in range(bands)) + "}"
        hidden[bad] = True
    case = rng.choice([str, str.upper, str.title])
    lines_of_text = [f"{case(key)}{rng.choice([' = ', '=', '  =  '])}{value}" for key, value in fields.items()]
    for text in ("; a comment { with = braces", ""):
        lines_of_text.insert(rng.integers(len(lines_of_text)), text)
    path, data = folder / "a.hdr", folder / f"a{rng.choice(['.img', '.dat', '', '.raw'])}"
    path.write_text("ENVI\n" + rng.choice(["\n", "\r\n"]).join(lines_of_text) + "\n", newline="")
    in_file = stored.transpose(ENVI_ORDERS[interleave]).astype(stored.dtype.newbyteorder(order))
    data.write_bytes(bytes(offset) + in_file.tobytes())
    return Drawn(path, data, values, hidden, nm)


def draw_geotiff(rng, folder):
    """Write a random TIFF file of one page by GDAL."""
    stored, nodata = draw_numbers(rng, ["u1", "i2", "u2", "i4", "u4", "f4", "f8"])
    bands, height, width = stored.shape
    options = {
        "interleave": rng.choice(["band", "pixel"]),
        "compress": rng.choice(["none", "deflate", "lzw", "packbits"]),
    }
    if rng.random() < 0.4:
        options.update(tiled=True, blockxsize=16, blockysize=16)
    options["BIGTIFF"], options["ENDIANNESS"] = rng.choice(["YES", "NO"]), rng.choice(["LITTLE", "BIG"])
    if nodata is not None:  # GDAL 3.10 writes big-endian tiles of nothing but nodata with their bytes swapped
        options["ENDIANNESS"] = "LITTLE"
    options["photometric"] = "minisblack"
    path, nm = folder / "a.tif", None
    values = stored.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", "GTiff", width, height, bands, dtype=stored.dtype.name, nodata=nodata, **options
        ) as target:
            target.write(stored)
            if rng.random() < 0.5:
                nm = np.sort(rng.uniform(350, 2500, bands)).round(2)
                unit = rng.choice(["nm", "um", None])
                for band, value in enumerate(nm.tolist(), start=1):
                    text = repr(value / 1000 if unit == "um" else value)
                    target.update_tags(band, wavelength=text, **({"wavelength_units": unit} if unit else {}))
            if rng.random() < 0.4:
                scales, offsets = rng.uniform(0.1, 2, bands).round(3), rng.uniform(-1, 1, bands).round(3)
                target.scales, target.offsets = scales, offsets
                values = values * scales[:, None, None] + offsets[:, None, None]
    return Drawn(path, path, values, equals(stored, nodata), None if nm is None else nm.astype(np.float32))


def draw_stack(rng, folder):
    """Write a random TIFF file of a page a band by tifffile."""
    kind = rng.choice(["plain", "shaped", "ImageJ", "OME"])
    # A width of 1 is left out: tifffile takes a last axis of 1 for samples, and writes bands as rows.
    stored, _ = draw_numbers(rng, ["u1", "u2", "f4"], most_bands=30, least_width=2)
    stored = np.nan_to_num(stored, nan=7)
    options = {
        "plain": {"metadata": None},
        "shaped": {"metadata": {"axes": "CYX"}},  # without it sizes have to say that pages are bands
        "ImageJ": {"imagej": True},
        "OME": {"ome": True, "metadata": {"axes": "CYX"}},
    }[kind]
    if kind in ("plain", "shaped"):
        options["byteorder"] = rng.choice(["<", ">"])
        options["bigtiff"] = bool(rng.random() < 0.3)
    if kind != "ImageJ" and rng.random() < 0.5:
        options["compression"] = "zlib"
    if rng.random() < 0.3:
        options["rowsperstrip"] = int(rng.integers(1, 9))
    path = folder / ("a.ome.tif" if kind == "OME" else "a.tiff")
    tifffile.imwrite(path, stored, photometric="minisblack", **options)
    return Drawn(path, path, stored.astype(np.float64), np.zeros(stored.shape, dtype=bool), None)


DRAWS = {"ENVI": draw_envi, "GeoTIFF": draw_geotiff, "stack": draw_stack}


def misread(kind, folder, seed):
    """Write a file, perhaps cut it short, and return what was read wrongly, or None. A cut file may be refused."""
    rng = np.random.default_rng([seed, list(DRAWS).index(kind)])
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    drawn = DRAWS[kind](rng, folder)
    cut = rng.random() < 0.3
    if cut:
        content = drawn.data.read_bytes()
        drawn.data.write_bytes(content[: rng.integers(len(content))])
    try:
        cube, layout = read_cube(drawn.path), read_layout(drawn.path)
        height, width = drawn.values.shape[1:]
        row, column = rng.integers(height), rng.integers(width)
        window = Window(row, column, rng.integers(1, height - row + 1), rng.integers(1, width - column + 1))
        part = read_cube(drawn.path, window=window)
    except ValueError as error:
        return None if cut and str(drawn.path) in str(error) else f"{kind} {seed}: refused: {error}"
    expected = np.where(drawn.nodata, 0, drawn.values).astype(np.float32)
    checks = {
        "values": np.array_equal(cube.values.numpy(), expected),
        "nodata": np.array_equal(cube.nodata.numpy(), drawn.nodata),
        "layout": layout.shape == expected.shape,
        "window": np.array_equal(part.values.numpy(), expected[(slice(None), *window.slices)]),
    }
    for name, found in (("wavelengths", cube.wavelengths), ("wavelengths of the layout", layout.wavelengths)):
        same = (found is None) == (drawn.wavelengths is None)
        checks[name] = same and (found is None or np.allclose(found.numpy(), drawn.wavelengths, rtol=1e-6, atol=0))
    wrong = [name for name, right in checks.items() if not right]
    return f"{kind} {seed}: wrong {', '.join(wrong)}" if wrong else None
