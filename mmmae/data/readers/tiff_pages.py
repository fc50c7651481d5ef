"""The pages of a TIFF file, read from its directories: what a stack of bands needs and GDAL does not compare."""

import math
import re
import struct
from collections import Counter
from pathlib import Path
from typing import IO, NamedTuple

from ...files import json_value
from .axes import axes_by_size

MOST_PAGES = 65_536
ALWAYS_HELD = 2**28  # bytes of values that are read from a compressed file of any size: zstd and LERC have no bound
MOST_COMPRESSED = 10_000  # bytes of values that one compressed byte may stand for; Deflate reaches 1032, LZW less
FORMATS = {1: "uint", 2: "int", 3: "float", 4: "uint", 5: "complex int", 6: "complex"}
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, DESCRIPTION = 254, 255, 256, 257, 258, 259, 270
STRIP_COUNTS, ORIENTATION, SAMPLES, PAGE_NAME, TILE_COUNTS, SAMPLE_FORMAT = 279, 274, 277, 285, 325, 339
ROWS_PER_STRIP, PLANAR, TILE_WIDTH, TILE_HEIGHT = 278, 284, 322, 323
STRIPS, FILL_ORDER, COLOURS, GDAL_METADATA, GDAL_NODATA = 273, 266, 320, 42112, 42113
PLAIN = {f"{kind}{8 * size}": f"{kind[0]}{size}" for kind in ("uint", "int") for size in (1, 2, 4, 8)}
PLAIN.update(float32="f4", float64="f8")


class Page(NamedTuple):
    """One image of a file.

    Attributes:
        offset: of its directory in the file.
        width, height, samples: its sizes; `samples` are the bands in this page.
        dtype: as in "uint16".
        reduced: whether it is a smaller copy of another page.
        mask: whether it is a mask of another page.
        orientation: 1 if the first row is the upper one and the first column the left one.
        texts: its description and its name.
        plain: NumPy's type and the place in the file of its values, if they are one band without compression, nodata or
            scale, one after another.
    """

    offset: int
    width: int
    height: int
    samples: int
    dtype: str
    reduced: bool
    mask: bool
    orientation: int
    texts: tuple[str, str]
    plain: tuple[str, int] | None

    def __str__(self) -> str:
        bands = f"{self.samples} bands of " if self.samples > 1 else ""
        return f"{bands}{self.height} x {self.width} {self.dtype}"


