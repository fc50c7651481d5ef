"""Export of encoders for use without this package, as programs of torch.export or as ONNX models."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ..files import check_can_write, write_atomically
from .encoder import HSIEncoder
from .reference import ReferenceModel

OPSET = 18  # of ONNX 1.13, from 2022; an encoder needs no later one
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_BYTES = 2**31  # the limit of a protobuf file
TOLERANCE = 1e-4  # absolute; tokens come from a norm, and their channels are of size 1
DYNAMIC = {"hsi": {0: Dim("batch")}}
TRACED, CHECKED = 2, (1, 3)  # batch sizes

Run: TypeAlias = Callable[[Tensor], Tensor]


def export_encoder(encoder: HSIEncoder, path: str | Path) -> float:
    """Check and write an encoder as a program for `torch.export.load` or as an ONNX model.

    The input is `hsi [batch, C, T, image_size, image_size]`, already resized, and the output is `tokens [batch, N, D]`,
    both float32 and for any batch size. The file has only operators of PyTorch or ONNX and runs without this package.

    Args:
        encoder: float32, on the CPU; it is not changed.
        path: `NAME.pt2` or `NAME.onnx`, in a folder that exists; the suffix decides the format.

    Returns:
        The largest absolute difference between the tokens from the file and from the encoder, on random volumes.

    Raises:
        ValueError: the suffix is another, the weights are not float32 on the CPU, packages for ONNX are missing, or
            the difference is above 1e-4. Nothing is written then.
        OSError: the file can't be written.

    Example:
        >>> encoder = mmmae.fast_model("tiny").hsi_encoder()
        >>> difference = mmmae.export_encoder(encoder, folder / "encoder.pt2")
        >>> difference < 1e-4
        True
        >>> program = torch.export.load(folder / "encoder.pt2").module()
        >>> program(torch.randn(5, 1, 12, 224, 224)).shape
        torch.Size([5, 784, 64])
    """
    path = Path(path)
    check_export(path)
    for name, parameter in encoder.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(f"{name} is {parameter.dtype} on {parameter.device}, expected torch.float32 on cpu")
    program = _plain_program(encoder)
    content, run = _to_onnx(path, program) if path.suffix == ".onnx" else _to_pt2(program)
    difference = float(torch.tensor([_difference(encoder, run, batch) for batch in CHECKED]).max())  # NaN if one is
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{path}: not written: the tokens differ from the encoder's by {difference:.1e}, expected at most "
            f"{TOLERANCE:.0e}"
        )
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return difference


def check_export(path: Path) -> None:
    """Raise the errors of `export_encoder` that concern the path, before an encoder is read."""
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"{path}: the suffix is {path.suffix!r}, expected .pt2 (torch.export) or .onnx")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: expected a file in a folder that exists")
    check_can_write(path.absolute().parent)
    missing = [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    if path.suffix == ".onnx" and missing:
        raise ValueError(f"{path}: ONNX needs {', '.join(missing)}: pip install 'mmmae[onnx]'")


def _plain_program(encoder: HSIEncoder) -> ExportedProgram:
    """Export the reference encoder with these weights, which consists of PyTorch's own operators."""
    config = encoder.config.replace(aux={})
    with torch.device("meta"):
        plain = ReferenceModel(config, attention="sdpa").hsi_encoder()
    plain.load_state_dict(encoder.state_dict(), strict=True, assign=True)
    hsi = torch.zeros(TRACED, config.in_channels, config.bands, config.image_size, config.image_size)
    return torch.export.export(plain.eval(), (hsi,), dynamic_shapes=DYNAMIC)


def _to_pt2(program: ExportedProgram) -> tuple[bytes, Run]:
    program.example_inputs = None  # they would be stored in the file as a pickle
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def _to_onnx(path: Path, program: ExportedProgram) -> tuple[bytes, Run]:
    size = sum(weight.nbytes for weight in program.state_dict.values())
    if size >= ONNX_BYTES:
        raise ValueError(
            f"{path}: the weights have {size / 1e9:.1f} GB, expected less than 2 for an ONNX file; export to .pt2"
        )
    import onnxruntime

    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)  # it warns if torchvision is missing, which is not needed here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations among the packages of ONNX
            onnx = torch.onnx.export(
                program,
                dynamo=True,
                dynamic_shapes=DYNAMIC,
                opset_version=OPSET,
                input_names=["hsi"],
                output_names=["tokens"],
                verbose=False,
            )
    finally:
        exporter.setLevel(level)
    assert onnx is not None
    content: bytes = onnx.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda hsi: torch.from_numpy(session.run(["tokens"], {"hsi": hsi.numpy()})[0])


def _difference(encoder: HSIEncoder, run: Run, batch: int) -> float:
    config = encoder.config
    shape = batch, config.in_channels, config.bands, config.image_size, config.image_size
    hsi = torch.randn(shape, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        return float((encoder(hsi) - run(hsi)).abs().max())
