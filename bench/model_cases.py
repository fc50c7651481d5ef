"""Which models are timed on which tasks, and against what: the comparisons of a quick, a usual and a full run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from bench.contenders import OURS, PEERS, Task, refuses
from bench.options import Options
from bench.race import BASELINE, Entry, Result
from bench.results import Measurement
from mmmae.precision import has_bf16_instructions

COMPILED = "reference, SDPA, compiled"
TRAINING, ENCODING = "training step", "encoding"
HALF = "bfloat16"


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A comparison: which entries run, how often, and what is varied.

    An entry in float32 among those in bfloat16 is a contender of their case, under the name `fast, float32`.

    Args:
        group, allocator: as in `bench.results.Measurement`.
        entries: of a race.
        rounds, warm_ups, exact: of the race.
        varied: returns the number of a task that differs within the group, or None where nothing is varied.
    """

    group: str
    entries: tuple[Entry, ...]
    rounds: int
    warm_ups: int = 2
    exact: bool = True
    varied: Callable[[Task], float] | None = None
    allocator: str = "own"

    def runnable(self) -> list[Entry]:
        """Return the entries whose packages are installed."""
        return [entry for entry in self.entries if refuses(entry.contender) is None]

    def measurement(self, entry: Entry, results: Mapping[Entry, Result]) -> Measurement:
        """Return what an entry took in the race, beside the limit that was measured with the fast model's products."""
        result, task = results[entry], entry.task
        fast = next((results[rival] for rival in results if rival.task == task and results[rival].limit), None)
        beside = task.dtype == "float32" and self.entries[0].task.dtype == HALF
        return Measurement(
            group=self.group,
            case=dataclasses.replace(task, dtype=HALF).title if beside else task.title,
            contender=f"{entry.contender}, float32" if beside else entry.contender,
            seconds=result.seconds,
            baseline=entry.contender == BASELINE and not beside,
            dtype=task.dtype,
            device=task.device,
            allocator=self.allocator,
            x=None if self.varied is None else self.varied(task),
            samples=task.batch,
            gemms=fast.gemms if fast else None,
            limit=fast.limit if fast else None,
            resident_bytes=result.resident_bytes,
            peak_bytes=result.counts.get("peak_bytes"),
            saved_bytes=result.counts.get("saved_bytes"),
            macs=result.counts.get("macs"),
        )


def plan(options: Options) -> list[ModelCase]:
    """Return the comparisons of a run: of one preset, and in a full run of `vit` and of what can be varied too.

    Where the device has instructions for bfloat16, the models are compared in it too.
    """
    preset, batch = options.preset or "base", options.batch or 4
    step = Task(TRAINING, preset, batch, device=options.device, dtype=options.dtype)
    if options.quick:
        small = dataclasses.replace(step, preset=options.preset or "tiny", batch=options.batch or 2, aux=True)
        encoding = dataclasses.replace(small, kind=ENCODING, aux=False)
        rivals = (BASELINE, "reference, plain", "fast")
        return [ModelCase(task.kind, entries(task, *rivals), 5) for task in (small, encoding)]
    presets = (preset, "vit") if options.full and options.preset is None else (preset,)
    cases: list[ModelCase] = []
    for name in presets:
        cases += comparisons(dataclasses.replace(step, preset=name), options.full)
        if options.dtype == "float32" and multiplies_bfloat16(options.device):
            cases += comparisons_in_bfloat16(dataclasses.replace(step, preset=name), options.full)
    if options.full:
        cases += variations(dataclasses.replace(step, batch=1))
    return cases


