"""An image that lies elsewhere than its cube is never paired with it in silence."""

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine, from_origin

from mmmae.cli import main
from mmmae.data import PairedFolder
from mmmae.data.georeference import find_georeference
from mmmae.data.warp import find_warp
from mmmae.training.finetuning.labels import read_mask_labels

PLACE = from_origin(366000, 5809000, 30, 30)
UTM33 = "EPSG:32633"
LOCAL = 'LOCAL_CS["a plant",UNIT["metre",1]]'


def write(path, transform=PLACE, size=32, crs=UTM33, bands=1, driver="GTiff"):
    path.parent.mkdir(exist_ok=True)
    options = {"width": size, "height": size, "count": bands, "dtype": "float32", "crs": crs, "transform": transform}
    with rasterio.open(path, "w", driver=driver, **options) as file:
        file.write(np.random.default_rng(0).integers(1, 4, (bands, size, size)).astype("f4"))
    return path


ELSEWHERE = {
    "far away": {"transform": from_origin(999000, 5809000, 30, 30)},
    "beside it": {"transform": from_origin(366000 + 960, 5809000, 30, 30)},
    "in the zone beside it": {"crs": "EPSG:32632"},
    "where its reference system does not reach": {"crs": "EPSG:4326", "transform": from_origin(-170, 95, 0.1, 0.1)},
    "in a system of its own": {"crs": LOCAL},
}
SAME = {
    "same grid": {},
    "half the resolution": {"transform": from_origin(366000, 5809000, 60, 60), "size": 16},
    "a quarter of a pixel off": {"transform": from_origin(366007.5, 5809000, 30, 30)},
    "another datum of less than a metre": {"crs": "EPSG:25833"},
    "no place": {"crs": None, "transform": Affine.identity()},
}


@pytest.mark.parametrize("driver", ["GTiff", "ENVI"])
@pytest.mark.parametrize("change", ELSEWHERE.values(), ids=ELSEWHERE)
def test_an_image_that_does_not_overlap_its_cube_is_refused_and_found(tmp_path, capsys, change, driver):
    suffix, message = ".tif" if driver == "GTiff" else ".img", "does not overlap its cube: "
    write(tmp_path / "hsi" / f"a{suffix}", bands=3, driver=driver)
    write(tmp_path / "ir" / f"a{suffix}", **change, driver=driver)
    with pytest.raises(ValueError, match=rf"modality 'ir', subject 'a': .*{message}"):
        PairedFolder(tmp_path / "hsi", {"ir": tmp_path / "ir"}, image_size=32)
    assert main(["data", "check", "--hsi", str(tmp_path / "hsi"), "--aux", f"ir={tmp_path / 'ir'}"]) == 1
    assert message in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"subject 'a': {message}"):
        read_mask_labels(tmp_path / "ir", PairedFolder(tmp_path / "hsi", image_size=32))


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_an_image_of_the_same_place_is_read_as_it_is(tmp_path, monkeypatch, change):
    monkeypatch.setattr("mmmae.data.warp.Warp.read", lambda *_, **__: pytest.fail("resampled"))
    write(tmp_path / "hsi" / "a.tif", bands=3)
    write(tmp_path / "ir" / "a.tif", **change)
    data = PairedFolder(tmp_path / "hsi", {"ir": tmp_path / "ir"}, image_size=32)
    assert sorted(data[0].aux) == ["ir"]
    assert read_mask_labels(tmp_path / "ir", PairedFolder(tmp_path / "hsi", image_size=32)).classes == ["1", "2", "3"]


def test_places_are_compared_once_a_pair_and_not_for_each_window(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("mmmae.data.image_files.find_georeference", lambda path: looked.append(path.parent.name))
    for name in ("hsi", "ir"):
        write(tmp_path / name / "a.tif")
    data = PairedFolder(tmp_path / "hsi", {"ir": tmp_path / "ir"}, tile=8)
    for index in range(len(data)):
        data[index]
    assert looked == ["ir"]


def test_images_that_are_both_south_up_lie_in_one_place(tmp_path):
    place = find_georeference(write(tmp_path / "a.tif", Affine(30, 0, 366000, 0, 30, 5808040)))
    assert find_warp(place, place) is None
    assert find_warp(place, None) is None


def test_heights_of_a_reference_system_do_not_count(tmp_path):
    write(tmp_path / "hsi" / "a.tif", bands=3)
    write(tmp_path / "ir" / "a.tif", crs="EPSG:32633+5773")
    cube, image = (find_georeference(tmp_path / name / "a.tif") for name in ("hsi", "ir"))
    assert image.crs == cube.crs
    assert find_warp(image, cube) is None


def test_a_transform_without_inverse_is_no_georeference(tmp_path):
    assert find_georeference(write(tmp_path / "a.tif", Affine(30, 30, 366000, 30, 30, 5809000))) is None
