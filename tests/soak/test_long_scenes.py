"""Maps of a scene that is twenty times as long need no more memory."""

import subprocess
import sys

import numpy as np
import rasterio
import torch
from rasterio.transform import Affine
from rasterio.windows import Window

import mmmae
from mmmae.data import Normalization
from mmmae.model.finetuned import build, save_finetuned

CLASSES = [f"class {number}" for number in range(16)]
CODE = """
import resource, sys
from mmmae.cli import main
assert main(sys.argv[1:]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write_strip(path, height):
    options = {"driver": "GTiff", "count": 12, "height": height, "width": 200, "dtype": "float32"}
    options |= {"crs": "EPSG:32632", "transform": Affine(30, 0, 5e5, 0, -30, 5e6), "interleave": "band"}
    rng = np.random.default_rng(0)
    with rasterio.open(path, "w", tiled=True, blockxsize=256, blockysize=256, **options) as file:
        for row in range(0, height, 1000):
            file.write(rng.random((12, 1000, 200), dtype=np.float32), window=Window(0, row, 200, 1000))


def peak(folder, name):
    """Predict a scene in a process of its own; return its largest resident memory in MiB."""
    options = ["--model", str(folder / "model"), "--hsi", str(folder / name), "--out", str(folder / "maps")]
    command = [sys.executable, "-c", CODE, "predict", *options, "--probabilities"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(printed.rsplit("peak", 1)[1])


def test_the_memory_of_a_map_does_not_grow_with_the_scene(tmp_path):
    torch.manual_seed(0)
    config = mmmae.MMMAEConfig.preset("tiny", image_size=64, patch=(3, 8, 8), aux={})
    save_finetuned(tmp_path / "model", build("segmentation", mmmae.HSIEncoder(config), len(CLASSES)), CLASSES)
    Normalization({"hsi": ((0.0, 0.5, 1.0),) * 12}).save(tmp_path / "model" / "normalization.json")
    for name, height in (("short.tif", 1000), ("long.tif", 20_000)):
        write_strip(tmp_path / name, height)
    short, long = peak(tmp_path, "short.tif"), peak(tmp_path, "long.tif")
    print(f"{short} MiB for 1,000 rows, {long} MiB for 20,000")
    assert long - short < 80, (short, long)  # the cube has 183 MiB, the probabilities 244
    with rasterio.open(tmp_path / "maps" / "long_probabilities.tif") as file:
        assert (file.shape, file.count) == ((20_000, 200), 16)
        assert np.isfinite(file.read(1, window=Window(0, 19_900, 200, 100))).all()
