"""Bytes and FLOPs of a launch by formula: each byte that it must read or write, and two FLOPs a multiply-add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..gpu.config import Launch


def cost(launch: Launch) -> tuple[int, int]:
    """Return FLOPs and bytes of a launch."""
    arguments = launch.arguments
    kernel = launch.kernel.fn.__name__.lstrip("_")
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    moved = {name: value.numel() * value.element_size() for name, value in tensors.items()}
    if "counter_ptr" in tensors and "partial_ptr" in tensors:
        moved["partial_ptr"] *= 2  # stored, and added up at the end
    flops = 0
    rows, width = arguments.get("ROWS", 0), arguments.get("D", 0)
    if "P" in arguments:
        flops = 2 * rows * width * arguments["P"]
        for volume in ("volume_ptr", "grad_volume_ptr"):
            if volume in tensors:  # only the asked patches
                moved[volume] = rows * arguments["P"] * tensors[volume].element_size()
        if "position_ptr" in tensors:
            moved["position_ptr"] = rows * width * tensors["position_ptr"].element_size()
    if kernel.startswith("masked_l2"):  # of the target only the rows that a prediction has
        target = tensors["target_ptr"]
        moved["target_ptr"] = arguments["prediction_ptr"].numel() * target.element_size()
        flops = 3 * arguments["prediction_ptr"].numel()
    elif kernel.startswith("add_layer_norm"):
        flops = _elements(arguments, "x_ptr", "total_ptr") * (8 if kernel.endswith("forward") else 14)
    elif kernel.startswith("decoder_tokens"):
        flops = _elements(arguments, "out_ptr", "grad_ptr")
    elif kernel.startswith("sum_partials"):
        flops = tensors["partial_ptr"].numel()
    elif kernel.startswith("gelu"):
        # Forward one transcendental function as a polynomial, backward two.
        flops = (30 if kernel.endswith("backward") else 15) * tensors["hidden_ptr"].numel()
        moved |= {"grad_ptr": 2 * moved["grad_ptr"]} if "grad_ptr" in moved else {}  # read, and written in place
    elif kernel.startswith("merge_vectors"):
        written = "grad_q_ptr" if kernel.endswith("backward") else "out_ptr"
        moved[written] *= 2  # read, and written in place
        products = 5 if kernel.endswith("backward") else 2
        flops = 2 * products * tensors["q_ptr"].numel() * arguments["M"]
    return flops, sum(moved.values())


def _elements(arguments: Mapping[str, Any], *names: str) -> int:
    return int(next(arguments[name].numel() for name in names if isinstance(arguments.get(name), Tensor)))
