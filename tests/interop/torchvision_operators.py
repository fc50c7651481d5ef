"""Make torchvision importable where it can't load its operators; import this module before anything that imports it.

A torchvision that was built for CUDA can't load them beside a PyTorch for CPUs, and its import fails where it describes
two of them. None is used in these tests.
"""

import importlib
import importlib.util

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
if importlib.util.find_spec("torchvision") is not None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in ("nms", "qnms"):
            LIBRARY.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
