"""An image that lies elsewhere than its cube is never paired with it in silence."""

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine, from_origin

from mmmae.cli import main
from mmmae.data import PairedFolder
from mmmae.data.georeference import elsewhere, find_georeference
from mmmae.training.finetuning.labels import read_mask_labels

PLACE = from_origin(366000, 5809000, 30, 30)
UTM33 = "EPSG:32633"


def write(path, transform=PLACE, size=32, crs=UTM33, bands=1, driver="GTiff"):
    path.parent.mkdir(exist_ok=True)
    options = {"width": size, "height": size, "count": bands, "dtype": "float32", "crs": crs, "transform": transform}
    with rasterio.open(path, "w", driver=driver, **options) as file:
        file.write(np.random.default_rng(0).integers(1, 4, (bands, size, size)).astype("f4"))
    return path


ELSEWHERE = {
    "disjoint": ({"transform": from_origin(999000, 5809000, 30, 30)}, "its upper left corner is at 999000, 5809000"),
    "a pixel off": ({"transform": from_origin(366030, 5809000, 30, 30)}, "its upper left corner is at 366030, 5809000"),
    "three times the footprint": ({"size": 96}, "its lower right corner is at 368880, 5806120"),
    "south up": ({"transform": Affine(30, 0, 366000, 0, 30, 5809000 - 960)}, "its rows or columns run the other way"),
    "another CRS": ({"crs": "EPSG:32632"}, "lies in EPSG:32632, its cube in EPSG:32633"),
    "turned by 45 degrees": ({"transform": PLACE @ Affine.rotation(45)}, "its lower right corner is at 366000"),
}
SAME = {
    "same grid": {},
    "half the resolution": {"transform": from_origin(366000, 5809000, 60, 60), "size": 16},
    "a quarter of a pixel off": {"transform": from_origin(366007.5, 5809000, 30, 30)},
    "no place": {"crs": None, "transform": Affine.identity()},
}


@pytest.mark.parametrize("driver", ["GTiff", "ENVI"])
@pytest.mark.parametrize(("change", "message"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_an_image_of_another_place_is_refused_and_found(tmp_path, capsys, change, message, driver):
    suffix = ".tif" if driver == "GTiff" else ".img"
    write(tmp_path / "hsi" / f"a{suffix}", bands=3, driver=driver)
    write(tmp_path / "ir" / f"a{suffix}", **change, driver=driver)
    data = PairedFolder(tmp_path / "hsi", {"ir": tmp_path / "ir"}, image_size=32)
    with pytest.raises(ValueError, match=rf"modality 'ir', subject 'a': .*{message}"):
        data.normalization  # noqa: B018
    assert main(["data", "check", "--hsi", str(tmp_path / "hsi"), "--aux", f"ir={tmp_path / 'ir'}"]) == 1
    assert message in capsys.readouterr().out
    with pytest.raises(ValueError, match=message):
        read_mask_labels(tmp_path / "ir", PairedFolder(tmp_path / "hsi", image_size=32))


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_an_image_of_the_same_place_is_read(tmp_path, change):
    write(tmp_path / "hsi" / "a.tif", bands=3)
    write(tmp_path / "ir" / "a.tif", **change)
    data = PairedFolder(tmp_path / "hsi", {"ir": tmp_path / "ir"}, image_size=32)
    assert sorted(data[0].aux) == ["ir"]
    assert read_mask_labels(tmp_path / "ir", PairedFolder(tmp_path / "hsi", image_size=32)).classes == ["1", "2", "3"]


def test_images_that_are_both_south_up_lie_in_one_place(tmp_path):
    place = find_georeference(write(tmp_path / "a.tif", Affine(30, 0, 366000, 0, 30, 5808040)))
    assert elsewhere(place, place) is None
    assert elsewhere(place, None) is None


def test_heights_of_a_reference_system_do_not_count(tmp_path):
    write(tmp_path / "hsi" / "a.tif", bands=3)
    write(tmp_path / "ir" / "a.tif", crs="EPSG:32633+5773")
    write(tmp_path / "other" / "a.tif", crs="EPSG:32632+5773")
    cube, image, other = (find_georeference(tmp_path / name / "a.tif") for name in ("hsi", "ir", "other"))
    assert image.crs != cube.crs
    assert elsewhere(image, cube) is None
    assert elsewhere(cube, image) is None
    assert "its cube in" in elsewhere(other, image)
