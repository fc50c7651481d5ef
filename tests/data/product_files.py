"""Small files with the layouts of sensors' products, and what must be read from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import netCDF4
import numpy as np
import rasterio

Array = np.ndarray[Any, Any]


class Product(NamedTuple):
    """A file, and its values `[T, H, W]` in float64, where they are nodata, and its wavelengths."""

    path: Path
    values: Array
    nodata: Array
    wavelengths: Array


def emit(folder: Path, rng: np.random.Generator) -> Product:
    cube = rng.uniform(0, 0.6, (18, 20, 30)).astype("f4")  # downtrack, crosstrack, bands
    cube[:2] = -9999
    nm, good = np.linspace(381, 2493, 30).astype("f4"), np.ones(30, "u1")
    good[12:15] = 0
    path = folder / "EMIT_L2A_RFL_001_20220816T191124.nc"
    with netCDF4.Dataset(path, "w") as file:
        for name, size in zip(("downtrack", "crosstrack", "bands"), cube.shape, strict=True):
            file.createDimension(name, size)
        variable = file.createVariable("reflectance", "f4", ("downtrack", "crosstrack", "bands"), fill_value=-9999)
        variable[:] = cube
        group = file.createGroup("sensor_band_parameters")
        for name, kind, data in (
            ("wavelengths", "f4", nm),
            ("fwhm", "f4", nm * 0 + 8),
            ("good_wavelengths", "u1", good),
        ):
            group.createVariable(name, kind, ("bands",))[:] = data
        group["wavelengths"].units = "nm"
        file.createGroup("location").createVariable("lat", "f8", ("downtrack", "crosstrack"))[:] = 1
    values = cube.transpose(2, 0, 1)
    return Product(path, values, (values == -9999) | (good == 0)[:, None, None], nm)


def pace_l1b(folder: Path, rng: np.random.Generator) -> Product:
    detectors = {
        "blue": np.linspace(315, 606, 8),
        "red": np.linspace(600, 895, 7),
        "SWIR": np.array([940.0, 1250, 1250]),
    }
    path = folder / "PACE_OCI.20240605T103145.L1B.nc"
    parts = []
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("scans", 18)
        file.createDimension("pixels", 20)
        data, parameters = file.createGroup("observation_data"), file.createGroup("sensor_band_parameters")
        for name, nm in detectors.items():
            file.createDimension(f"{name}_bands", len(nm))
            parameters.createVariable(f"{name}_wavelength", "f4", (f"{name}_bands",))[:] = nm
            cube = rng.uniform(0, 1, (len(nm), 18, 20)).astype("f4")
            cube[:, :, 3] = -32767
            for quantity, kind in (("rhot", "f4"), ("qual", "u1")):
                size = (f"{name}_bands", "scans", "pixels")
                fill = -32767 if quantity == "rhot" else 255
                data.createVariable(f"{quantity}_{name}", kind, size, fill_value=fill)[:] = cube if kind == "f4" else 0
            parts.append(cube)
    values, nm = np.concatenate(parts), np.concatenate(list(detectors.values()))
    order = np.argsort(nm, kind="stable")
    return Product(path, values[order], values[order] == -32767, nm[order])


def pace_l2(folder: Path, rng: np.random.Generator) -> Product:
    stored = rng.integers(-20000, 20000, (18, 20, 9)).astype("i2")
    stored[4] = -32767
    nm = np.linspace(346, 2258, 9)
    path = folder / "PACE_OCI.20240605T103145.L2.SFREFL.nc"
    with netCDF4.Dataset(path, "w") as file:
        for name, size in (("number_of_lines", 18), ("pixels_per_line", 20), ("wavelength_3d", 9)):
            file.createDimension(name, size)
        group = file.createGroup("geophysical_data")
        axes = ("number_of_lines", "pixels_per_line", "wavelength_3d")
        for name in ("rhos", "rhos_unc"):
            variable = group.createVariable(name, "i2", axes, fill_value=-32767)
            variable.scale_factor, variable.add_offset = np.float32(2e-5), np.float32(0.5)
            variable.set_auto_scale(False)
            variable[:] = stored
        parameters = file.createGroup("sensor_band_parameters")
        parameters.createVariable("wavelength_3d", "i4", ("wavelength_3d",))[:] = nm
    values = stored.transpose(2, 0, 1) * np.float64(np.float32(2e-5)) + 0.5
    return Product(path, values, stored.transpose(2, 0, 1) == -32767, nm.astype("i4"))


def aviris(folder: Path, rng: np.random.Generator) -> Product:
    cube = rng.uniform(0, 0.6, (30, 18, 20)).astype("f4")
    cube[:, 1, 2] = -9999
    nm = np.linspace(377, 2500, 30)
    path = folder / "AV320240817t202135_000_L2A_OE_main_RFL_ORT.nc"
    with netCDF4.Dataset(path, "w") as file:
        for name, size in (("wavelength", 30), ("northing", 18), ("easting", 20)):
            file.createDimension(name, size)
        group = file.createGroup("reflectance")
        group.createVariable("reflectance", "f4", ("wavelength", "northing", "easting"), fill_value=-9999)[:] = cube
        group.createVariable("wavelength", "f4", ("wavelength",))[:] = nm
        group.createVariable("fwhm", "f4", ("wavelength",))[:] = nm * 0 + 7
    return Product(path, cube, cube == -9999, nm.astype("f4"))


def neon(folder: Path, rng: np.random.Generator) -> Product:
    cube = rng.integers(0, 9000, (18, 20, 30)).astype("i2")
    cube[:, :3] = -9999
    nm = np.linspace(383, 2512, 30).astype("f4")
    path = folder / "NEON_D01_HARV_DP3_726000_4699000_reflectance.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("HARV/Reflectance")
        data = group.create_dataset("Reflectance_Data", data=cube)
        data.attrs["Data_Ignore_Value"], data.attrs["Scale_Factor"] = -9999.0, 10000.0
        group["Metadata/Spectral_Data/Wavelength"] = nm
        group["Metadata/Spectral_Data/Wavelength"].attrs["Units"] = "nanometers"
        group["Metadata/Spectral_Data/FWHM"] = nm * 0 + 5
        group["Metadata/Ancillary_Imagery/Weather_Quality_Indicator"] = np.zeros((18, 20, 3), "u1")
    values = cube.transpose(2, 0, 1)
    return Product(path, values / 10000, values == -9999, nm)


def prisma(level: str) -> Callable[[Path, np.random.Generator], Product]:
    def write(folder: Path, rng: np.random.Generator) -> Product:
        path = folder / f"PRS_{level}_STD_20201214060713_20201214060717_0001.he5"
        centres = {"Vnir": np.array([0, 0, 972.6, 700.5, 402.4]), "Swir": np.array([2497.1, 1500.2, 943.4, 0])}
        parts, masks, found = [], [], []
        with h5py.File(path, "w") as file:
            for detector, nm in centres.items():
                stored = rng.integers(1, 65535, (18, len(nm), 20)).astype("u2")  # lines, bands, samples
                stored[0] = 0
                fields = f"HDFEOS/SWATHS/PRS_{level}_HCO/Data Fields"
                file[f"{fields}/{detector.upper()}_Cube"] = stored
                file[f"{fields}/{detector.upper()}_PIXEL_SAT_ERR_MATRIX"] = np.zeros(stored.shape, "u1")
                file.attrs[f"List_Cw_{detector}"] = nm.astype("f4")
                values = stored.transpose(1, 0, 2)[nm > 0].astype("f8")
                masks.append((values == 0) & (level != "L1"))
                if level == "L1":
                    file.attrs[f"ScaleFactor_{detector}"], file.attrs[f"Offset_{detector}"] = (
                        np.float32(100),
                        np.float32(0),
                    )
                    parts.append(values / 100)
                else:
                    low, high = (0.01, 0.9) if detector == "Vnir" else (0.02, 0.7)
                    file.attrs[f"L2Scale{detector}Min"], file.attrs[f"L2Scale{detector}Max"] = low, high
                    parts.append(low + values * (high - low) / 65535)
                found.append(nm[nm > 0].astype("f4"))
            file[f"HDFEOS/SWATHS/PRS_{level}_PCO/Data Fields/Cube"] = np.zeros((108, 120), "u2")
        nm = np.concatenate(found)
        order = np.argsort(nm)
        return Product(path, np.concatenate(parts)[order], np.concatenate(masks)[order], nm[order])

    return write


def tanager(folder: Path, rng: np.random.Generator) -> Product:
    cube = rng.uniform(0, 0.6, (30, 18, 20)).astype("f4")
    cube[:, 3] = -9999
    nm = np.linspace(376, 2499, 30)
    path = folder / "20241007_191056_00_4001_ortho_sr_hdf5.h5"
    with h5py.File(path, "w") as file:
        fields = file.create_group("HDFEOS/SWATHS/HYP/Data Fields")
        for name in ("surface_reflectance", "surface_reflectance_uncertainty"):
            data = fields.create_dataset(name, data=cube)
            data.attrs["_FillValue"], data.attrs["wavelengths"] = np.float32(-9999), nm
    return Product(path, cube, cube == -9999, nm.astype("f4"))


ENMAP_BAND = (
    "<bandID number='{number}'><wavelengthCenterOfBand>{nm}</wavelengthCenterOfBand><FWHMOfBand>7</FWHMOfBand>"
    "<GainOfBand>{gain}</GainOfBand><OffsetOfBand>{offset}</OffsetOfBand></bandID>"
)
DESIS_BAND = (
    "<band><bandNumber>{number}</bandNumber><wavelengthCenterOfBand>{nm}</wavelengthCenterOfBand>"
    "<wavelengthWidthOfBand>3</wavelengthWidthOfBand><gainOfBand>{gain}</gainOfBand>"
    "<offsetOfBand>{offset}</offsetOfBand></band>"
)


def with_xml(scene: str, band: str) -> Callable[[Path, np.random.Generator], Product]:
    def write(folder: Path, rng: np.random.Generator) -> Product:
        stored = rng.integers(0, 9000, (12, 18, 20)).astype("i2")
        stored[:, 2:4] = -32768
        nm, gains, offsets = np.linspace(418, 2445, 12), np.full(12, 1e-4), np.linspace(0, 0.1, 12)
        listed = "".join(
            band.format(number=number, nm=values[0], gain=values[1], offset=values[2])
            for number, values in enumerate(zip(nm.tolist(), gains.tolist(), offsets.tolist(), strict=True), start=1)
        )
        specific = f"<specific><bandCharacterisation>{listed}</bandCharacterisation>"
        background = "<backgroundValue>-32768</backgroundValue></specific>"
        (folder / f"{scene}-METADATA.XML").write_text(f"<level_X>{specific}{background}</level_X>")
        path = folder / f"{scene}-SPECTRAL_IMAGE.TIF"
        options = {
            "height": 18,
            "width": 20,
            "count": 12,
            "dtype": "int16",
            "transform": rasterio.Affine(30, 0, 0, 0, -30, 0),
        }
        with rasterio.open(path, "w", driver="GTiff", **options) as target:
            target.write(stored)
        values = stored * gains[:, None, None] + offsets[:, None, None]
        return Product(path, values, stored == -32768, nm.astype("f4"))

    return write


def envi(name: str, interleave: str, scale: float, unit: str) -> Callable[[Path, np.random.Generator], Product]:
    def write(folder: Path, rng: np.random.Generator) -> Product:
        stored = rng.integers(1, 9000, (30, 18, 20)).astype(">i2")
        nm = np.linspace(366, 2496, 30)
        path = folder / name
        order = {"bil": (1, 0, 2), "bip": (1, 2, 0), "bsq": (0, 1, 2)}[interleave]
        path.write_bytes(stored.transpose(order).tobytes())
        listed = ", ".join(str(value / (1000 if unit == "Micrometers" else 1)) for value in nm)
        path.with_name(name + ".hdr").write_text(
            f"ENVI\nsamples = 20\nlines = 18\nbands = 30\nheader offset = 0\ndata type = 2\ninterleave = {interleave}\n"
            f"byte order = 1\nwavelength units = {unit}\nwavelength = {{{listed}}}\n"
            + (f"reflectance scale factor = {scale:g}\n" if scale != 1 else "")
        )
        return Product(path, stored.astype("f8") / scale, np.zeros(stored.shape, bool), nm.astype("f4"))

    return write


PRODUCTS: dict[str, Callable[[Path, np.random.Generator], Product]] = {
    "EMIT L2A": emit,
    "PACE OCI L1B": pace_l1b,
    "PACE OCI L2": pace_l2,
    "AVIRIS-3": aviris,
    "NEON": neon,
    "PRISMA L1": prisma("L1"),
    "PRISMA L2C": prisma("L2C"),
    "PRISMA L2D": prisma("L2D"),
    "Tanager": tanager,
    "EnMAP L2A": with_xml("ENMAP01-____L2A-DT0000001867_20220724T104526Z_008_V010302_20230628T165614Z", ENMAP_BAND),
    "DESIS L2A": with_xml("DESIS-HSI-L2A-DT0884573241_001-20210829T123456-V0215", DESIS_BAND),
    "AVIRIS-Classic": envi("f080611t01p00r06rdn_c_sc01_ort.img", "bip", 1, "Nanometers"),
    "AVIRIS reflectance": envi("f130503t01p00r11_refl.img", "bil", 10000, "Micrometers"),
    "Hyperion": envi("EO1H0440342002212110PY.dat", "bil", 1, "Nanometers"),
}
