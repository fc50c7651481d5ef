"""Check the files of subjects: read each of them once and list all damage instead of stopping at the first."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .bands import select_bands
from .fill_values import FillValues
from .georeference import find_georeference
from .pairing import broken_link, cubes_in, images_in, split_location
from .readers.arrays import Reading
from .readers.cube import Cube, read_cube, read_layout
from .readers.windows import Window
from .store.stored import StoredSubjects, Track
from .strips import strips_of
from .warp import Warp, find_warp


class Kind(str, Enum):
    """The kinds of findings; the last five are information, the others damage."""

    UNREADABLE = "unreadable"  # or truncated, or not what its suffix says
    EMPTY = "empty"  # no byte or no value
    NOT_FINITE = "not-finite"  # NaN or infinite values that the file does not declare as nodata
    NODATA = "nodata"  # nothing but nodata
    NODATA_BAND = "nodata-band"  # nothing but nodata in a band that other files have
    UNDECLARED_NODATA = "undeclared-nodata"  # a value that stands for nodata, and the file does not declare it
    CONSTANT = "constant"  # one value throughout the file, or throughout a band
    BANDS = "bands"  # another number of bands than the other files, or a requested band is missing
    WAVELENGTHS = "wavelengths"  # other wavelengths than the other files, or none where others have some
    MISALIGNED = "misaligned"  # an auxiliary image that does not overlap its cube, or whose aspect ratio is another
    DUPLICATE = "duplicate"  # the values of another subject
    SAME_STEM = "same-stem"  # a second file of a subject
    ORPHAN = "orphan"  # an auxiliary image without a cube
    SIZES = "sizes"  # cubes of several sizes, which need an image_size
    UNUSED_BAND = "unused-band"  # a band that is nodata in every file
    NO_AUXILIARY = "no-auxiliary"  # a cube without any auxiliary image
    RESAMPLED = "resampled"  # auxiliary images on other grids than their cubes, onto which they are resampled
    NOTE = "note"  # what the file says and a reader does not see: bands left out, values scaled

    @property
    def is_damage(self) -> bool:
        return self not in (Kind.SIZES, Kind.UNUSED_BAND, Kind.NO_AUXILIARY, Kind.RESAMPLED, Kind.NOTE)


@dataclass(frozen=True)
class Finding:
    """One finding; `subject` is empty if it concerns a whole folder."""

    kind: Kind
    modality: str
    subject: str
    path: Path
    reason: str


@dataclass
class _Examined:
    """A file with its findings, and the properties that are compared with other files."""

    modality: str
    subject: str
    path: Path
    bands: Sequence[int] | None
    reading: Reading
    findings: list[Finding] = field(default_factory=list)
    size: tuple[int, int] | None = None
    band_count: int | None = None
    wavelengths: tuple[float, ...] | None = None
    nodata_bands: frozenset[int] | None = None  # None if they are not compared
    digest: bytes | None = None

    def report(self, kind: Kind, reason: str) -> None:
        self.findings.append(Finding(kind, self.modality, self.subject, self.path, reason))

    def without_path(self, error: Exception) -> str:
        return str(error).removeprefix(f"{self.path}: ")


def check_files(
    hsi_dir: str | os.PathLike[str],
    aux: Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    tolerance: float = 10.0,
    reading: Mapping[str, Reading] | None = None,
    track: Track = iter,
) -> tuple[int, list[Finding]]:
    """Read every cube and auxiliary image once.

    Args:
        hsi_dir, aux: as in `PairedFolder`. Modalities of one folder are examined together, as "VV, VH".
        tolerance: largest difference in nm between the wavelengths of two files.
        reading: modality -> how its files are read, "hsi" for the cubes. Modalities of one folder take the first's.
        track: wraps the iteration over the files, to show progress.

    Returns:
        The number of files, and the findings in the order of modalities and files.

    Raises:
        ValueError: a folder does not exist or has no image, or an auxiliary modality is called "hsi".
    """
    if "hsi" in (aux or {}):
        raise ValueError('"hsi" is the name of the cubes; give the auxiliary modality another')
    how = dict(reading or {})
    hsi_dir = Path(hsi_dir)
    files = [_Examined("hsi", stem, path, None, how.get("hsi", {})) for stem, path in cubes_in(hsi_dir)]
    wanted = None if hsi_dir.is_dir() else {file.subject for file in files}  # all images, or those of one cube
    for modality, folder, bands in _folders(aux or {}):
        options = next((how[name] for name in modality.split(", ") if name in how), Reading())
        images = [(stem, path) for stem, path in images_in(modality, folder) if wanted is None or stem in wanted]
        files += [_Examined(modality, stem, path, bands, options) for stem, path in images]
    for number in track(range(len(files))):
        _examine(files[number])
    by_modality: dict[str, list[_Examined]] = defaultdict(list)
    for file in files:
        by_modality[file.modality].append(file)
    general = [finding for group in by_modality.values() for finding in _compare(group, tolerance)]
    cubes = {file.subject: file for file in reversed(by_modality["hsi"])}
    for modality, group in by_modality.items():
        if modality != "hsi":
            general += _pair(group, cubes)
    if aux:
        paired = {file.subject for file in files if file.modality != "hsi"}
        for subject, cube in cubes.items():
            if subject not in paired:
                cube.report(Kind.NO_AUXILIARY, "no auxiliary image has this stem")
    return len(files), [*(finding for file in files for finding in file.findings), *general]


def check_stored(subjects: StoredSubjects, *, track: Track = iter) -> list[Finding]:
    """Read every subject of a cache or shards once; return a finding for each that differs from what was written.

    Args:
        subjects: opened with `check_files=False`; otherwise opening them fails at a missing or truncated file.
        track: wraps the iteration over the subjects, to show progress.
    """
    findings = []
    for number in track(range(len(subjects))):
        try:
            subjects[number]
        except (ValueError, OSError) as error:
            path = subjects.file(number)
            reason = str(error).removeprefix(f"{path}: ") if path.is_file() else "is missing"
            findings.append(Finding(Kind.UNREADABLE, "", subjects.names[number], path, reason))
    return findings


def _folders(aux: Mapping[str, str | os.PathLike[str]]) -> Iterator[tuple[str, Path, Sequence[int] | None]]:
    """Yield each auxiliary folder once, with the names of its modalities and the bands they use, None for all."""
    places = {modality: split_location(location) for modality, location in aux.items()}
    for folder in dict.fromkeys(folder for folder, _ in places.values()):
        names = [name for name, place in places.items() if place[0] == folder]
        chosen = [places[name][1] for name in names]
        bands = None if None in chosen else sorted({band for some in chosen for band in some or ()})
        yield ", ".join(names), folder, bands


def _examine(file: _Examined) -> None:
    """Read a file in strips, as it stores its values, and report what shows without a comparison with others."""
    if (reason := broken_link(file.path)) is not None:
        file.report(Kind.UNREADABLE, reason)
        return
    try:
        layout = None if file.path.stat().st_size == 0 else read_layout(file.path, **file.reading)
    except (ValueError, OSError) as error:
        file.report(Kind.UNREADABLE, file.without_path(error))
        return
    if layout is None or 0 in layout.shape:
        file.report(Kind.EMPTY, "has no values")
        return
    for note in layout.notes:
        file.report(Kind.NOTE, note)
    values = _Values(layout.shape)
    for window in strips_of(file.path, layout.shape):
        cube = _read(file, window)
        if cube is None:
            return
        file.size = layout.shape[1:]
        try:
            cube = cube if file.bands is None else select_bands(cube, bands=file.bands)
        except ValueError as error:
            file.report(Kind.BANDS, str(error))
            return
        file.band_count = len(cube.values)
        file.wavelengths = None if cube.wavelengths is None else tuple(cube.wavelengths.tolist())
        values.add(cube)
    if not any(finding.kind is Kind.NOT_FINITE for finding in file.findings):  # NaN would look like nodata
        _judge(file, values)


def _read(file: _Examined, window: Window | None) -> Cube | None:
    reading = _as_stored(file)
    try:
        return read_cube(file.path, window=window, **reading)
    except (ValueError, OSError) as error:
        try:
            cube = read_cube(file.path, window=window, check_finite=False, **reading)
        except (ValueError, OSError):
            file.report(Kind.UNREADABLE, file.without_path(error))
            return None
        if not any(finding.kind is Kind.NOT_FINITE for finding in file.findings):
            file.report(Kind.NOT_FINITE, file.without_path(error))
        return cube


def _as_stored(file: _Examined) -> Reading:
    """Return how a file is read without its scale, so that a fill value is named as it is to be declared."""
    return {**file.reading, "scale": 1.0}


class _Values:
    """Minimum and maximum `[T]` of a file's values, and a sample of its pixels, gathered strip by strip."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        self.fill = FillValues(shape[1] * shape[2], shape[0])

    @property
    def empty(self) -> Tensor:
        """Whether a band has nothing but nodata, `[T]`."""
        return self.low > self.high

    def add(self, cube: Cube) -> None:
        values, hidden = cube.values.flatten(1).numpy(), cube.nodata.flatten(1).numpy()
        lowest = highest = values
        if hidden.any():
            lowest, highest = np.where(hidden, np.inf, values), np.where(hidden, -np.inf, values)
        low, high = torch.from_numpy(lowest.min(1)), torch.from_numpy(highest.max(1))  # NumPy's are four times faster
        self.low, self.high = self.low.minimum(low), self.high.maximum(high)
        self.fill.add(cube, low, high)

    def digest(self, shape: tuple[int, int] | None) -> bytes:
        """Return what is the same for files of the same values, and hardly ever for others."""
        digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
        for values in (self.low.numpy(), self.high.numpy(), self.fill.sample):
            digest.update(np.ascontiguousarray(values).data)
        return digest.digest()


