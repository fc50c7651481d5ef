"""The cost of one forward pass, a row for each component."""

from __future__ import annotations

import dataclasses

AMOUNTS = ("parameters", "macs", "bytes", "launches")


@dataclasses.dataclass(frozen=True)
class Row:
    """The cost of a component; `mmmae.cost.costs.Cost` defines what is counted."""

    component: str
    parameters: int
    macs: int
    bytes: int
    launches: int


@dataclasses.dataclass(frozen=True)
class CostTable:
    """The cost of one forward pass by component."""

    title: str
    rows: tuple[Row, ...]

    @property
    def total(self) -> Row:
        """The sum of all rows."""
        sums = {field: sum(getattr(row, field) for row in self.rows) for field in AMOUNTS}
        return Row("total", **sums)
