"""The least time that work can take on GPUs that are not here, from counts and published peaks, never measured.

    python -m bench.predictions [--markdown]

What a GPU would launch in bfloat16 is counted by `mmmae.cost.counting`. Only shapes are computed, so that it takes some
ten seconds and hardly any memory at any batch.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple
from unittest import mock

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mmmae
from bench import op_cases
from bench.contenders import Task
from bench.op_cases import CASES
from bench.op_work import Place
from bench.results import Prediction
from mmmae.cost.components import Encoder, Model, Traced
from mmmae.cost.costs import Operator, total
from mmmae.cost.counting import count_operators, count_step
from mmmae.cost.gpu import ATTENTION, on_gpu
from mmmae.cost.launches import Uncomputed

TARGET = "sm90"  # sizes decide what is launched; the architecture decides only which tiles a kernel uses
DTYPE = torch.bfloat16
BATCH = 64  # of the ops
OURS = ("ours", "fast")  # of an op, and of a model
SENTENCE = "Computed from counts and published peaks; nothing was measured."
# Seconds. A launch from Python takes the host at least so long, and a GPU that replays a graph pauses so long between
# two kernels. Both are assumptions, on the low side: see docs/gpus.md.
HOST_LAUNCH, GRAPH_GAP = 5e-6, 1e-6
NOTES = (
    "In bfloat16: models under autocast, with a float32 residual stream; ops on bfloat16 tensors. The floor of an "
    "operator is the time of its multiply-adds at the peak of the matrix units or that of its bytes at the peak of the "
    "memory, whichever is longer; the floor of a case is the sum over its operators.",
    f"With a graph: the floor and {GRAPH_GAP * 1e6:.0f} us a launch. Without: the floor, or {HOST_LAUNCH * 1e6:.0f} us "
    "of the host a launch where that is longer. In brackets: this time divided by ours; below 1 ours loses.",
    "Bytes are those of the inputs and outputs of each operator in their own dtypes. A cache that keeps data from one "
    "operator to the next can save some of them. Memory: the share of the floor in operators that are bound by "
    "memory, as a range over the GPUs. Casts: the launches that only convert a dtype.",
    "An operator of PyTorch or of a library counts as one launch; some have two or three. Not counted: arithmetic "
    "other than the multiply-adds of matrix products, and the optimizer.",
)
WIDTH = 150  # columns of the printed tables


class GPU(NamedTuple):
    """Published peaks of a GPU.

    Args:
        flops: operations a second of dense bfloat16 products that are summed in float32, two a multiply-add.
        bandwidth: bytes a second of the memory.
    """

    flops: float
    bandwidth: float


GPUS = {
    "A100": GPU(312e12, 2.039e12),  # SXM, 80 GB; NVIDIA A100 Tensor Core GPU data sheet
    "H100": GPU(989e12, 3.35e12),  # SXM; NVIDIA H100 Tensor Core GPU data sheet, which gives 1,979 with sparsity
    "H200": GPU(989e12, 4.8e12),  # SXM; NVIDIA H200 Tensor Core GPU data sheet, likewise
    "B200": GPU(2250e12, 8e12),  # NVIDIA DGX B200 data sheet: eight have 64 TB/s, and 72 PFLOP/s in sparse fp8
    "MI300X": GPU(1307e12, 5.3e12),  # AMD Instinct MI300X accelerator data sheet
    # The tables "Peak BF16 Tensor TFLOPS with FP32 Accumulate" in the appendices of the white papers: half of what the
    # same cards reach with sums in float16.
    "RTX 4090": GPU(165.2e12, 1.008e12),  # NVIDIA Ada GPU Architecture
    "RTX 5090": GPU(209.5e12, 1.792e12),  # NVIDIA RTX Blackwell GPU Architecture
}
SHOWN = ("H100", "RTX 4090")  # GPUs for which the tables show ops


class Work(NamedTuple):
    """What a contender launches in a case; fields as in `bench.results.Prediction`."""

    group: str
    case: str
    contender: str
    operators: Sequence[Operator]


def predict() -> list[Prediction]:
    """Predict the floor of every op, of a training step and of encoding on each of `GPUS`; empty without Triton."""
    if importlib.util.find_spec("triton") is None:
        return []
    return [floor(name, gpu, work) for work in (*op_works(), *model_works()) for name, gpu in GPUS.items()]


def floor(name: str, gpu: GPU, work: Work) -> Prediction:
    """Return the least time of some work on a GPU; see `NOTES`."""
    by_matrix = [2 * operator.cost.macs / gpu.flops for operator in work.operators]
    by_memory = [operator.cost.bytes / gpu.bandwidth for operator in work.operators]
    seconds = sum(map(max, by_matrix, by_memory))
    bounded = sum(memory for matrix, memory in zip(by_matrix, by_memory, strict=True) if memory > matrix)
    sums = total(work.operators)
    casts = total(operator for operator in work.operators if operator.is_cast).launches
    counts = (sums.macs, sums.bytes, sums.launches)
    return Prediction(name, work.group, work.case, work.contender, *counts, seconds, bounded / seconds, casts)


def floor_of(prediction: Prediction) -> float:
    """Return the seconds at the GPU's peaks, as if launches cost nothing."""
    return prediction.seconds