def tiff_pages(path: Path) -> list[Page]:
    """Read the directories of a TIFF file, and return its pages without masks and reduced copies.

    Raises:
        ValueError: the file is damaged, or declares more values than it can hold.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        pages = list(_Directories(stream, size).pages())
    images = [page for page in pages if not page.reduced and not page.mask]
    if not images:
        raise ValueError("the file has no page of full size")
    if len(images) > 1 and any(page.mask for page in pages):
        raise ValueError(f"the file has {len(images)} pages and masks beside them, expected pages alone")
    return images


def chosen_pages(pages: list[Page], dataset: str | None, axes: str | None) -> list[Page]:
    """Return the pages to read: the one named by `dataset`, its number from 0, or all.

    `axes` says what pages, rows and columns are, if it is not None.

    Raises:
        ValueError: there is no such page, or several pages are not one band each of one size and type, or the
            description of the first says that they are no plain list of bands.
    """
    if dataset is not None:
        if not dataset.isdecimal() or int(dataset) >= len(pages):
            raise ValueError(f"no page {dataset!r}, expected a number from 0 to {len(pages) - 1} (dataset=, --dataset)")
        return [pages[int(dataset)]]
    kinds = Counter(str(page) for page in pages)
    if len(kinds) > 1 or (len(pages) > 1 and pages[0].samples > 1):
        listing = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(5))
        raise ValueError(
            f"the {len(pages)} pages are no stack of bands, which are one band each of one size and type: {listing}; "
            "choose one by its number from 0 (dataset=, --dataset)"
        )
    _check_description(pages, axes)
    return pages


def _check_description(pages: list[Page], given: str | None) -> None:
    """Raise ValueError unless the pages are all planes that ImageJ, OME or tifffile describes, along one axis."""
    text = pages[0].texts[0]
    axes: dict[str, int] = {}
    if text.startswith("ImageJ="):
        fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        axes = {name: _whole(fields.get(name, "1")) for name in ("channels", "slices", "frames")}
        if math.prod(axes.values()) == 1:
            axes = {"images": _whole(fields.get("images", "1"))}
    elif "<OME" in text[:2000] and "<Pixels" in text:
        axes = _ome_axes(text)
    elif text.startswith('{"shape":'):
        axes = _shaped_axes(text, pages, given)
    if not axes:
        return
    long = {name: size for name, size in axes.items() if size > 1}
    listing = " x ".join(f"{size} {name}" for name, size in long.items())
    if len(long) > 1:
        raise ValueError(
            f"the pages are {listing}, expected bands alone; choose one (dataset=, --dataset) or save them apart"
        )
    planes = math.prod(long.values())
    if planes != len(pages) * pages[0].samples and planes != len(pages):
        raise ValueError(
            f"the file describes {listing or 'one image'} but has {len(pages)} pages: save all images as pages of one "
            "file"
        )


def _ome_axes(text: str) -> dict[str, int]:
    pixels = re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", text)
    if len(pixels) > 1:
        raise ValueError(
            f"the file has {len(pixels)} OME images; choose one page (dataset=, --dataset) or save them apart"
        )
    sizes = {name: _whole(value) for name, value in re.findall(r'\bSize([CZT])="(\d+)"', pixels[0])}
    for number, element in enumerate(re.findall(r"<(?:\w+:)?TiffData\b[^>]*>", text)):
        place = {name: _whole(value) for name, value in re.findall(r'\b(IFD|First[CZT])="(\d+)"', element)}
        if "IFD" in place and place["IFD"] != (number or sum(place.get(f"First{axis}", 0) for axis in "CZT")):
            raise ValueError("OME's planes are not in the order of the pages: save them in order")
        if any(place.get(f"First{axis}", 0) not in (0, number) for axis in "CZT"):
            raise ValueError("OME's planes are not in the order of the pages: save them in order")
    return {"channels": sizes.get("C", 1), "slices": sizes.get("Z", 1), "times": sizes.get("T", 1)}


def _shaped_axes(text: str, pages: list[Page], given: str | None) -> dict[str, int]:
    """Return the axes of an array that tifffile wrote, without those of a page."""
    page = pages[0]
    try:
        described = json_value(text)
        shape = [int(size) for size in described["shape"]]
    except (ValueError, TypeError, KeyError):
        return {"images": 1}
    names = str(described.get("axes", ""))
    if given is None and len(names) == len(shape) and page.samples == 1 and {*"YX"} <= {*names} and names[-2:] != "YX":
        raise ValueError(f"the file describes the axes {names}, Y and X not last; give their order by axes= (--axes)")
    if given is None and not names and page.samples == 1 and shape == [len(pages), page.height, page.width]:
        found = axes_by_size(shape, matlab=False)
        if found != "THW":
            raise ValueError(
                f"the array {shape} was written without names of axes, and by its sizes they are {found}, not pages of "
                f'bands; give their order by axes= (--axes), "{found}" or "THW"'
            )
    inner = 2 if page.samples == 1 else 3
    return (
        {f"axis {number}": size for number, size in enumerate(shape[:-inner])} if len(shape) > inner else {"images": 1}
    )


def _whole(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 1


class _Directories:
    """Reads the chain of directories of a classic TIFF or a BigTIFF."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self.stream, self.size = stream, size
        start = self._bytes(0, 8)
        if start[:2] not in (b"II", b"MM"):
            raise ValueError("is no TIFF file: it does not begin with II or MM")
        self.order = "<" if start[:2] == b"II" else ">"
        magic = self._unpack("H", start[2:4])
        if magic not in (42, 43):
            raise ValueError(f"is no TIFF file: its version is {magic}, expected 42 or 43")
        self.big = magic == 43
        self.first = self._unpack("Q", self._bytes(8, 8)) if self.big else self._unpack("I", start[4:])

    def pages(self) -> list[Page]:
        found: list[Page] = []
        offset = self.first
        seen: set[int] = set()
        while offset:
            if offset in seen or len(seen) == MOST_PAGES:
                raise ValueError("damaged: the chain of pages does not end")
            seen.add(offset)
            tags, following = self._directory(offset)
            found.append(self._page(offset, tags))
            offset = following
        return found

    def _directory(self, offset: int) -> tuple[dict[int, tuple[int, int, bytes]], int]:
        """Return tag -> (type, count, the bytes of value or offset), and the offset of the next directory."""
        head, entry, last = (8, 20, 8) if self.big else (2, 12, 4)
        count = self._unpack("Q" if self.big else "H", self._bytes(offset, head))
        if count > 65_535:
            raise ValueError("damaged: a directory has too many entries")
        data = self._bytes(offset + head, count * entry + last)
        tags = {}
        for start in range(0, count * entry, entry):
            tag, kind = struct.unpack(f"{self.order}HH", data[start : start + 4])
            number = self._unpack("Q" if self.big else "I", data[start + 4 : start + (12 if self.big else 8)])
            place = data[start + (12 if self.big else 8) : start + entry]
            length = number * SIZES.get(kind, 1)
            # GDAL drops such a tag without a word, and with it a scale or wavelengths.
            if length > last and self._unpack("Q" if self.big else "I", place) + length > self.size:
                raise ValueError(f"truncated or damaged: tag {tag} of a page is beyond the end of the file")
            tags[tag] = kind, number, place
        return tags, self._unpack("Q" if self.big else "I", data[-last:])

    def _page(self, offset: int, tags: dict[int, tuple[int, int, bytes]]) -> Page:
        def one(tag: int, default: int) -> int:
            return self._integers(tags[tag], 1)[0] if tag in tags and tags[tag][1] else default

        width, height, samples = one(WIDTH, 0), one(HEIGHT, 0), one(SAMPLES, 1)
        bits, kind = one(BITS, 1), FORMATS.get(one(SAMPLE_FORMAT, 1), "unknown")
        declared = samples * height * -(-width * bits // 8)
        counts = tags.get(STRIP_COUNTS) or tags.get(TILE_COUNTS)
        if counts is not None:
            lengths = self._integers(counts, counts[1])
            held = min(sum(lengths), self.size)
            across, down = (one(TILE_WIDTH, width), one(TILE_HEIGHT, height)) if TILE_COUNTS in tags else (
                width, min(one(ROWS_PER_STRIP, height), height)
            )  # fmt: skip
            block = (1 if one(PLANAR, 1) == 2 else samples) * down * -(-across * bits // 8)
            written = declared - lengths.count(0) * block  # blocks of nothing but nodata may be left out of the file
            most = held if one(COMPRESSION, 1) == 1 else max(held * MOST_COMPRESSED, ALWAYS_HELD)
            if written > most or declared > max(self.size * MOST_COMPRESSED, ALWAYS_HELD):
                raise ValueError(
                    f"truncated or damaged: a page declares {declared} bytes of values ({samples} bands of {height} x "
                    f"{width}), the file has {held} for them"
                )
        elif declared > self.size:
            raise ValueError(f"truncated or damaged: a page declares {declared} bytes of values and says not where")
        plain = None
        special = {COLOURS, GDAL_METADATA, GDAL_NODATA} & {*tags} or one(FILL_ORDER, 1) != 1
        if STRIPS in tags and STRIP_COUNTS in tags and samples == one(COMPRESSION, 1) == 1 and not special:
            starts, lengths = (self._integers(tags[tag], tags[tag][1]) for tag in (STRIPS, STRIP_COUNTS))
            together = all(
                start + length == after for start, length, after in zip(starts, lengths, starts[1:], strict=False)
            )
            whole = len(starts) == len(lengths) and sum(lengths) == declared and starts[0] + declared <= self.size
            if together and whole and f"{kind}{bits}" in PLAIN:
                plain = self.order + PLAIN[f"{kind}{bits}"], starts[0]
        subfile, old = one(SUBFILE, 0), one(OLD_SUBFILE, 1)
        return Page(
            offset,
            width,
            height,
            samples,
            f"{kind}{bits}",
            bool(subfile & 1) or old == 2,
            bool(subfile & 4),
            one(ORIENTATION, 1),
            (self._text(tags.get(DESCRIPTION)), self._text(tags.get(PAGE_NAME))),
            plain,
        )

    def _integers(self, entry: tuple[int, int, bytes], count: int) -> tuple[int, ...]:
        kind = entry[0]
        if kind not in INTEGERS:
            raise ValueError("damaged: a tag of a page has a type that is no whole number")
        return struct.unpack(f"{self.order}{count}{INTEGERS[kind]}", self._value(entry)[: count * SIZES[kind]])

    def _text(self, entry: tuple[int, int, bytes] | None) -> str:
        if entry is None or entry[0] != 2:
            return ""
        return self._value(entry).split(b"\0")[0].decode("utf-8", "replace")

    def _value(self, entry: tuple[int, int, bytes]) -> bytes:
        kind, number, data = entry
        length = number * SIZES.get(kind, 1)
        if length <= len(data):
            return data[:length]
        return self._bytes(self._unpack("Q" if self.big else "I", data), length)

    def _bytes(self, offset: int, count: int) -> bytes:
        if offset + count > self.size:
            raise ValueError(f"truncated or damaged: byte {offset + count} is beyond the end at {self.size}")
        self.stream.seek(offset)
        return self.stream.read(count)

    def _unpack(self, kind: str, data: bytes) -> int:
        return int(struct.unpack(self.order + kind, data)[0])
