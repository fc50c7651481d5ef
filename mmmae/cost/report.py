"""The cost report of a model: parameters, multiply-adds, bytes and launches by component."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from typing import Any

import torch

from mmmae_kernels.checks import described
from mmmae_kernels.cpu import library
from mmmae_kernels.dispatch import current_backend

from ..checks import check_whole
from ..config import PRESETS, MMMAEConfig, resolve_config
from ..model.fast import FastModel
from ..model.reference import ReferenceModel
from .budget import BUDGET, BY_DESIGN, ENCODER_MACS, PARAMETERS, check_budget
from .components import Encoder, Model, attention_of, blank_copy, components_of, count_parameters
from .counting import count
from .page import render, render_fragment
from .table import CostTable, Row

COUNTING = (
    "Counted like fvcore: one multiply-add (MAC) is one FLOP; the column GFLOP (2x) counts two operations for each. "
    "Norms, softmax and activations have none."
)
WIDTH = 80  # columns of text


def profile(model: MMMAEConfig | Model | str, batch: int = 1) -> Report:
    """Count the cost of a model, without computing anything or allocating memory for its weights.

    Args:
        model: a config or the name of a preset, for the fast model; or a fast or reference model.
        batch: samples in a forward pass, each of them with all modalities.

    Returns:
        The cost report. For a reference model it has the fast model's figures too.

    Raises:
        ValueError: `model` is none of these, or `batch` is not a whole number >= 1.
        RuntimeError: the multiply-adds of an operator are unknown, or two counters disagree on them, see
            `mmmae.cost.counting.count`.

    Example:
        >>> report = mmmae.profile("tiny")
        >>> report.answer
        '0.32 M parameters; HSI encoder 0.03 GMAC, pretraining forward 0.12 GMAC a sample'
        >>> report.pretraining.total.macs
        115271456

        `print(report)` shows its tables, a notebook shows them as HTML, and `report.to_markdown()`, `.to_json()` and
        `.to_html()` return it in other forms:

        >>> print(report)
        fast model, tiny, batch 1
        0.32 M parameters; HSI encoder 0.03 GMAC...
    """
    check_whole("batch", batch, 1)
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
    """The cost report of a model, as `profile` returns it.

    Args:
        name: of the preset, or "custom".
        model: "fast" or "reference".
        attention, kernels, torch: the backends and the version of torch, on which launches and bytes depend.
        batch: samples in a forward pass.
        config: of the model.
        encoder: the HSI encoder on visible tokens. The budget is for its multiply-adds and for the parameters of
            `pretraining`.
        encoder_all: the HSI encoder on all tokens, as `model.hsi_encoder()` runs it.
        pretraining: the whole forward pass up to the loss.
        fast: in the report of a reference model, `pretraining` of the fast model.
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
    def title(self) -> str:
        """The model and the batch."""
        return f"{self.model} model, `{self.name}`, batch {self.batch}"

    @property
    def answer(self) -> str:
        """The main figures in one line."""
        parameters, macs = self.pretraining.total.parameters / 1e6, self.pretraining.total.macs / self.batch / 1e9
        encoder = f"HSI encoder {self._encoder_macs / 1e9:.2f} GMAC"
        return f"{parameters:.2f} M parameters; {encoder}, pretraining forward {macs:.2f} GMAC a sample"

    @property
    def within_budget(self) -> bool:
        """Whether parameters and multiply-adds are within the budget of `base`."""
        return not self.out_of_budget

    @property
    def out_of_budget(self) -> list[str]:
        """A sentence for each figure outside the budget of `base`, which says by how much."""
        return check_budget(self.pretraining.total.parameters, self._encoder_macs)

    @property
    def standing(self) -> str:
        """Whether the model is within the budget of `base`, and if not, whether by design or by how much."""
        out = "; ".join(self.out_of_budget)
        return BY_DESIGN.get(self.name, f"Out of budget: {out}") if out else "Within budget"

    @property
    def _encoder_macs(self) -> float:
        return self.encoder.total.macs / self.batch

    @property
    def notes(self) -> list[str]:
        """Sentences on how the figures were counted, and on the budget."""
        backends = f"attention `{self.attention}`, kernels `{self.kernels}`, torch {self.torch}"
        notes = [
            COUNTING,
            f"Bytes and launches: float32, as dispatched on the CPU; {backends}.",
            f"{self.standing}. {BUDGET}.",
        ]
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
        """The three tables, the one with a budget first."""
        return self.encoder, self.encoder_all, self.pretraining

    def __str__(self) -> str:
        """Return title, tables and notes as text of 80 columns."""
        parts = [self.title.replace("`", ""), textwrap.fill(self.answer, WIDTH)]
        for table in self.tables:
            parts += ["", table.title, *_text_table(self.cells(table))]
        for note in self.notes:
            parts += ["", textwrap.fill(note.replace("`", ""), WIDTH)]
        return "\n".join(parts)

    def print(self) -> None:
        """Print the report as text."""
        print(self)

    def to_markdown(self) -> str:
        """Return title, tables and notes in Markdown."""
        parts = [f"### {self.title}", f"{self.answer}."]
        for table in self.tables:
            head, *body = self.cells(table)
            lines = [f"**{table.title}**", "", _markdown_row(head), _markdown_row(["---", *["---:"] * (len(head) - 1)])]
            parts.append("\n".join([*lines, *map(_markdown_row, body)]))
        return "\n\n".join([*parts, *self.notes]) + "\n"

    def cells(self, table: CostTable) -> list[list[str]]:
        """Return the cells of a table as text: the head, a row for each component, and the total."""
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
        """Return all exact counts as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    def to_dict(self) -> dict[str, Any]:
        """Return all exact counts as plain JSON types, with the totals and the notes."""
        values = dataclasses.asdict(dataclasses.replace(self, config=None))  # type: ignore[arg-type]
        for field in TABLES:
            table = getattr(self, field)
            if table is not None:
                values[field] = {**values[field], "total": dataclasses.asdict(table.total)}
                values[field]["rows"] = list(values[field]["rows"])
        return {**values, "config": self.config.to_dict(), "within_budget": self.within_budget, "notes": self.notes}

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report from what `to_json` returned."""
        values = json.loads(text)
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        tables = {field: _read_table(values[field]) for field in TABLES}
        return cls(**{**fields, **tables, "config": MMMAEConfig.from_dict(values["config"])})

    def to_html(self) -> str:
        """Return a page with the tables as stacked bars; it loads nothing from elsewhere."""
        gauges = ((PARAMETERS, self.pretraining.total.parameters), (ENCODER_MACS, self._encoder_macs))
        tone = "good" if self.within_budget else "plain" if self.name in BY_DESIGN else "bad"
        return render(self.title, self.answer, self.notes, tone, gauges, self._tables_with_cells())

    def _repr_html_(self) -> str:
        """Return the report for a notebook."""
        return render_fragment(self.title, self.answer, self.notes, self._tables_with_cells())

    def _tables_with_cells(self) -> list[tuple[CostTable, list[list[str]]]]:
        return [(table, self.cells(table)) for table in reversed(self.tables)]


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


def _text_table(cells: list[list[str]]) -> list[str]:
    """Return the lines of a table whose head has two lines: the first column left, the others right aligned."""
    upper, lower = ([name.rpartition(" ")[part] for name in cells[0]] for part in (0, 2))
    rows = [upper, lower, *cells[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        lines.append("   ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    return [*lines[:2], rule, *lines[2:-1], rule, lines[-1]]