def with_graph(prediction: Prediction) -> float:
    """Return the seconds where a graph replays the launches."""
    return prediction.seconds + prediction.launches * GRAPH_GAP


def without_graph(prediction: Prediction) -> float:
    """Return the seconds where Python makes each launch."""
    return max(prediction.seconds, prediction.launches * HOST_LAUNCH)


def speedup_bound(reference: Prediction, ours: Prediction, seconds: Callable[[Prediction], float] = floor_of) -> float:
    """Return the most that ours can gain over a reference on a GPU where both run at its peaks."""
    return seconds(reference) / seconds(ours)


def op_works() -> Iterator[Work]:
    """Yield the work of each op, as one writes it in PyTorch and ours."""
    uncomputed = Uncomputed()
    for op, (setup, (baseline, *_)) in CASES.items():
        with on_gpu(TARGET), mock.patch.object(op_cases, "target_of", return_value=TARGET), uncomputed:
            variants = setup(BATCH, Unwritten(dtype=DTYPE)).variants
        ours = next(variant for variant in (ATTENTION, "triton") if variant in variants)
        for contender, variant in ((baseline, baseline), ("ours", ours)):
            yield Work("op", f"{op}, batch {BATCH}", contender, count_operators(variants[variant], target=TARGET))


class Unwritten(Place):
    """A place whose tensors have shapes and no numbers."""

    def data(self, *shape: int) -> Tensor:
        """Return a tensor of any numbers."""
        return torch.empty(shape, dtype=self.dtype)


def model_works() -> Iterator[Work]:
    """Yield the work of training steps with all auxiliary images and without, and of encoding."""
    for task, contenders in TASKS.items():
        for contender in contenders:
            with torch.device("meta"):
                model = MODELS[contender](task.config)
            yield Work(task.kind, task.title, contender, _OPERATORS[task.kind](model, task.batch))


def _step_operators(model: Model, batch: int) -> Sequence[Operator]:
    return count_step(model, batch, autocast=DTYPE, target=TARGET).operators


def _encoding_operators(model: Model, batch: int) -> Sequence[Operator]:
    encoder: Encoder = model.hsi_encoder()
    traced = Traced(encoder)
    inputs = traced.inputs(batch)
    with torch.no_grad(), torch.autocast("cpu", DTYPE):
        return count_operators(lambda: traced(*inputs), traced, TARGET)


MODELS: dict[str, Callable[[mmmae.MMMAEConfig], Model]] = {
    "reference, plain": functools.partial(mmmae.ReferenceModel, attention="eager"),
    "reference, SDPA": functools.partial(mmmae.ReferenceModel, attention="sdpa"),
    "fast": functools.partial(mmmae.FastModel, kernels="triton", attention=ATTENTION),
}
SDPA = ("reference, SDPA", "fast")
TASKS: dict[Task, tuple[str, ...]] = {
    Task("training step", "base", 64, aux=True): tuple(MODELS),
    Task("training step", "base", 8, aux=True): SDPA,
    Task("training step", "base", 64): SDPA,
    Task("encoding", "base", 64): tuple(MODELS),
    Task("training step", "vit", 64, aux=True): SDPA,
    Task("encoding", "vit", 64): SDPA,
}
_OPERATORS: dict[str, Callable[[Model, int], Sequence[Operator]]] = {
    "training step": _step_operators,
    "encoding": _encoding_operators,
}


