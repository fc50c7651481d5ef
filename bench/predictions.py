"""The least time that work can take on GPUs that are not here, from counts and published peaks, never measured.

    python -m bench.predictions [--markdown]

Only shapes are computed, so that it takes seconds and hardly any memory at any batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mmmae
from bench.contenders import Task
from bench.op_cases import CASES
from bench.op_work import Place
from bench.results import Prediction
from mmmae.cost.components import Encoder, Model, Traced
from mmmae.cost.counting import Cost, Uncomputed, count_operators, count_step
from mmmae_kernels.cpu import library

BATCH = 64
PRESETS = ("base", "vit")
OURS = ("ours", "fast")  # of an op, and of a model
TITLE = "computed from counts and published peaks; nothing was measured"
NOTES = (
    "Least milliseconds in bfloat16. The time of an operator is that of its multiply-adds at the peak of the "
    "matrix units or that of its bytes at the peak of the memory, whichever is longer; the floor is the sum over "
    "operators. Memory: the share of the floor in operators that are bound by memory, as a range over the GPUs.",
    "In brackets: this floor divided by ours, which is the most that our fusion can gain at these peaks; below 1 "
    "it loses.",
    "Bytes are those of the inputs and outputs of each operator, counted in float32 on a CPU and halved. A cache "
    "that keeps data from one operator to the next can save some of them.",
    "Not counted: arithmetic other than the multiply-adds of matrix products, and launches, which cost the host "
    "some microseconds each unless a graph replays them.",
)
WIDTH = 142  # columns of the printed table


class GPU(NamedTuple):
    """Published peaks of a GPU.

    Args:
        flops: operations a second of dense bfloat16 products in the matrix units, two a multiply-add.
        bandwidth: bytes a second of the memory.
    """

    flops: float
    bandwidth: float


GPUS = {
    "A100": GPU(312e12, 2.039e12),  # SXM, 80 GB; NVIDIA A100 Tensor Core GPU data sheet
    "H100": GPU(989e12, 3.35e12),  # SXM; NVIDIA H100 Tensor Core GPU data sheet, which gives 1,979 with sparsity
    "B200": GPU(2250e12, 8e12),  # NVIDIA DGX B200 data sheet: eight have 64 TB/s, and 72 PFLOP/s in sparse fp8
    "MI300X": GPU(1307e12, 5.3e12),  # AMD Instinct MI300X accelerator data sheet
}


class Work(NamedTuple):
    """The costs of a contender in a case, operator by operator; fields as in `bench.results.Prediction`."""

    group: str
    case: str
    contender: str
    operators: Sequence[Cost]


def predict() -> list[Prediction]:
    """Predict the floor of every op, of a training step and of encoding on each of `GPUS`.

    Ours is counted by the operators that the compiled CPU library serves, which are those that Triton and flash-attn
    serve on a GPU. Without that library the list is empty.
    """
    if library.unavailable_reason() is not None:
        return []
    return [floor(name, gpu, work) for work in (*op_works(), *model_works()) for name, gpu in GPUS.items()]


def floor(name: str, gpu: GPU, work: Work) -> Prediction:
    """Return the least time of some work in bfloat16 on a GPU; see `NOTES`."""
    costs = [dataclasses.replace(cost, bytes=cost.bytes // 2) for cost in work.operators]
    by_matrix = [2 * cost.macs / gpu.flops for cost in costs]
    by_memory = [cost.bytes / gpu.bandwidth for cost in costs]
    seconds = sum(map(max, by_matrix, by_memory))
    bounded = sum(memory for matrix, memory in zip(by_matrix, by_memory, strict=True) if memory > matrix)
    total = sum(costs, Cost())
    counts = (total.macs, total.bytes, total.launches)
    return Prediction(name, work.group, work.case, work.contender, *counts, seconds, bounded / seconds)


def speedup_bound(reference: Prediction, ours: Prediction) -> float:
    """Return the most that ours can gain over a reference on a GPU where both run at its peaks."""
    return reference.seconds / ours.seconds


def op_works() -> Iterator[Work]:
    """Yield the work of each op, as one writes it in PyTorch and ours."""
    uncomputed = Uncomputed()  # type: ignore[no-untyped-call]
    for op, (setup, (baseline, *_)) in CASES.items():
        with uncomputed:
            variants = setup(BATCH, Unwritten()).variants
        for contender, variant in ((baseline, baseline), ("ours", "native")):
            yield Work(
                "op",
                f"{op}, batch {BATCH}",
                contender,
                [operator.cost for operator in count_operators(variants[variant])],
            )


class Unwritten(Place):
    """A place whose tensors have shapes and no numbers."""

    def data(self, *shape: int) -> Tensor:
        """Return a tensor of any numbers."""
        return torch.empty(shape)


def model_works() -> Iterator[Work]:
    """Yield the work of each preset's training step with all auxiliary images, and of its encoder."""
    for preset in PRESETS:
        for task in (Task("training step", preset, BATCH, aux=True), Task("encoding", preset, BATCH)):
            for contender, make in MODELS.items():
                with torch.device("meta"):
                    model = make(task.config)
                yield Work(task.kind, task.title, contender, _OPERATORS[task.kind](model))


