"""The budget that the `base` preset was made for, and whether a report is within it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Range:
    """What a figure may be.

    Args:
        figure: its name in sentences.
        unit: of the amounts in sentences, with its size in `scale`.
    """

    figure: str
    low: float
    high: float
    unit: str
    scale: float

    def complaint(self, value: float) -> str | None:
        """None if the value is in the range, else by how much it is out of it."""
        if self.low <= value <= self.high:
            return None
        side, bound = ("over", self.high) if value > self.high else ("under", self.low)
        amount, away, limit = (number / self.scale for number in (value, abs(value - bound), bound))
        return f"{self.figure}: {amount:.2f} {self.unit} is {away:.2f} {self.unit} {side} the limit of {limit:.1f}"


PARAMETERS = Range("parameters", 90e6, 110e6, "M", 1e6)  # 100 M +- 10 %, of the whole model
ENCODER_MACS = Range("HSI encoder", 10.8e9, 13.2e9, "GMAC", 1e9)  # 12 G +- 10 %, a sample's visible tokens
BY_DESIGN = {
    "vit": "Over the budget by design, with the usual MLP ratio of 4",
    "tiny": "Under the budget by design, for tests",
}


def check_budget(parameters: int, encoder_macs: float) -> list[str]:
    """Return which figures are out of the budget, and by how much; an empty list within it."""
    complaints = PARAMETERS.complaint(parameters), ENCODER_MACS.complaint(encoder_macs)
    return [complaint for complaint in complaints if complaint is not None]


def verdict(name: str, parameters: int, encoder_macs: float) -> str:
    """Return the budget and where a model stands, in a sentence or two; `name` is the preset's, or `custom`."""
    budget = "The budget of `base` is 100 M parameters and 12 GFLOPs in fvcore's counting (12 GMAC), each +- 10 %"
    complaints = check_budget(parameters, encoder_macs)
    if not complaints:
        amounts = f"{parameters / 1e6:.2f} M parameters, HSI encoder {encoder_macs / 1e9:.2f} GMAC a sample"
        return f"Within budget: {amounts}. {budget}."
    out = "; ".join(complaints)
    return f"{BY_DESIGN.get(name, 'Out of budget')}: {out}. {budget}."
