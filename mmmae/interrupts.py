"""Ctrl-C while the command line loads PyTorch; `mmmae/__init__.py` imports this first, and it imports little itself."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

INTERRUPTED = 130  # the exit status of shells for a process that Ctrl-C ended


def is_command_line() -> bool:
    """Return whether this process is `mmmae` or `python -m mmmae`, not a program that uses mmmae, nor a worker."""
    program = sys.argv[0] if sys.argv else ""  # "-m" until the module that it names is found
    if program not in sys.orig_argv:  # in workers, which have the argv of the command line
        return False
    return os.path.basename(program) == "mmmae" or (program == "-m" and "mmmae" in sys.orig_argv)


def command_name(arguments: Sequence[str]) -> str:
    """Return the command that the arguments of the command line name, of two words for `data check` and the like."""
    words = [word for word in arguments if not word.startswith("-")]
    return " ".join(words[: 2 if words[:1] == ["data"] else 1])


def end_at_interrupts() -> None:
    """Let Ctrl-C end the process with one line, unless it is ignored, until `raise_interrupts` is called.

    A KeyboardInterrupt would end in a traceback here, or in an error of the library whose import it interrupts.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(arguments: Sequence[str], *advice: str) -> str:
    """Return the line that tells of Ctrl-C."""
    return "; ".join([" ".join(["mmmae", command_name(arguments)]).strip() + ": interrupted", *advice])


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{interrupted(sys.argv[1:])}\n".encode(errors="replace"))
    os._exit(INTERRUPTED)  # without what the import of a library has registered for the end


if is_command_line():
    end_at_interrupts()
