"""Times of training steps and of encoding on a GPU in bfloat16: ours, eager and captured, against the reference."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch

import mmmae
from bench.device_time import followed, replayed
from bench.limits import gemms_of, seconds_alone
from bench.race import BASELINE
from bench.results import Measurement

from .op_times import peaks
from .profiling import TOP, kernels_of, summed
from .records import Records
from .setting import Setting
from .step_checks import data_of, training_step
from .summary import CAPTURED, CASE, COMPILED, EAGER

DTYPE = "bfloat16"
ROUNDS, REPEAT, WARM_UPS = 7, 5, 6
Step = Callable[[], object]
Model = mmmae.ReferenceModel | mmmae.FastModel


def compile_reference(records: Records, setting: Setting, preset: str, batch: str) -> None:
    """Compile the reference's training step, so that the part that times it finds the code in torch's cache."""
    records.attempt(f"compilation of {preset}, batch {batch}", _compile, records, setting, preset, int(batch))


def _compile(records: Records, setting: Setting, preset: str, batch: int) -> None:
    start = time.perf_counter()
    contender(COMPILED, setting, preset, batch)()
    torch.cuda.synchronize()
    taken = round(time.perf_counter() - start, 1)
    records.add("fact", name="seconds of compilation beside other work", value={f"{preset}, batch {batch}": taken})


def contender(name: str, setting: Setting, preset: str, batch: int) -> Step:
    """Return a whole training step of a contender: forward, backward, clipping and optimizer."""
    torch.manual_seed(0)
    config = setting.config(preset)
    if name in (EAGER, CAPTURED):
        model: torch.nn.Module = mmmae.fast_model(config, kernels=setting.kernels)
    else:
        model = mmmae.reference_model(config, attention="sdpa")
    model.to(setting.device)
    if name == COMPILED:
        model.compile(dynamic=False, disable=setting.dry_run)
    step = training_step(model, DTYPE, "on" if name == CAPTURED else "off")
    data = data_of(config, setting.batch(batch), setting.device)
    return functools.partial(step, *data)


def step_times(records: Records, setting: Setting, preset: str, batch: str) -> None:
    """Time steps of all contenders in turn; first without the compiled one, which may take long to start."""
    speeds: dict[str, float] = {}
    steps: dict[str, Step] = {}
    memory: dict[str, int] = {}
    case = CASE.format(preset, batch)

    def make(name: str) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = contender(name, setting, preset, int(batch))
        for _ in range(WARM_UPS if name == CAPTURED else setting.rounds(WARM_UPS)):
            step()
        torch.cuda.synchronize()
        memory[name] = torch.cuda.max_memory_allocated() - before
        steps[name] = step

    def take() -> None:
        taken = followed(steps, setting.rounds(ROUNDS), setting.rounds(REPEAT))
        for name, seconds in taken.items():
            _measured(records, "training step", case, name, seconds, int(batch), memory[name], setting)

    records.attempt(f"peaks for {case}", peaks, records, setting, speeds, needed=True)
    for name in (EAGER, CAPTURED, BASELINE):
        records.attempt(f"{name}: {case}", make, name, needed=True)
    records.attempt(f"times of {case}", take)
    for name in (EAGER, BASELINE):
        if name in steps:
            records.attempt(f"kernels of {name}: {case}", _kernels, records, case, name, steps[name])
    if EAGER in steps:
        records.attempt(f"products of {case}", _products, records, setting, case, steps[EAGER])
    records.attempt(f"{COMPILED}: {case}", make, COMPILED, needed=True)
    if COMPILED in steps:
        records.attempt(f"times of {case}, with the compiled one", take)


def _kernels(records: Records, case: str, name: str, step: Step) -> None:
    rows = kernels_of(step)
    records.add("kernels", case=case, contender=name, total=summed(rows), top=rows[:TOP])


def _products(records: Records, setting: Setting, case: str, step: Step) -> None:
    """Record the seconds that the step's matrix products take alone."""
    records.add("fact", name=f"products alone: {case}", value=seconds_alone(gemms_of(step), setting.device, DTYPE))


def encoder_times(records: Records, setting: Setting, preset: str) -> None:
    """Time the encoder over all tokens, ours against the reference's, on the device and with the host."""
    for batch in (8, 64):
        what = f"{preset}, batch {batch}, {DTYPE}"
        records.attempt(f"encoding, {what}", _encode, records, setting, preset, batch, what)


def _encode(records: Records, setting: Setting, preset: str, batch: int, case: str) -> None:
    torch.cuda.empty_cache()
    config = setting.config(preset).replace(aux={})
    hsi, _ = data_of(config, setting.batch(batch), setting.device)
    models: dict[str, Model] = {
        BASELINE: mmmae.reference_model(config, attention="sdpa"),
        EAGER: mmmae.fast_model(config, kernels=setting.kernels),
    }

    def encode(model: Model) -> Step:
        encoder = model.to(setting.device).hsi_encoder().eval()

        def run() -> object:
            # A cast that the cache holds would be freed with it, while a graph still reads it.
            with torch.no_grad(), torch.autocast(setting.device, torch.bfloat16, cache_enabled=False):
                return encoder(hsi)

        return run

    runs = {name: encode(model) for name, model in models.items()}
    taken, refused = replayed({name: [run] for name, run in runs.items()}, setting.rounds(ROUNDS))
    eager = followed(runs, setting.rounds(ROUNDS), setting.rounds(REPEAT))
    for name, seconds in eager.items():
        _measured(records, "encoding", case, name, seconds, batch, None, setting)
    for name, seconds in taken.items():
        _measured(records, "encoding", case, f"{name}, captured", seconds, batch, None, setting)
    for name, reason in refused.items():
        records.add("failure", what=f"encoding by {name}, captured: {case}", error=reason)


def _measured(
    records: Records,
    group: str,
    case: str,
    name: str,
    seconds: list[float],
    batch: int,
    memory: int | None,
    setting: Setting,
) -> None:
    measurement = Measurement(
        group=group,
        case=case,
        contender=name,
        seconds=seconds,
        baseline=name == BASELINE,
        dtype=DTYPE,
        device=setting.device,
        samples=batch,
        peak_bytes=memory,
    )
    records.add("measurement", **dataclasses.asdict(measurement))
