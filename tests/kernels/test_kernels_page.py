"""The page on kernels: every op has a section, every number follows from its formula, and every row is counted anew.

`MMMAE_REWRITE=1 pytest tests/kernels/test_kernels_page.py` writes the numbers anew; with `MMMAE_AOT=rows.json` the
compiler's table too, from what `python -m mmmae_kernels.aot --json` printed; with `MMMAE_FLOORS=1` the tables of how
kernels fill a GPU, for which they are compiled (some minutes).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("there is no triton, or TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

import triton

import mmmae
import mmmae_kernels
from mmmae.cost import launches
from mmmae_kernels import use_backend
from mmmae_kernels.add_layer_norm.reference import add_layer_norm_reference
from mmmae_kernels.aot import cases
from mmmae_kernels.aot.costs import cost
from mmmae_kernels.aot.rows import Recorder
from mmmae_kernels.decoder_tokens.reference import decoder_tokens_reference
from mmmae_kernels.gelu_linear.reference import gelu_linear_reference
from mmmae_kernels.gpu.config import SHARED_MEMORY, Config, Launch
from mmmae_kernels.gpu.executors import execute_by
from mmmae_kernels.masked_loss.reference import masked_l2_loss_reference, patch_l2_loss_reference
from mmmae_kernels.norm_linear.reference import norm_linear_reference
from mmmae_kernels.patch_embed.reference import patch_embed_reference, patchify_reference
from mmmae_kernels.random_masking.reference import random_masking_reference
from tests.kernels import floors

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
SECTION = re.compile(r"^### `(\w+)`$(.*?)(?=^##)", re.MULTILINE | re.DOTALL)
AMOUNT = re.compile(r"\| `([^`|]*[*+ \d][^`|]*)` \| ([\d,]+|\?) (?=\|)")  # a formula and its number
SYMBOLS = re.compile(r"<!-- symbols: (.*?) -->")
SUMS = re.compile(r"(<!-- sums -->\n)(.*?)(<!-- end -->)", re.DOTALL)
AOT = re.compile(r"(<!-- aot -->\n)(.*?)(<!-- end -->)", re.DOTALL)
FLOORS = re.compile(r"(<!-- floors -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NO_OPS = {"BlockWeights", "TokenMask", "explain", "use_backend"}
NVIDIA = [target for target in SHARED_MEMORY if target.startswith("sm")]
AMD = [target for target in SHARED_MEMORY if not target.startswith("sm")]

CONFIG = mmmae.MMMAEConfig.preset("base")
B, N, K, D, W = 8, CONFIG.tokens, CONFIG.keep, CONFIG.dim, CONFIG.decoder_dim
M, H, Q, PATCH = N - K, round(CONFIG.dim * CONFIG.mlp_ratio), 3 * CONFIG.dim, CONFIG.patch
VOLUME = (B, CONFIG.in_channels, CONFIG.bands, CONFIG.image_size, CONFIG.image_size)
P = CONFIG.in_channels * PATCH[0] * PATCH[1] * PATCH[2]
LARGE = 100_000  # elements of a tensor that the page counts in PyTorch's operators


def empty(*shape: int) -> Tensor:
    return torch.empty(shape).requires_grad_()


def ids(count: int) -> Tensor:
    return torch.arange(count).expand(B, count).contiguous()


def parameters() -> dict[str, Tensor]:
    return {
        "weight": empty(D, CONFIG.in_channels, *PATCH),
        "bias": empty(D),
        "position": empty(N, D),
        "mask_token": empty(W),
        "decoder_position": empty(N, W),
        "scale": empty(D),
        "shift": empty(D),
        "to_qkv": empty(Q, D),
        "qkv_bias": empty(Q),
        "fc1_bias": empty(H),
        "fc2": empty(D, H),
        "volume": torch.empty(VOLUME),
    }


# Of each op: how it is called, given parameters and activations, and its definition.
Function = Callable[[dict[str, Tensor], dict[str, Tensor]], Any]
CALLS: dict[str, tuple[Function, Function]] = {
    "random_masking": (
        lambda p, x: mmmae_kernels.random_masking(B, N, K, torch.tensor(0)),
        lambda p, x: random_masking_reference(B, N, K, torch.tensor(0), torch.device("cpu"), 0),
    ),
    "patch_embed": (
        lambda p, x: mmmae_kernels.patch_embed(p["volume"], p["weight"], p["bias"], x["ids_keep"], p["position"]),
        lambda p, x: patch_embed_reference(p["volume"], p["weight"], p["bias"], x["ids_keep"], p["position"]),
    ),
    "patch_l2_loss": (
        lambda p, x: mmmae_kernels.patch_l2_loss(x["prediction"], p["volume"], p["weight"], p["bias"], x["ids_masked"]),
        lambda p, x: patch_l2_loss_reference(
            x["prediction"], p["volume"], p["weight"], p["bias"], x["ids_masked"], None, False
        ),
    ),
    "masked_l2_loss": (
        lambda p, x: mmmae_kernels.masked_l2_loss(x["prediction"], x["target"], x["ids_masked"]),
        lambda p, x: masked_l2_loss_reference(x["prediction"], x["target"], x["ids_masked"], None, False),
    ),
    "decoder_tokens": (
        lambda p, x: mmmae_kernels.decoder_tokens(x["visible"], p["mask_token"], x["ids"], p["decoder_position"]),
        lambda p, x: decoder_tokens_reference(x["visible"], p["mask_token"], x["ids"], p["decoder_position"]),
    ),
    "add_layer_norm": (
        lambda p, x: mmmae_kernels.add_layer_norm(x["x"], x["residual"], p["scale"], p["shift"], 1e-6, p["bias"]),
        lambda p, x: add_layer_norm_reference(x["x"], x["residual"], p["scale"], p["shift"], 1e-6, p["bias"]),
    ),
    "norm_linear": (
        lambda p, x: mmmae_kernels.norm_linear(
            x["x"], x["residual"], p["scale"], p["shift"], p["to_qkv"], p["qkv_bias"], 1e-6, p["bias"]
        ),
        lambda p, x: norm_linear_reference(
            x["x"], x["residual"], p["scale"], p["shift"], p["to_qkv"], p["qkv_bias"], 1e-6, p["bias"]
        ),
    ),
    "gelu_linear": (
        lambda p, x: mmmae_kernels.gelu_linear(x["hidden"], p["fc2"], None, p["fc1_bias"]),
        lambda p, x: gelu_linear_reference(x["hidden"], p["fc2"], None, p["fc1_bias"]),
    ),
    "patchify": (
        lambda p, x: mmmae_kernels.patchify(p["volume"], PATCH, x["ids_keep"]),
        lambda p, x: patchify_reference(p["volume"], PATCH, x["ids_keep"]),
    ),
}


def activations() -> dict[str, Tensor]:
    return {
        "ids": ids(N),
        "ids_keep": ids(K),
        "ids_masked": ids(M),
        "prediction": empty(B, M, D),
        "target": torch.empty(B, N, D),
        "visible": empty(B, K, W),
        "x": empty(B, K, D),
        "residual": empty(B, K, D),
        "hidden": empty(B, K, H),
    }


class Traffic(TorchDispatchMode):
    """Bytes of the large inputs and outputs of PyTorch's operators."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large, self.bytes = large, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if launches._does_work(func) and (not name.startswith("mmmae::") or name == "mmmae::philox_noise"):
            read = {"aten::copy_": args[1:], "aten::new_zeros": ()}.get(name, (args, kwargs or {}))
            tensors = launches._tensors(read) + launches._tensors(result)
            self.bytes += sum(map(launches._bytes, (t for t in tensors if elements(t) >= self.large)))
        return result