class Section(NamedTuple):
    """A table: its title, its heads, and its rows, of which those with one cell are headings."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


def sections(predictions: Sequence[Prediction]) -> list[Section]:
    """Return the tables: counts of models, their times at the peaks, with a graph and without, and ops."""
    models = [one for one in predictions if one.group != "op"]
    ops = [one for one in predictions if one.group == "op" and one.gpu in SHOWN]
    gpus = tuple(dict.fromkeys(one.gpu for one in models))
    counts = ("work", "GMAC", "GB", "launches", "casts", "host, ms", "memory")
    op_heads = ("work", "GMAC", "GB", "launches", "memory", *(f"{gpu}, us" for gpu in SHOWN))
    times = {"at the peaks": floor_of, "with a graph": with_graph, "without a graph": without_graph}
    made = [
        Section("Models: counts", counts, _rows(models, _counts)),
        *(
            Section(f"Models: milliseconds {how}", ("work", *gpus), _rows(models, functools.partial(_times, seconds)))
            for how, seconds in times.items()
        ),
        Section("Ops: counts, and microseconds at the peaks", op_heads, _rows(ops, _op_cells)),
    ]
    return [section for section in made if section.rows]


Cells = Callable[[Sequence[Prediction], dict[str, Prediction]], tuple[str, ...]]


def _rows(predictions: Iterable[Prediction], cells: Cells) -> list[tuple[str, ...]]:
    """Return for each case a row with its name alone, then one a contender, whose predictions `cells` gets by GPU."""
    rows: list[tuple[str, ...]] = []
    for (group, case), in_case in groupby(predictions, lambda one: (one.group, one.case)):
        rows.append((case if group == "op" else f"{group}, {case}",))
        found = list(in_case)
        ours = {one.gpu: one for one in found if one.contender in OURS}
        for contender, by_gpu in groupby(found, lambda one: one.contender):
            rows.append((contender, *cells(list(by_gpu), ours)))
    return rows


def _counts(by_gpu: Sequence[Prediction], ours: dict[str, Prediction]) -> tuple[str, ...]:
    one = by_gpu[0]
    return *_amounts(one), f"{one.casts:,}", f"{1e3 * HOST_LAUNCH * one.launches:.1f}", _shares(by_gpu)


def _op_cells(by_gpu: Sequence[Prediction], ours: dict[str, Prediction]) -> tuple[str, ...]:
    return *_amounts(by_gpu[0]), _shares(by_gpu), *_times(floor_of, by_gpu, ours, 1e6)


def _amounts(one: Prediction) -> tuple[str, ...]:
    return f"{one.macs / 1e9:,.2f}", f"{one.bytes / 1e9:.3f}", f"{one.launches:,}"


def _shares(by_gpu: Sequence[Prediction]) -> str:
    shares = sorted(round(100 * one.memory_share) for one in by_gpu)
    return f"{shares[0]}-{shares[-1]} %" if shares[0] < shares[-1] else f"{shares[0]} %"


def _times(
    seconds: Callable[[Prediction], float],
    by_gpu: Sequence[Prediction],
    ours: dict[str, Prediction],
    units: float = 1e3,
) -> tuple[str, ...]:
    cells = []
    for one in by_gpu:
        bound = "" if one.contender in OURS else f" ({speedup_bound(one, ours[one.gpu], seconds):.2f}x)"
        time = units * seconds(one)
        cells.append(f"{time:.2f}{bound}" if time < 10 else f"{time:.1f}{bound}")
    return tuple(cells)


def markdown(predictions: Sequence[Prediction]) -> str:
    """Return the tables with their titles and notes in Markdown."""
    parts = [SENTENCE]
    for title, heads, rows in sections(predictions):
        lines = [heads, ("---", *["---:"] * (len(heads) - 1))]
        lines += [row if len(row) > 1 else (f"**{row[0]}**", *[""] * (len(heads) - 1)) for row in rows]
        parts += [f"**{title}**", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    return "\n\n".join((*parts, "\n".join(f"- {note}" for note in NOTES)))


def printed(predictions: Sequence[Prediction]) -> list[Table]:
    """Return the tables for a terminal."""
    tables = []
    for title, heads, rows in sections(predictions):
        table = Table(box=box.SIMPLE, title=title, title_justify="left", pad_edge=False)
        for number, head in enumerate(heads):
            table.add_column(head, justify="right" if number else "left", min_width=0 if number else 30)
        for row in rows:
            table.add_row(*row, style="bold" if len(row) == 1 else None)
        tables.append(table)
    return tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.predictions", description=f"Floors for GPUs. {SENTENCE}")
    parser.add_argument("--markdown", action="store_true", help="print Markdown, as in docs/gpus.md")
    options = parser.parse_args(arguments)
    predictions = predict()
    if not predictions:
        parser.exit(1, "nothing to count: Triton is not installed\n")
    if options.markdown:
        print(markdown(predictions))
    else:
        Console(width=WIDTH).print(SENTENCE, *printed(predictions), *NOTES, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
