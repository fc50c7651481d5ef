"""What a part of a visit finds, written line by line, so that nothing is lost if it is cut off or dies."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# After such an error every further call of CUDA in the process fails.
STICKY = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "launch timed out",
    "hardware stack error",
    "uncorrectable ECC",
    "invalid program counter",
)
OUT_OF_MEMORY = "out of memory"


class Records:
    """The records of a part, a JSON object a line.

    A part consists of items, in an order that does not change. Before each one a line says that it begins, so that a
    part which died in one can be started again behind it.

    Args:
        path: of the file; lines are added.
        skip: number of items that are not to be run.
    """

    def __init__(self, path: Path, skip: int = 0) -> None:
        self.file, self.skip = path.open("a", encoding="utf-8"), skip

    def add(self, kind: str, **values: Any) -> None:
        """Write a record; `kind` says which fields it has."""
        print(json.dumps({"kind": kind, **values}), file=self.file, flush=True)

    def attempt(self, what: str, do: Callable[..., object], *arguments: Any, needed: bool = False) -> None:
        """Run an item; record an error that it raises.

        Args:
            what: the item's name.
            do: runs it, called with the arguments.
            needed: whether later items need what it does: it is run although it is to be skipped, unless it is the last
                of those, which is the one in which an earlier process died.

        Raises:
            Exception: the error, if the process can't go on after it.
        """
        skipped = self.skip > 0
        if skipped:
            self.skip -= 1
            if not needed or self.skip == 0:
                return
        else:
            self.add("begin", what=what)
        try:
            do(*arguments)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip()
            if any(message in reason for message in STICKY):
                raise
            if OUT_OF_MEMORY in reason:
                self.add("skipped", what=what, reason="out of memory")
            else:
                where = "".join(traceback.format_tb(error.__traceback__)[-4:])
                self.add("failure", what=what, error=reason[:2000], where=where)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records in a file; a line that was not finished, as of a process that was killed, is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
