"""A run of the bench suite: its options, what it has found so far, and the comparisons that several tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mmmae
from bench.model_cases import ModelCase
from bench.op_race import OpRace, measure_speeds
from bench.options import Options
from bench.race import Entry, Result, race
from bench.results import Measurement
from mmmae.cost import Report
from mmmae.cost.costs import StepCost
from mmmae.cost.counting import count_step

STEP_BATCH = 8


class Suite:
    """What the tests of a run share. Anything that takes long is done once.

    Args:
        options: of the command line.
        tell: prints a line on the progress.

    Attributes:
        measurements: recorded so far.
        reports: cost reports by preset.
        steps: costs of a training step, by preset and model.
        speeds: of a copy and of a matrix product on this machine in the type of the options, see `speeds_in`.
    """

    def __init__(self, options: Options, tell: Callable[[str], None]) -> None:
        self.options, self.tell = options, tell
        self.measurements: list[Measurement] = []
        self.reports: dict[str, Report] = {}
        self.steps: dict[str, dict[str, StepCost]] = {}
        self.speeds: dict[str, float] = {}
        self._speeds: dict[str, dict[str, float]] = {}  # by type
        # Only the last comparison is kept in memory; tests of one follow each other.
        self._op_race: tuple[tuple[str, str], OpRace] | None = None
        self._model_race: tuple[ModelCase, dict[Entry, Result]] | None = None

    def report(self, preset: str) -> Report:
        """Return the cost report of a preset."""
        if preset not in self.reports:
            self.reports[preset] = mmmae.profile(preset)
        return self.reports[preset]

    def step_costs(self, preset: str) -> dict[str, StepCost]:
        """Return bytes saved and launches of a preset's training step, by the fast model and by both references."""
        if preset not in self.steps:
            config = mmmae.MMMAEConfig.preset(preset)
            with torch.device("meta"):
                models: dict[str, mmmae.FastModel | mmmae.ReferenceModel] = {
                    "fast": mmmae.FastModel(config),
                    "reference sdpa": mmmae.ReferenceModel(config, "sdpa"),
                    "reference eager": mmmae.ReferenceModel(config, "eager"),
                }
            self.steps[preset] = {name: count_step(model, STEP_BATCH) for name, model in models.items()}
        return self.steps[preset]

    def speeds_in(self, dtype: str) -> dict[str, float]:
        """Return the speeds of a copy and of a matrix product in a type, see `bench.op_race.measure_speeds`."""
        if dtype not in self._speeds:
            self.tell(f"a copy, and a matrix product in {dtype}, for the limits")
            self._speeds[dtype] = measure_speeds(self.options.device, dtype)
            self.speeds = self._speeds.get(self.options.dtype, {})
        return self._speeds[dtype]

    def op_race(self, op: str, dtype: str) -> OpRace:
        """Return the variants of an op in a type, timed in turn."""
        if self._op_race is None or self._op_race[0] != (op, dtype):
            self._op_race = None  # frees the last one's tensors before the next one's are made
            self.tell(f"{op} in {dtype}: every variant in turn")
            compared = OpRace(op, self.options, dtype)
            compared.run(rounds=5 if self.options.quick or dtype != self.options.dtype else 9)
            self._op_race = (op, dtype), compared
        return self._op_race[1]

    def model_race(self, case: ModelCase) -> dict[Entry, Result]:
        """Return what each entry of a case did, all of them timed in turn, each in a process of its own."""
        if self._model_race is None or self._model_race[0] is not case:
            results = race(case.runnable(), case.rounds, warm_ups=case.warm_ups, exact=case.exact, tell=self.tell)
            self._model_race = case, results
        return self._model_race[1]