def _judge(file: _Examined, values: _Values) -> None:
    if values.empty.all():
        file.report(Kind.NODATA, "has nothing but nodata")
        return
    file.nodata_bands = frozenset(values.empty.nonzero()[:, 0].tolist())
    constant = values.low == values.high
    if (constant | values.empty).all():
        listing = ", ".join(f"{value:g}" for value in values.low[constant].tolist()[:8])
        file.report(Kind.CONSTANT, f"one value throughout each band: {listing}")
        return
    if constant.any():
        file.report(Kind.CONSTANT, f"one value throughout {_bands(constant.nonzero()[:, 0].tolist())}")
    for value, share in values.fill.found():
        reason = f"{value:.9g} in {share} is undeclared nodata: declare it in the file, or say so by nodata= (--nodata)"
        file.report(Kind.UNDECLARED_NODATA, reason)
    file.digest = values.digest(file.size)


def _compare(files: Sequence[_Examined], tolerance: float) -> Iterator[Finding]:
    """Compare the files of one modality; report to each file, and yield what concerns the folder."""
    stems: dict[str, Path] = {}
    digests: dict[bytes, _Examined] = {}
    for file in files:
        if file.path != stems.setdefault(file.subject, file.path):
            file.report(Kind.SAME_STEM, f"the subject already has {stems[file.subject]}")
        if file.digest is not None:
            first = digests.setdefault(file.digest, file)
            if first.subject != file.subject and _same_values(first, file):
                file.report(Kind.DUPLICATE, f"has the values of {first.path}")
    counts = Counter(file.band_count for file in files if file.band_count is not None)
    usual = counts.most_common(1)[0][0] if counts else 0
    alike = [file for file in files if file.band_count == usual]
    for file in files:
        if file.band_count not in (None, usual):
            file.report(
                Kind.BANDS, f"has {file.band_count} bands, {counts[usual]} of {sum(counts.values())} have {usual}"
            )
    known = Counter(file.wavelengths for file in alike if file.wavelengths is not None)
    reference = torch.tensor(known.most_common(1)[0][0] if known else ())
    for file in alike:
        if known and file.wavelengths is None:
            file.report(Kind.WAVELENGTHS, "has none, others have")
        elif file.wavelengths is not None:
            difference = float((torch.tensor(file.wavelengths) - reference).abs().max())
            if difference > tolerance:
                file.report(Kind.WAVELENGTHS, f"differs from the usual wavelengths by up to {difference:g} nm")
    counted = [(file, file.nodata_bands) for file in alike if file.nodata_bands is not None]
    unused = frozenset.intersection(*(bands for _, bands in counted)) if counted else frozenset()
    for file, bands in counted:
        if bands - unused:
            file.report(Kind.NODATA_BAND, f"nothing but nodata in {_bands(bands - unused)}")
    first = files[0]
    sizes = Counter(file.size for file in files if file.size is not None)
    if first.modality == "hsi" and len(sizes) > 1:
        listing = ", ".join(f"{count} of {height} x {width}" for (height, width), count in sizes.most_common(5))
        reason = f"cubes of {len(sizes)} sizes, {listing}: they need an image size when they are read"
        yield Finding(Kind.SIZES, first.modality, "", first.path.parent, reason)
    if unused:
        reason = f"nothing but nodata in {_bands(unused)} of every file: left out when cubes are read"
        yield Finding(Kind.UNUSED_BAND, first.modality, "", first.path.parent, reason)


