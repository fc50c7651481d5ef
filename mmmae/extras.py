"""The extras of this package: which of them brings a package that only some commands need."""

from __future__ import annotations

EXTRAS = {
    "train": ("lightning", "torchmetrics", "matplotlib", "rich"),
    "data": ("rasterio", "scipy", "h5py", "tifffile"),
    "profile": ("fvcore",),
    "tensorboard": ("tensorboard",),
    "shards": ("webdataset",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """Return in one line which extra brings the module that was not found, or None if none does."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return f"needs {package}: pip install 'mmmae[{extra}]'"
    return None
