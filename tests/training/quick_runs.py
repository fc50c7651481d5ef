"""Small runs without the work that takes most of their time: counting the model, timing products, rendering pictures.

As a program it is `mmmae`'s command line without that work, under torchrun too. With `--kill READS` the process of
rank 1 is killed when it has read that many subjects:

    python -m tests.training.quick_runs --kill 14 pretrain --out DIR
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from mmmae.cli import main
from mmmae.phantom import Phantom
from mmmae.training import reports

SLOW = [(reports, "profile"), (reports, "product_speed"), (Figure, "savefig")]
SAVE_FIGURE = Figure.savefig
SLOW_ONES = [(owner, name, getattr(owner, name)) for owner, name in SLOW]


def leave_out_slow_work(patch: pytest.MonkeyPatch) -> None:
    """Replace the slow parts of runs by ones that do nothing."""
    report = SimpleNamespace(pretraining=SimpleNamespace(total=SimpleNamespace(macs=10**6)))
    patch.setattr(reports, "profile", lambda config: report)
    patch.setattr(reports, "product_speed", lambda device, dtype: 1e12)
    patch.setattr(Figure, "savefig", _save_nothing)


def _save_nothing(figure: Figure, file: Any, **options: Any) -> None:
    """Write the first bytes of a PNG file in place of a picture; what is drawn into memory, as pages are, stays."""
    if isinstance(file, Path):
        file.write_bytes(b"\x89PNG")
    else:
        SAVE_FIGURE(figure, file, **options)


def bring_back_slow_work(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Undo `leave_out_slow_work` for one test: for the functions of these names, or for all."""
    for owner, name, function in SLOW_ONES:
        if not names or name in names:
            patch.setattr(owner, name, function)


def kill_after_reads(reads: int) -> None:
    """Kill this process when it reads one more subject than `reads`, as the system does where memory is short."""
    read, left = Phantom.__getitem__, [reads]

    def counted(self: Phantom, index: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    Phantom.__getitem__ = counted  # type: ignore[method-assign]


def run(arguments: Sequence[str]) -> int:
    """Run the command line; see the module."""
    if arguments[0] == "--kill":
        if os.environ["RANK"] == "1":
            kill_after_reads(int(arguments[1]))
        arguments = arguments[2:]
    with pytest.MonkeyPatch.context() as patch:
        leave_out_slow_work(patch)
        return main(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
