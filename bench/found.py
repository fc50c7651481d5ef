"""What a run of the bench suite has found so far."""

from __future__ import annotations

import dataclasses

from bench.results import Measurement
from mmmae.cost import Report
from mmmae.cost.counting import StepCost


@dataclasses.dataclass
class Found:
    """Measurements, cost reports by preset, costs of training steps by preset and model, speeds of the machine."""

    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    reports: dict[str, Report] = dataclasses.field(default_factory=dict)
    steps: dict[str, dict[str, StepCost]] = dataclasses.field(default_factory=dict)
    speeds: dict[str, float] = dataclasses.field(default_factory=dict)
