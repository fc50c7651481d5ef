"""A standard output whose reader may leave: a run of hours does not end because `head` has seen enough."""

from __future__ import annotations

import os
from typing import Any, TextIO


class UnreadOutput:
    """A stream that drops what is written after its reader has closed the pipe, and is otherwise the stream itself.

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
        """Let the descriptor lead to nowhere: what the stream holds is flushed there at the end of the process."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