def _same_values(one: _Examined, two: _Examined) -> bool:
    """Read two files of equal digests again and compare all of their values."""
    layout = read_layout(one.path, **one.reading)
    for window in strips_of(one.path, layout.shape):
        cubes = [read_cube(file.path, window=window, **_as_stored(file)) for file in (one, two)]
        if not torch.equal(cubes[0].values, cubes[1].values) or not torch.equal(cubes[0].nodata, cubes[1].nodata):
            return False
    return True


def _pair(files: Sequence[_Examined], cubes: Mapping[str, _Examined]) -> Iterator[Finding]:
    """Compare auxiliary images with their cubes; report to each, and yield in which ways they are resampled."""
    resampled: dict[str, list[_Examined]] = defaultdict(list)
    for file in files:
        cube = cubes.get(file.subject)
        if cube is None:
            file.report(Kind.ORPHAN, "no cube has this stem")
        elif file.size is not None and cube.size is not None:
            warp = _compare_places(file, file.size, cube, cube.size)
            if warp is not None:
                resampled[warp.differences].append(file)
    for differences, group in resampled.items():
        reason = f"{len(group)} of {len(files)} files, such as {group[0].path.name}, have {differences}: resampled by "
        reason += "position onto the grids of their cubes"
        yield Finding(Kind.RESAMPLED, group[0].modality, "", group[0].path.parent, reason)


def _compare_places(file: _Examined, size: tuple[int, int], cube: _Examined, cube_size: tuple[int, int]) -> Warp | None:
    """Compare an image with its cube by position, or by aspect if one of them does not tell where it lies."""
    image_place, cube_place = find_georeference(file.path), find_georeference(cube.path)
    if image_place is None or image_place.size != size or cube_place is None or cube_place.size != cube_size:
        (height, width), (rows, columns) = cube_size, size
        if abs(rows - columns * height / width) > 1 and abs(columns - rows * width / height) > 1:
            reason = f"is {rows} x {columns}, its cube {height} x {width}: the aspect ratios differ"
            file.report(Kind.MISALIGNED, reason)
        return None
    try:
        return find_warp(image_place, cube_place)
    except ValueError as error:
        file.report(Kind.MISALIGNED, str(error))
        return None


def _bands(numbers: Iterable[int]) -> str:
    listing = sorted(numbers)
    return f"band{'s' if len(listing) > 1 else ''} {', '.join(map(str, listing))}"