def comparisons(step: Task, full: bool) -> list[ModelCase]:
    """Return those of one preset: a training step, and encoding of 784 and of 196 tokens.

    In a full run compiled models and peers take part, and the step is also run on auxiliary images and with every
    process keeping freed memory.
    """
    encoding = dataclasses.replace(step, kind=ENCODING)
    quarter = dataclasses.replace(encoding, overrides=(("image_size", 112),))
    guided = dataclasses.replace(step, aux=True)
    rivals = (BASELINE, "reference, plain")
    if not full:
        return [ModelCase(task.kind, entries(task, *rivals, "fast"), 5) for task in (step, encoding, quarter)]
    both = (COMPILED, "fast, compiled") if step.preset == "base" else (COMPILED,)  # a compilation takes a minute
    compiled = both if step.preset == "base" else ()
    return [
        ModelCase(TRAINING, entries(step, *rivals, *PEERS, "fast", *both), 5),
        ModelCase(TRAINING, entries(step, *rivals, *PEERS, "fast", kept=True), 3, exact=False, allocator="kept"),
        ModelCase(TRAINING, entries(guided, *rivals, "fast"), 5),
        *(ModelCase(ENCODING, entries(task, *rivals, "fast", *compiled), 5) for task in (encoding, quarter)),
    ]


def comparisons_in_bfloat16(step: Task, full: bool) -> list[ModelCase]:
    """Return the comparisons of a preset under autocast, with fast model and reference in float32 in the same races.

    They are a training step and encoding of 784 tokens. The reference is compiled for the step; in a full run a peer
    takes part in it too.
    """
    peers = (PEERS[0],) if full else ()
    encoding = dataclasses.replace(step, kind=ENCODING)

    def case(task: Task, *others: str) -> ModelCase:
        half = dataclasses.replace(task, dtype=HALF)
        runs = (*entries(half, BASELINE, *others, "fast"), *entries(task, BASELINE, "fast"))
        return ModelCase(task.kind, runs, rounds=5, warm_ups=1)

    return [case(step, COMPILED, *peers), case(encoding)]


def multiplies_bfloat16(device: str) -> bool:
    """Return whether a device, `cpu` or `cuda`, has instructions for products in bfloat16."""
    return device != "cpu" or has_bf16_instructions()


def variations(step: Task) -> list[ModelCase]:
    """Return those in which one thing of a training step is varied, the baseline against ours."""
    four = dataclasses.replace(step, batch=4)
    batches = [dataclasses.replace(step, batch=batch) for batch in (1, 2, 4)]
    masks, fractions = vary(four, "mask_ratio", 0.5, 0.75, 0.9), vary(four, "decode_fraction", 0.25, 0.5, 1.0)
    switch = vary(four, "activation_checkpointing", False, True)
    sizes, bands = vary(step, "image_size", 112, 224, 336), vary(step, "bands", 12, 60, 120, 240)

    def case(group: str, runs: Sequence[Entry], varied: Callable[[Task], float], rounds: int = 2) -> ModelCase:
        return ModelCase(group, tuple(runs), rounds, warm_ups=1, exact=False, varied=varied)

    return [
        case("bands", [*pairs(bands[:-1]), *entries(bands[-1], "fast")], lambda task: task.config.tokens, rounds=1),
        case("image size", pairs(sizes), lambda task: task.config.tokens),
        case("batch", pairs(batches), lambda task: task.batch),
        case("mask ratio", pairs(masks), lambda task: task.config.mask_ratio),
        case("decode fraction", pairs(fractions), lambda task: task.config.decode_fraction),
        ModelCase("activation checkpointing", tuple(pairs(switch)), rounds=2),
    ]


def vary(task: Task, field: str, *values: object) -> list[Task]:
    """Return the task with each of the values in a field of its config."""
    return [dataclasses.replace(task, overrides=((field, value),)) for value in values]


def entries(task: Task, *contenders: str, kept: bool = False) -> tuple[Entry, ...]:
    """Return an entry a contender: ours keeps freed memory, as on the command line; the others only with `kept`."""
    return tuple(Entry(contender, task, kept or contender in OURS) for contender in contenders)


def pairs(tasks: Sequence[Task]) -> list[Entry]:
    """Return the baseline and ours on each task."""
    return [entry for task in tasks for entry in entries(task, BASELINE, "fast")]