def _encoding_operators(model: Model) -> Sequence[Cost]:
    encoder: Encoder = model.hsi_encoder()
    traced = Traced(encoder)
    inputs = traced.inputs(BATCH)
    with torch.no_grad():
        return [operator.cost for operator in count_operators(lambda: traced(*inputs))]


MODELS: dict[str, Callable[[mmmae.MMMAEConfig], Model]] = {
    "reference, plain": functools.partial(mmmae.ReferenceModel, attention="eager"),
    "reference, SDPA": functools.partial(mmmae.ReferenceModel, attention="sdpa"),
    "fast": functools.partial(mmmae.FastModel, kernels="native", attention="native"),
}
_OPERATORS: dict[str, Callable[[Model], Sequence[Cost]]] = {
    "training step": lambda model: [operator.cost for operator in count_step(model, BATCH).operators],
    "encoding": _encoding_operators,
}


def rows(predictions: Iterable[Prediction]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table: for each case one with its name alone, then one a contender."""
    for (group, case), in_case in groupby(predictions, lambda one: (one.group, one.case)):
        yield (case if group == "op" else f"{group}, {case}",)
        found = list(in_case)
        ours = {one.gpu: one for one in found if one.contender in OURS}
        for contender, by_gpu in groupby(found, lambda one: one.contender):
            yield contender, *_cells(list(by_gpu), ours)


def _cells(by_gpu: Sequence[Prediction], ours: dict[str, Prediction]) -> Iterator[str]:
    first = by_gpu[0]
    yield from (f"{first.macs / 1e9:,.2f}", f"{first.bytes / 1e9:.3f}", f"{first.launches:,}")
    for one in by_gpu:
        bound = "" if one.contender in OURS else f" ({speedup_bound(one, ours[one.gpu]):.2f}x)"
        milliseconds = 1e3 * one.seconds
        yield (f"{milliseconds:.4f}" if milliseconds < 1 else f"{milliseconds:.2f}") + bound
    shares = sorted(round(100 * one.memory_share) for one in by_gpu)
    yield f"{shares[0]}-{shares[-1]} %" if shares[0] < shares[-1] else f"{shares[0]} %"


HEADS = ("work", "GMAC", "GB", "launches", *GPUS, "memory")


def markdown(predictions: Iterable[Prediction]) -> str:
    """Return the table with its title and notes in Markdown."""
    lines = [HEADS, ("---", *["---:"] * (len(HEADS) - 1))]
    for row in rows(predictions):
        lines.append(row if len(row) > 1 else (f"**{row[0]}**", *[""] * (len(HEADS) - 1)))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join((f"{TITLE[0].upper()}{TITLE[1:]}:", table, "\n".join(f"- {note}" for note in NOTES)))


def printed(predictions: Iterable[Prediction]) -> Table:
    """Return the table for a terminal."""
    table = Table(box=box.SIMPLE, title=TITLE, title_justify="left", pad_edge=False)
    table.caption, table.caption_justify = "\n".join(NOTES), "left"
    for number, head in enumerate(HEADS):
        table.add_column(head, justify="right" if number else "left", min_width=0 if number else 30)
    for row in rows(predictions):
        table.add_row(*row, style="bold" if len(row) == 1 else None)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.predictions", description=f"Floors for GPUs, {TITLE}.")
    parser.add_argument("--markdown", action="store_true", help="print Markdown, as in docs/gpus.md")
    options = parser.parse_args(arguments)
    predictions = predict()
    if not predictions:
        parser.exit(1, f"nothing to count: {library.unavailable_reason()}\n")
    if options.markdown:
        print(markdown(predictions))
    else:
        Console(width=WIDTH).print(printed(predictions))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