def elements(tensor: Tensor) -> int:
    """Return the number of elements in memory; an expanded axis counts once."""
    return launches._bytes(tensor) // tensor.element_size()


class Launched:
    """Takes launches, runs nothing, and keeps what each costs: kernel, bytes, FLOPs."""

    target = "sm80"

    def __init__(self) -> None:
        self.costs: list[tuple[str, int, int]] = []

    def __call__(self, launch: Launch) -> Config:
        flops, moved = cost(launch)
        self.costs.append((launch.kernel.fn.__name__.lstrip("_"), moved, flops))
        return launch.configs[0]


def counted(op: str, fused: bool) -> dict[str, list[int]]:
    """Count bytes and FLOPs of every row of an op on the page; its launches are `1. kernel`, `2. kernel`."""
    p, x = parameters(), activations()
    held = {tensor.untyped_storage()._cdata for tensor in p.values()}
    saved: dict[int, int] = {}
    launched, side, found = Launched(), "torch" if fused else "reference", {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    def measure(run: Callable[[], Any]) -> tuple[Any, list[int]]:
        flops, traffic = FlopCounterMode(display=False), Traffic(0 if op == "random_masking" else LARGE)
        with flops, traffic:
            result = run()
        return result, [traffic.bytes, flops.get_total_flops()]

    backend = "triton" if fused else "eager"
    with execute_by(launched), use_backend(backend), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        results, found[f"{side}, forward"] = measure(lambda: CALLS[op][0 if fused else 1](p, x))
        results = results if isinstance(results, tuple) else (results,)
        outputs = [result for result in results if result.requires_grad]
        if outputs:
            leaves = [leaf for leaf in (*p.values(), *x.values()) if leaf.requires_grad]
            incoming = [torch.empty_like(output) for output in outputs]
            _, found[f"{side}, backward"] = measure(
                lambda: torch.autograd.grad(outputs, leaves, incoming, allow_unused=True)
            )
            found["saved, fused" if fused else "saved, reference"] = [sum(saved.values())]
    if fused:
        found = {name: row for name, row in found.items() if row[0]}  # nothing runs beside our kernels: no row
        if op == "patch_embed":  # inside its operator
            with Traffic(LARGE) as traffic:
                torch.ops.aten.embedding_dense_backward(torch.empty(B, K, D), x["ids_keep"], N, -1, False)
            found["torch, position"] = [traffic.bytes, 0]
        found |= {f"{place}. {kernel}": [b, f] for place, (kernel, b, f) in enumerate(launched.costs, 1)}
    return found


def symbols(page: str) -> dict[str, int]:
    pairs = (pair.split(" = ") for line in SYMBOLS.findall(page) for pair in line.split(", "))
    return {name: int(value) for name, value in pairs}


def sections(page: str) -> dict[str, str]:
    return dict(SECTION.findall(page))


def rows_of(section: str) -> list[tuple[str, list[int]]]:
    """Return name and numbers of every row of a section's table."""
    rows = []
    for line in section.splitlines():
        numbers = [int(number.replace(",", "")) for _, number in AMOUNT.findall(line)]
        if numbers:
            rows.append((line.split("|")[1].strip(), numbers))
    return rows


def with_numbers(page: str) -> str:
    """Return the page with each formula followed by its value, and with the sums of the rows."""
    values = symbols(page)
    page = AMOUNT.sub(lambda match: f"| `{match[1]}` | {eval(match[1], dict(values)):,} ", page)
    return SUMS.sub(lambda match: f"{match[1]}{sums(page)}{match[3]}", page)


def sums(page: str) -> str:
    """Return the megabytes of each op, reference and fused: moved in both passes, and saved between them."""
    lines = [
        "| MB, `base`, batch 8, float32 | moved, reference | moved, fused | ratio | saved, reference | saved, fused |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for op, section in sections(page).items():
        rows = rows_of(section)
        if not rows:
            continue
        moved = [(name, numbers[0]) for name, numbers in rows if not name.startswith("saved")]
        reference = sum(number for name, number in moved if name.startswith("reference"))
        fused = sum(number for name, number in moved if not name.startswith("reference"))
        held = [f"{numbers[0] / 1e6:.2f}" for name, numbers in rows if name.startswith("saved")] or ["", ""]
        cells = [f"`{op}`", f"{reference / 1e6:.2f}", f"{fused / 1e6:.2f}", f"{fused / reference:.2f}", *held]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def aot_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of each kernel's first config in bfloat16 (integer kernels: float32), and the notes."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    halves = {row["kernel"] for row in rows if row["dtype"] == "bf16"}
    for row in rows:
        if row["dtype"] == ("bf16" if row["kernel"] in halves else "fp32"):
            first.setdefault((row["kernel"], row["target"]), row)
    kernels = list(dict.fromkeys(kernel for kernel, _ in first))
    text = ""
    for targets in (NVIDIA, AMD):
        text += f"| kernel | {' | '.join(targets)} |\n| --- |{' ---: |' * len(targets)}\n"
        for kernel in kernels:
            text += f"| {kernel} | {' | '.join(_cell(first.get((kernel, target))) for target in targets)} |\n"
        text += "\n"
    notes: dict[tuple[str, str], list[str]] = {}
    for (kernel, target), row in first.items():
        if row["note"]:
            notes.setdefault((kernel, row["note"]), []).append(target)
    for (kernel, note), targets in notes.items():
        where = "all" if len(targets) == len(SHARED_MEMORY) else ", ".join(targets)
        text += f"- {kernel} ({where}): {note}\n"
    return text


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "?"
    shared = f"{row['shared'] / 1024:.1f}".removesuffix(".0")
    spills = f", spills {row['spills']}" if row["spills"] else ""
    return f"{row['registers']}·{shared}·{row['matrix_instructions']}·{row['load_bytes']}{spills}"


@pytest.fixture(scope="module")
def page() -> str:
    text = PAGE.read_text()
    if os.environ.get("MMMAE_REWRITE"):
        text = with_numbers(text)
        if "MMMAE_AOT" in os.environ:
            rows = json.loads(Path(os.environ["MMMAE_AOT"]).read_text())
            text = AOT.sub(lambda match: f"{match[1]}{aot_table(rows)}{match[3]}", text)
        if "MMMAE_FLOORS" in os.environ:
            text = FLOORS.sub(lambda match: f"{match[1]}{floors.floors()}{match[3]}", text)
        PAGE.write_text(text)
    return text


def test_every_op_has_a_section(page):
    assert set(sections(page)) == set(mmmae_kernels.__all__) - NO_OPS


def test_the_symbols_are_those_of_base(page):
    values = symbols(page)
    sizes = {"B": B, "N": N, "K": K, "M": M, "P": P, "D": D, "W": W, "H": H, "Q": Q, "e": 4}
    assert {name: values[name] for name in sizes} == sizes
    text = SYMBOLS.sub("", page)
    for name, value in values.items():
        assert re.search(rf"\b{name} = {value}\b", text), name


def test_every_number_is_its_formulas_value(page):
    assert page == with_numbers(page), "MMMAE_REWRITE=1 pytest tests/kernels/test_kernels_page.py writes the page anew"


@pytest.mark.parametrize("op", CALLS)
def test_every_row_is_what_is_counted(page, op):
    place, written = 0, {}
    for name, numbers in rows_of(sections(page)[op]):
        if name.startswith("`"):
            place += 1
            name = f"{place}. {re.findall('`([^`]+)`', name)[0]}"
        written[name] = numbers
    found = counted(op, fused=True) | counted(op, fused=False)
    assert set(written) == set(found)
    for name, numbers in written.items():
        assert numbers == found[name][: len(numbers)], name


def test_the_compilers_table_has_every_kernel_and_architecture(page):
    (_, table, _), *_ = AOT.findall(page)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    heads = [line[1:] for line in lines if line[0] == "kernel"]
    assert heads == [NVIDIA, AMD]
    named = [line[0] for line in lines if line[0] not in ("kernel", "---")]
    compiled = compiled_kernels()
    assert sorted(named) == sorted(2 * list(compiled))
    assert compiled <= kernels_that_exist()
    cell = re.compile(r"\d+·[\d.]+·\d+·\d+(, spills \d+)?")
    for line in lines:
        if line[0] in compiled:
            assert all(map(cell.fullmatch, line[1:])), line


def test_the_compilers_table_takes_the_first_config():
    def row(kernel, target, dtype, registers, note=""):
        rest = {"spills": 0, "shared": 1536, "matrix_instructions": 2, "load_bytes": 16, "note": note}
        return {"kernel": kernel, "target": target, "dtype": dtype, "registers": registers, **rest}

    rows = [row("a", "sm80", "fp32", 1), row("a", "sm80", "bf16", 2, "why"), row("a", "sm80", "bf16", 3)]
    text = aot_table([*rows, row("b", "sm80", "fp32", 4)])
    assert "| a | 2·1.5·2·16 | ? |" in text
    assert "| b | 4·1.5·2·16 | ? |" in text
    assert "- a (sm80): why" in text


def test_the_tables_of_floors_have_every_kernel_with_its_bytes_and_programs(page):
    tables = floor_tables(page)
    lines, compact = tables[0][1], tables[-1][1]
    assert [head for head, _ in tables] == [*[f"{floors.DETAILED}, {dtype}" for dtype in floors.DTYPES], "bf16"]
    assert compiled_kernels() == set(lines) == set(compact)
    for kernel, cells in lines.items():
        assert cells[:2] == floors.launched(kernel, "bf16"), kernel


def test_the_tables_of_floors_are_what_is_compiled(page, request):
    """By default one line of one architecture and dtype."""
    detailed, compact = zip(floors.DTYPES, floor_tables(page), strict=False), floor_tables(page)[-1][1]
    everything = request.config.getoption("--all-targets")
    for dtype, (_, lines) in detailed if everything else [next(detailed)]:
        for kernel in lines if everything else ["decoder_tokens_backward"]:
            assert floors.detailed(kernel, dtype) == f"| {kernel} | {' | '.join(lines[kernel])} |"
    for kernel in compact if everything else ():
        assert compact[kernel] == [floors.compact(floors.rows_of(kernel, "bf16", target)) for target in SHARED_MEMORY]


def floor_tables(page: str) -> list[tuple[str, dict[str, list[str]]]]:
    """Return head and lines of each table."""
    (_, text, _), *_ = FLOORS.findall(page)
    tables = []
    for table in text.strip().split("\n\n"):
        head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        tables.append((head[0], {line[0]: line[1:] for line in lines}))
    return tables


def compiled_kernels() -> set[str]:
    """Return the names of the kernels in the cases that `aot` compiles."""
    recorder, precision = Recorder("sm80"), torch.get_float32_matmul_precision()
    try:
        with execute_by(recorder):
            for case in cases.CASES.values():
                case(torch.float32)
    finally:
        torch.set_float32_matmul_precision(precision)
    return {name.lstrip("_") for name, *_ in recorder.launches}


def kernels_that_exist() -> set[str]:
    modules = [module for name, module in sys.modules.items() if name.startswith("mmmae_kernels.")]
    values = [item for module in modules for item in vars(module).items()]
    return {name.lstrip("_") for name, value in values if isinstance(value, triton.JITFunction)}
