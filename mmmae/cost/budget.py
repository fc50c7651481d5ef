"""The budget that the `base` preset was made for, and whether a model is within it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Range:
    """The allowed range of a figure.

    Args:
        figure: its name.
        low, high: the limits, both allowed.
        unit: the unit of amounts in sentences.
        scale: the size of the unit.
    """

    figure: str
    low: float
    high: float
    unit: str
    scale: float

    def complaint(self, value: float) -> str | None:
        """Return None if the value is in the range, else a sentence that says by how much it is outside."""
        if self.low <= value <= self.high:
            return None
        side, bound = ("over", self.high) if value > self.high else ("under", self.low)
        amount, away, limit = (number / self.scale for number in (value, abs(value - bound), bound))
        return f"{self.figure}: {amount:.2f} {self.unit} is {away:.2f} {self.unit} {side} the limit of {limit:.1f}"


PARAMETERS = Range("parameters", 90e6, 110e6, "M", 1e6)  # 100 M +- 10 %, of the whole model
ENCODER_MACS = Range("HSI encoder", 10.8e9, 13.2e9, "GMAC", 1e9)  # 12 G +- 10 %, a sample's visible tokens
BUDGET = "The budget of `base` is 100 M parameters and 12 GFLOPs in fvcore's counting (12 GMAC), each +- 10 %"
BY_DESIGN = {
    "vit": "Over the budget by design, with the usual MLP ratio of 4",
    "tiny": "Under the budget by design, for tests",
}


def check_budget(parameters: int, encoder_macs: float) -> list[str]:
    """Return a sentence for each figure outside the budget that says by how much; an empty list within the budget."""
    complaints = PARAMETERS.complaint(parameters), ENCODER_MACS.complaint(encoder_macs)
    return [complaint for complaint in complaints if complaint is not None]
