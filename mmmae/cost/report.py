"""What a model costs: parameters, multiply-adds, bytes and launches by component, as a report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmmae_kernels.checks import described
from mmmae_kernels.cpu import library
from mmmae_kernels.dispatch import current_backend

from ..config import PRESETS, MMMAEConfig, resolve_config
from ..model.fast import FastModel
from ..model.reference import ReferenceModel
from .budget import ENCODER_MACS, PARAMETERS, check_budget, verdict
from .components import Encoder, Model, attention_of, blank_copy, components_of, count_parameters
from .counting import count
from .page import render
from .table import CostTable, Row

if TYPE_CHECKING:
    from rich.console import RenderableType

COUNTING = (
    "Counted like fvcore: one multiply-add (MAC) is one FLOP; the column GFLOP (2x) shows the other habit, two "
    "operations a multiply-add. Norms, softmax and activations have none."
)


def profile(model: MMMAEConfig | Model | str, batch: int = 1) -> Report:
    """Count what a model costs; nothing is computed and no memory of the model's size is taken.

    Args:
        model: a config or a preset's name, which stand for the fast model, or a fast or reference model.
        batch: samples of one forward pass, each with all modalities.

    Returns:
        The report. For a reference model it has the fast model's figures next to its own.

    Raises:
        ValueError: the model is none of these, or `batch` is no whole number >= 1.
        RuntimeError: a multiply-add count is unknown or contradictory, see `mmmae.cost.counting.count`.
    """
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ValueError(f"batch is {batch!r}, expected a whole number >= 1")
    if isinstance(model, (str, MMMAEConfig)):
        config = resolve_config(model)
        with torch.device("meta"):
            model = FastModel(config)
    elif not isinstance(model, Model):
        raise ValueError(
            f"model is {described(model)}, expected a config, a preset's name, a FastModel or a ReferenceModel"
        )
    config = model.config
    with torch.device("meta"):
        encoder = blank_copy(model).hsi_encoder()
        fast = FastModel(config) if isinstance(model, ReferenceModel) else None
    pretraining = _count_table("Pretraining forward", blank_copy(model), batch)
    rows = [row for row in pretraining.rows if row.component in ("patch_embed", "blocks")]
    return Report(
        name=next((name for name in PRESETS if MMMAEConfig.preset(name) == config), "custom"),
        model="fast" if isinstance(model, FastModel) else "reference",
        attention=attention_of(model),
        kernels=_kernels(model),
        torch=torch.__version__,
        batch=batch,
        config=config,
        encoder=CostTable(f"HSI encoder forward, {config.keep} visible tokens of {config.tokens}", tuple(rows)),
        encoder_all=_count_table(f"HSI encoder forward, all {config.tokens} tokens", encoder, batch),
        pretraining=pretraining,
        fast=None if fast is None else _count_table("Pretraining forward, fast model", fast, batch),
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """What `profile` counted.

    Args:
        name: of the preset, or `custom`.
        model: `fast` or `reference`.
        attention, kernels, torch: what served the calls, on which launches and bytes depend.
        batch: samples of the forward passes.
        config: of the model.
        encoder: of the visible tokens; its multiply-adds, and the parameters of `pretraining`, are what has a budget.
        encoder_all: of all tokens, as `model.hsi_encoder()` runs it.
        pretraining: everything up to the loss.
        fast: what the fast model makes of `pretraining`, in the report of a reference model.
    """

    name: str
    model: str
    attention: str
    kernels: str
    torch: str
    batch: int
    config: MMMAEConfig
    encoder: CostTable
    encoder_all: CostTable
    pretraining: CostTable
    fast: CostTable | None = None

    @property
    def within_budget(self) -> bool:
        """Whether parameters and multiply-adds are within the budget of `base`."""
        return not self.out_of_budget

    @property
    def out_of_budget(self) -> list[str]:
        """Which figures are out of the budget of `base`, and by how much."""
        return check_budget(self.pretraining.total.parameters, self._encoder_macs)

    @property
    def _encoder_macs(self) -> float:
        return self.encoder.total.macs / self.batch

    @property
    def title(self) -> str:
        """What was counted, in a line."""
        return f"{self.model} model, `{self.name}`, batch {self.batch}"

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures has to know, and the verdict on the budget."""
        served = f"attention `{self.attention}`, kernels `{self.kernels}`, torch {self.torch}"
        budget = verdict(self.name, self.pretraining.total.parameters, self._encoder_macs)
        notes = [COUNTING, f"Bytes and launches: float32, as dispatched on the CPU; {served}.", budget]
        if self.fast is not None:
            total, fast = self.pretraining.total, self.fast.total
            ratios = ", ".join(
                f"{getattr(total, field) / getattr(fast, field):.2f} times the {name}"
                for field, name in (("macs", "multiply-adds"), ("bytes", "bytes"), ("launches", "launches"))
            )
            notes.insert(1, f"The reference computes for all tokens what the fast model computes for some: {ratios}.")
            notes.insert(2, "Column x fast: GMAC over the fast model's.")
        return notes

    @property
    def tables(self) -> tuple[CostTable, CostTable, CostTable]:
        """The three of them, the one that has a budget first."""
        return self.encoder, self.encoder_all, self.pretraining

    def to_markdown(self) -> str:
        """Tables and notes."""
        parts = [f"### {self.title}"]
        for table in self.tables:
            head, *body = self.cells(table)
            lines = [f"**{table.title}**", "", _markdown_row(head), _markdown_row(["---", *["---:"] * (len(head) - 1)])]
            parts.append("\n".join([*lines, *map(_markdown_row, body)]))
        return "\n\n".join([*parts, *self.notes]) + "\n"

    def cells(self, table: CostTable) -> list[list[str]]:
        """A table as text: the head, a row a component, the total."""
        compared = self.fast is not None and table is self.pretraining
        fast = {row.component: row.macs for row in (*self.fast.rows, self.fast.total)} if self.fast else {}
        rows = []
        for row in (*table.rows, table.total):
            amounts = [_number(row.parameters / 1e6), _number(row.macs / 1e9), _number(2 * row.macs / 1e9)]
            rows.append([row.component, *amounts, f"{row.bytes / 1e6:,.1f}", f"{row.launches:,}"])
            if compared:
                rows[-1].append(f"{row.macs / fast[row.component]:.2f}" if row.macs and fast.get(row.component) else "")
        head = ["component", "M params", "GMAC", "GFLOP (2x)", "MB moved", "launches"]
        return [[*head, "x fast"] if compared else head, *rows]

    def to_json(self) -> str:
        """All counts, exact, as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    def to_dict(self) -> dict[str, Any]:
        """All counts, exact, as plain JSON types, with totals and the verdict for readers that do not compute."""
        values = dataclasses.asdict(dataclasses.replace(self, config=None))  # type: ignore[arg-type]
        for field in TABLES:
            table = getattr(self, field)
            if table is not None:
                values[field] = {**values[field], "total": dataclasses.asdict(table.total)}
                values[field]["rows"] = list(values[field]["rows"])
        return {**values, "config": self.config.to_dict(), "within_budget": self.within_budget, "notes": self.notes}

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`."""
        values = json.loads(text)
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        tables = {field: _read_table(values[field]) for field in TABLES}
        return cls(**{**fields, **tables, "config": MMMAEConfig.from_dict(values["config"])})

    def to_html(self) -> str:
        """One page with the tables as stacked bars; it needs nothing from elsewhere."""
        gauges = ((PARAMETERS, self.pretraining.total.parameters), (ENCODER_MACS, self._encoder_macs))
        *notes, budget = self.notes
        tables = [(table, self.cells(table)) for table in reversed(self.tables)]
        return render(self.title, budget, self.within_budget, gauges, tables, notes)

    def print(self) -> None:
        """The tables and notes on the terminal."""
        from rich.console import Console

        Console().print(self)

    def __rich__(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = [Text(self.title, style="bold")]
        for table in self.tables:
            grid = Table(
                title=table.title,
                title_justify="left",
                title_style="",
                box=box.SIMPLE,
                show_footer=True,
                padding=(0, 1, 0, 0),
            )
            head, *body, total = self.cells(table)
            for number, (name, amount) in enumerate(zip(head, total, strict=True)):
                justify: Literal["left", "right"] = "right" if number else "left"
                grid.add_column(name.replace(" ", "\n"), footer=amount, justify=justify, no_wrap=True)
            for cells in body:
                grid.add_row(*cells)
            parts.append(Padding(grid, (1, 0, 0, 0)))
        return Group(*parts, "", *map(Text, self.notes))


TABLES = ("encoder", "encoder_all", "pretraining", "fast")


def _count_table(title: str, model: Model | Encoder, batch: int) -> CostTable:
    parameters = count_parameters(model)
    costs = count(model, batch)
    rows = []
    for component in components_of(model):
        cost = dataclasses.asdict(costs[component]) if component in costs else {"macs": 0, "bytes": 0, "launches": 0}
        if component in costs or component in parameters:
            rows.append(Row(component, parameters[component], **cost))
    return CostTable(title, tuple(rows))


def _kernels(model: Model) -> str:
    if isinstance(model, ReferenceModel):
        return "none"
    backend = current_backend() if model.kernels == "auto" else model.kernels
    return f"{backend} with{'out' if library.unavailable_reason() else ''} the native library"


def _read_table(values: Mapping[str, Any] | None) -> CostTable | None:
    return None if values is None else CostTable(values["title"], tuple(Row(**row) for row in values["rows"]))


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.3f}" if value >= 0.001 else "<0.001"


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
