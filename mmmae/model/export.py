"""Export of encoders and fine-tuned models for use without this package, as programs of torch.export or ONNX models."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..config import MMMAEConfig
from ..files import check_can_write, write_atomically
from .encoder import HSIEncoder
from .finetuned import FinetunedModel, task_of
from .reference import ReferenceModel

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # which loads sympy

OPSET = 18  # of ONNX 1.13, from 2022; an encoder needs no later one
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_BYTES = 2**31  # the limit of a protobuf file
TOLERANCE = 1e-4  # of outputs of size 1, as tokens are, which come from a norm; relative to larger ones
TRACED, CHECKED = 2, (1, 3)  # batch sizes
METADATA = "metadata.json"  # the extra file of a torch.export program

Run: TypeAlias = Callable[[Tensor], Tensor]


class Exported(NamedTuple):
    """What is written: a model, the name of its output, and what the file says about itself."""

    model: nn.Module
    config: MMMAEConfig
    output: str
    metadata: dict[str, Any]


def export_encoder(encoder: HSIEncoder, path: str | Path, *, normalization: Mapping[str, Any] | None = None) -> float:
    """Check and write an encoder as a program for `torch.export.load` or as an ONNX model.

    The input is `hsi [batch, C, T, image_size, image_size]`, already normalised and resized, and the output is
    `tokens [batch, N, D]`, both float32 and for any batch size. The file has only operators of PyTorch or ONNX and runs
    without this package. Its metadata are JSON texts: `input` and `output`, name and shape of each; `normalization`.
    They are properties of an ONNX model; in a program they are members of the object in the extra file `metadata.json`.

    Args:
        encoder: float32, on the CPU; it is not changed.
        path: `NAME.pt2` or `NAME.onnx`, in a folder that exists; the suffix decides the format.
        normalization: the statistics of its input, as `Normalization.to_json` returns them, for the metadata.

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
    config = encoder.config
    output = {"name": "tokens", "shape": ["batch", config.tokens, config.dim]}
    return _export(Exported(encoder, config, "tokens", _metadata(config, output, normalization)), Path(path))


def export_finetuned(
    model: FinetunedModel,
    classes: Sequence[str],
    path: str | Path,
    *,
    normalization: Mapping[str, Any] | None = None,
    numbers: Sequence[int] | None = None,
    window: int | None = None,
) -> float:
    """Check and write a fine-tuned model, as `export_encoder` writes an encoder.

    The output is `logits`, `[batch, classes, image_size, image_size]` of a segmentation or `[batch, classes]` of other
    tasks. The metadata hold `task` and `classes` too, and `numbers` and `window` if they are given.

    Args:
        model: float32, on the CPU; it is not changed.
        classes: names of the classes, in the order of the logits.
        path, normalization: as for `export_encoder`.
        numbers: values of the classes in rasters of labels.
        window: side in pixels of the window around each pixel, which is resized to image_size, for the task "pixels".

    Returns:
        The largest difference between the logits from the file and from the model, on random volumes; relative to the
        largest logit if that is above 1.

    Raises:
        ValueError: as `export_encoder`.
        OSError: the file can't be written.
    """
    config = model.encoder.config
    task = task_of(model)
    size = [config.image_size, config.image_size] if task == "segmentation" else []
    output = {"name": "logits", "shape": ["batch", len(classes), *size]}
    metadata = _metadata(config, output, normalization)
    metadata |= {"task": task, "classes": list(classes)}
    if numbers is not None:
        metadata["numbers"] = list(numbers)
    if window is not None:
        metadata["window"] = window
    return _export(Exported(model, config, "logits", metadata), Path(path))


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


def _metadata(config: MMMAEConfig, output: dict[str, Any], normalization: Mapping[str, Any] | None) -> dict[str, Any]:
    shape = ["batch", config.in_channels, config.bands, config.image_size, config.image_size]
    found: dict[str, Any] = {"input": {"name": "hsi", "shape": shape, "type": "float32"}, "output": output}
    if config.wavelengths is not None:
        found["input"]["wavelengths"] = list(config.wavelengths)
    if normalization is not None:
        found["normalization"] = dict(normalization)
    return found


def _export(exported: Exported, path: Path) -> float:
    check_export(path)
    for name, parameter in exported.model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(f"{name} is {parameter.dtype} on {parameter.device}, expected torch.float32 on cpu")
    with _evaluating(exported.model):
        program = _plain_program(exported)
        content, run = (_to_onnx if path.suffix == ".onnx" else _to_pt2)(path, program, exported)
        difference = float(
            torch.tensor([_difference(exported, run, batch) for batch in CHECKED]).max()
        )  # NaN if one is
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{path}: not written: the {exported.output} differ from the model's by {difference:.1e}, expected at most "
            f"{TOLERANCE:.0e}"
        )
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return difference


def _plain_program(exported: Exported) -> ExportedProgram:
    """Export the model on the reference encoder with its weights, which consists of PyTorch's own operators."""
    config = exported.config.replace(aux={})
    model = exported.model
    encoder: nn.Module = model if isinstance(model, HSIEncoder) else model.encoder  # type: ignore[assignment]
    with torch.device("meta"):
        plain: nn.Module = ReferenceModel(config, attention="sdpa").hsi_encoder()
    plain.load_state_dict(encoder.state_dict(), strict=True, assign=True)
    if model is not encoder:
        on_plain = copy.copy(model)  # of which only the encoder is another
        on_plain._modules = {**model._modules, "encoder": plain}
        on_plain.freeze_encoder = False  # type: ignore[assignment]  # a change of the gradient mode is an operator too
        plain = on_plain
    hsi = torch.zeros(TRACED, config.in_channels, config.bands, config.image_size, config.image_size)
    return torch.export.export(plain.eval(), (hsi,), dynamic_shapes=_dynamic_shapes())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode during the block; heads compute something else in training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _dynamic_shapes() -> dict[str, Any]:
    return {"hsi": {0: torch.export.Dim("batch")}}


def _to_pt2(path: Path, program: ExportedProgram, exported: Exported) -> tuple[bytes, Run]:
    program.example_inputs = None  # they would be stored in the file as a pickle
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(exported.metadata)})
    content = buffer.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def _to_onnx(path: Path, program: ExportedProgram, exported: Exported) -> tuple[bytes, Run]:
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
                dynamic_shapes=_dynamic_shapes(),
                opset_version=OPSET,
                input_names=["hsi"],
                output_names=[exported.output],
                verbose=False,
            )
    finally:
        exporter.setLevel(level)
    assert onnx is not None
    proto = onnx.model_proto
    for key, value in exported.metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    content: bytes = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda hsi: torch.from_numpy(session.run([exported.output], {"hsi": hsi.numpy()})[0])


def _difference(exported: Exported, run: Run, batch: int) -> float:
    config = exported.config
    shape = batch, config.in_channels, config.bands, config.image_size, config.image_size
    hsi = torch.randn(shape, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = exported.model(hsi)
        scale = 1.0 if exported.output == "tokens" else max(1.0, float(expected.abs().max()))
        return float((expected - run(hsi)).abs().max()) / scale
