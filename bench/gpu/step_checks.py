"""Training steps on a GPU: the fast model against the reference, and a replayed step against one without a graph."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

import mmmae
from bench.race import TOLERANCE, relative_errors

from .records import Records
from .setting import Setting

LOSS_TOLERANCE = 1e-5  # float32
STEPS = 8  # of which the first three are run, one is recorded, and the rest replayed
# cuBLAS may take another algorithm in a graph. What the steps of two runs differ by then grows from step to step, but
# is far from what a wrong seed, rate or input makes.
REPLAYED_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}
Data = tuple[Tensor, dict[str, Tensor]]


def data_of(config: mmmae.MMMAEConfig, batch: int, device: str) -> Data:
    """Return a batch of volumes and auxiliary images."""
    generator = torch.Generator(device).manual_seed(1)
    size = (config.image_size, config.image_size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    images = {name: draw(batch, channels, *size) for name, channels in config.aux.items()}
    return draw(batch, config.in_channels, config.bands, *size), images


def one_step(records: Records, setting: Setting, preset: str, batch: str, dtype: str) -> None:
    """Compare loss and gradients of fast model and reference in a type with those in float64."""
    what = f"step of {preset} in {dtype}"
    records.attempt(what, _one_step, records, setting, what, preset, setting.batch(int(batch)), dtype)


def _one_step(records: Records, setting: Setting, what: str, preset: str, batch: int, dtype: str) -> None:
    exact_products()
    torch.manual_seed(0)
    config = setting.config(preset)
    reference = mmmae.reference_model(config, attention="sdpa").to(setting.device)
    fast = mmmae.fast_model(reference, kernels=setting.kernels)
    data = data_of(config, batch, setting.device)
    theirs, ours = (gradients(model, data, dtype) for model in (reference, fast))
    hsi, aux = data
    doubled = hsi.double(), {name: image.double() for name, image in aux.items()}
    truth = gradients(copy.deepcopy(reference).double(), doubled, "float64")
    found, expected = relative_errors(ours, truth), relative_errors(theirs, truth)
    assert found.keys() == expected.keys() == truth.keys()
    worst = max(expected.values())
    least = {True: LOSS_TOLERANCE, False: TOLERANCE} if dtype == "float32" else {True: 0.0, False: 0.0}
    allowed = {name: max(least[name == "loss"], 2 * worst) for name in found}
    name = max(found, key=lambda name: found[name] / allowed[name])
    ratios = {name: found[name] / expected[name] for name in found if expected[name] > 0}
    records.add(
        "check",
        what=f"{what}, batch {batch}: {name}",
        op="training step",
        backend="fast",
        types=dtype,
        error=found[name],
        allowed=allowed[name],
        result=0,
        ok=all(found[name] <= allowed[name] for name in found),
        loss=float(ours["loss"]),
        loss_error=found["loss"],
        largest_ratio_to_torch=max(ratios.items(), key=lambda pair: pair[1], default=("", 0.0)),
    )


def exact_products() -> None:
    """Let neither products nor convolutions in float32 round to TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def gradients(model: nn.Module, data: Data, dtype: str) -> dict[str, Tensor]:
    """Return the loss and the gradient of each parameter in float64, of a forward pass in a type or under autocast."""
    autocast = dtype in ("bfloat16", "float16")
    device = data[0].device.type
    model.zero_grad(set_to_none=True)  # models may share parameters
    with torch.autocast(device, getattr(torch, dtype)) if autocast else contextlib.nullcontext():
        loss = model(*data, seed=0).loss
    loss.backward()
    named = model.named_parameters()
    found = {name: parameter.grad.double() for name, parameter in named if parameter.grad is not None}
    return {"loss": loss.detach().double(), **found}


def captured_steps(records: Records, setting: Setting, preset: str, batch: str, dtype: str) -> None:
    """Compare a few training steps that are recorded and replayed with the same without a graph."""
    what = f"captured step of {preset} in {dtype}"
    records.attempt(what, _captured_steps, records, setting, what, preset, setting.batch(int(batch)), dtype)


def _captured_steps(records: Records, setting: Setting, what: str, preset: str, batch: int, dtype: str) -> None:
    exact_products()
    config = setting.config(preset)
    data = data_of(config, batch, setting.device)
    runs: list[list[tuple[float, float]]] = []
    for cuda_graph in ("off", "off", "on"):
        torch.manual_seed(0)
        model = mmmae.fast_model(config, kernels=setting.kernels).to(setting.device)
        step = training_step(model, dtype, cuda_graph)
        for _ in range(STEPS):
            step(*data)
        runs.append([(figures.loss, figures.gradient_norm) for figures in step.read()])
    first, second, replayed = runs
    error, noise = _difference(replayed, first), _difference(second, first)
    allowed = max(REPLAYED_TOLERANCE[dtype], 10 * noise)
    records.add(
        "check",
        what=f"{what}, batch {batch}: losses of {STEPS} steps",
        op="captured step",
        backend="fast",
        types=dtype,
        error=error,
        allowed=allowed,
        result=0,
        ok=len(replayed) == STEPS and error <= allowed,
        between_two_runs=noise,
        losses=[loss for loss, _ in replayed],
    )


def training_step(model: nn.Module, dtype: str, cuda_graph: str) -> mmmae.TrainingStep:
    """Return the training step of a model, with clipping and optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = torch.bfloat16 if dtype == "bfloat16" else None
    return mmmae.TrainingStep(model, optimizer, clip=1.0, autocast=autocast, cuda_graph=cuda_graph)


def _difference(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> float:
    return max(abs(one - other) / abs(other) for (one, _), (other, _) in zip(ours, theirs, strict=True))
