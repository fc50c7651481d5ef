"""What commands print: lines that foreign names can't forge, and a standard output whose reader may leave."""

from __future__ import annotations

import os
from typing import Any, TextIO

from ..text import printable


def say(line: object) -> None:
    """Print one line, whatever the names in it hold."""
    print(printable(line))


def one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as one line, in place of `warnings.formatwarning`; its place in code unless it is for users."""
    place = "" if category is UserWarning else f"{printable(filename)}:{lineno}: {category.__name__}: "
    return f"{place or 'warning: '}{printable(' '.join(str(message).split()))}\n"


class UnreadOutput:
    """A stream that drops what is written after its reader has closed the pipe, and is otherwise the stream itself.

    A run of hours does not end because `head` has seen enough.

    Args:
        stream: a text stream with a file descriptor, as `sys.stdout`.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Flush what was written, or drop it."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Redirect the descriptor to the null device, into which the stream is flushed at the end of the process."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
