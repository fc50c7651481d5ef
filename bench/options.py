"""The options of `pytest bench/`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.results import FOLDER
from mmmae.config import PRESETS

if TYPE_CHECKING:
    import pytest


class Options(NamedTuple):
    """The command line's options; `add` says what each is."""

    benchmark: bool
    quick: bool
    full: bool
    preset: str | None
    batch: int | None
    device: str
    dtype: str
    only: str | None
    results: Path

    @classmethod
    def of(cls, config: pytest.Config) -> Options:
        """Return the options of a run."""
        return cls(*(config.getoption(f"--{field}") for field in cls._fields))


def add(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("mmmae")
    group.addoption("--benchmark", action="store_true", help="time, too; without it only exact counts are checked")
    group.addoption("--quick", action="store_true", help="smaller cases and fewer rounds: a minute in all")
    group.addoption("--full", action="store_true", help="every preset, peers, scaling and switches: 45 minutes")
    group.addoption("--preset", choices=sorted(PRESETS), help="preset of the models that are timed; default: base")
    group.addoption("--batch", type=_batch, help="samples in a batch; default: 8 for ops, 4 for models")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="device to time on; default: cpu")
    group.addoption(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of the ops' tensors, and of the models' autocast; default: float32",
    )
    group.addoption(
        "--results", type=Path, default=FOLDER, metavar="DIR", help="folder of the run's files; default: bench/runs"
    )
    group.addoption("--only", metavar="OP", help="time one op, such as patch_embed, and no model")


def _batch(text: str) -> int:
    batch = int(text)
    if batch < 1:
        raise ValueError(text)
    return batch
