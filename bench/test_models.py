"""Times of a training step and of encoding: ours, the reference and peers, each in a process of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from bench.contenders import OURS, PEERS, Task
from bench.options import Options
from bench.race import BASELINE, Entry
from bench.results import by_case

COMPILED = "reference, SDPA, compiled"
TRAINING, ENCODING = "training step", "encoding"


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A comparison: who runs, how often, and what is varied.

    Args:
        group, allocator: as in `bench.results.Measurement`.
        entries: of a race.
        rounds, warm_ups, exact: of the race.
        varied: a task's number in the group.
    """

    group: str
    entries: tuple[Entry, ...]
    rounds: int
    warm_ups: int = 2
    exact: bool = True
    varied: Callable[[Task], float] | None = None
    allocator: str = "own"


def plan(options: Options) -> list[ModelCase]:
    """The comparisons of a run: of one preset, and in a full run all others."""
    place = {"device": options.device, "dtype": options.dtype}
    if options.quick:
        step = Task(TRAINING, options.preset or "tiny", options.batch or 2, aux=True, **place)
        encoding = dataclasses.replace(step, kind=ENCODING, aux=False)
        rivals = (BASELINE, "reference, plain", "fast")
        return [ModelCase(task.kind, entries(task, *rivals), 5) for task in (step, encoding)]
    cases = comparisons(Task(TRAINING, options.preset or "base", options.batch or 4, **place), options.full)
    if options.full:
        if options.preset is None:
            cases += comparisons(Task(TRAINING, "vit", options.batch or 4, **place), full=True)
        cases += variations(Task(TRAINING, options.preset or "base", 1, **place))
    return cases


def comparisons(step: Task, full: bool) -> list[ModelCase]:
    """Of a preset: training, and encoding of 784 and 196 tokens; in full with everybody, and with auxiliary images."""
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


def variations(step: Task) -> list[ModelCase]:
    """One thing of a training step varied at a time."""
    four = dataclasses.replace(step, batch=4)
    batches = tuple(dataclasses.replace(step, batch=batch) for batch in (1, 2, 4))
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
    """The task with each of the values in a field of its config."""
    return [dataclasses.replace(task, overrides=((field, value),)) for value in values]


def entries(task: Task, *contenders: str, kept: bool = False) -> tuple[Entry, ...]:
    """Ours as the command line runs it; the others as their users would, unless all are to keep memory."""
    return tuple(Entry(contender, task, kept or contender in OURS) for contender in contenders)


def pairs(tasks: Sequence[Task]) -> list[Entry]:
    """The baseline and ours, on each task."""
    return [entry for task in tasks for entry in entries(task, BASELINE, "fast")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        cases = plan(Options.of(metafunc.config))
        rows = [(case, entry) for case in cases for entry in case.entries]
        ids = [f"{case.group}: {entry.task.title}: {entry.contender}" for case, entry in rows]
        metafunc.parametrize(("case", "entry"), rows, ids=ids)


def test_time_of(raced, case, entry):
    raced(case, entry)


def test_the_fast_model_is_faster_than_the_plain_reference(found):
    """Whatever else is expected of it, and found on one machine; `tiny` is all overhead and says nothing."""
    slower = [
        f"{case}: fast takes {fast.median / plain.median:.2f} times as long"
        for (_, case, _), measured in by_case(found.measurements).items()
        for plain in measured
        for fast in measured
        if (plain.contender, fast.contender) == ("reference, plain", "fast") and not case.startswith("tiny")
        if fast.median > plain.median
    ]
    assert not slower, "; ".join(slower)
